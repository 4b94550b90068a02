"What a run on mini must show, read from the run that the notebooks made just before; accuracies with their 95 % intervals where sampling error matters."

import pytest

from llama_zh_nb.core.errors import read_json
from llama_zh_nb.training.trainer import History


@pytest.fixture(scope='module')
def m(tested_run):
    return {k: s['metrics'] for k, s in read_json(tested_run / 'run.json')['stages'].items()}


def test_chinese_falls_steeply(m):
    assert m['pretrain']['bpc_zh'] < m['weights']['bpc_zh'] / 2


def test_more_than_the_control_at_equal_compute(m):
    new, old = (History(m[k]['history']) for k in ('pretrain', 'control'))
    assert new.at('zh_bpc', flops=old.last('flops')) < 0.8 * old.last('zh_bpc')


def test_english_is_kept(m):
    assert max(m['pretrain']['bpb_en'], m['sft']['bpb_en']) <= 1.1 * m['weights']['bpb_en']


def test_vocabulary(m):
    assert (
        m['vocab']['dead'] == 0
        and m['vocab']['zh_after'] > 2 * m['vocab']['zh_before']
        and m['vocab']['en_after'] == m['vocab']['en_before']
    )


def test_asked_facts_in_phrasings_no_training_text_holds(m):
    a = m['sft']['accuracy']['asked']
    assert a['n'] > 500 and a['share'] >= 0.8


def test_four_bits_cost_at_most_three_points(m):
    assert m['quantize']['accuracy']['asked']['hi'] >= m['sft']['accuracy']['asked']['share'] - 0.03
    assert m['quantize']['bytes_after'] < 0.6 * m['quantize']['bytes_before']


def test_unseen_facts_only_with_documents(m):
    closed, open_ = m['sft']['accuracy']['unseen'], m['rag']['accuracy']['unseen']
    assert open_['n'] == closed['n'] > 80 and closed['share'] < 0.1 and open_['share'] >= 0.6


def test_report_and_notebooks_are_there(tested_run):
    page = (tested_run / 'report.html').read_text(encoding='utf-8')
    assert 'A Llama learns Chinese' in page and not any(
        x in page for x in ('src="http', "src='http", '<link')
    )
    assert len(list((tested_run / 'notebooks').glob('*.ipynb'))) >= 30
