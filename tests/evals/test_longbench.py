"longbench: the metrics, the real file, the cut in the middle"

import pytest
from helpers.byte_model import byte_model

from llama_zh_nb.evals.longbench import (
    class_score,
    cut_middle,
    longbench,
    read_longbench,
    retrieval_score,
    rouge_l,
    word_f1,
)

torch = pytest.importorskip('torch')


@pytest.fixture(scope='module')
def tiny():
    return byte_model()


def test_longbench_metrics():
    assert word_f1('首都是巴黎', '巴黎') == pytest.approx(0.5) and word_f1(
        '', '巴黎'
    ) == 0 == word_f1('。', '巴黎')
    assert (
        class_score('体育、娱乐', '体育', ['体育', '娱乐']) == 0.5
        and class_score('体育', '国际体育', ['体育', '国际体育']) == 0
    )
    assert (
        retrieval_score('答案是段落12', '段落12') == 1
        and retrieval_score('段落1', '段落12') == 0
        and retrieval_score('段落12或13', '段落12') == 0.5
    )


def test_rouge_agrees_with_the_package():
    rouge, jieba = pytest.importorskip('rouge_chinese'), pytest.importorskip('jieba')
    for a, t in (
        ('会议讨论了预算和人事', '会议讨论预算'),
        ('今天天气很好，我们去公园', '今天我们去了公园，公园里人很多很多'),
        ('好的好的', '好'),
    ):
        want = rouge.Rouge().get_scores([' '.join(jieba.cut(a))], [' '.join(jieba.cut(t))])[0][
            'rouge-l'
        ]['f']
        assert rouge_l(a, t, unique=False) == pytest.approx(want, abs=1e-6)


def test_longbench_rows_of_the_real_file(tiny, shared, tmp_path):
    rows = read_longbench(shared / 'data' / 'eval' / 'longbench' / 'multifieldqa_zh.jsonl')
    assert len(rows) == 200 and {r['dataset'] for r in rows} == {'multifieldqa_zh'}
    text, cut = cut_middle(tiny[1], rows[0]['context'], 90)
    assert (
        cut and text.startswith(rows[0]['context'][:10]) and text.endswith(rows[0]['context'][-10:])
    )
    short = [dict(r, longest=4) for r in rows[:3]]
    r = longbench(tiny, short, max_len=300, form='chat', out=tmp_path, name='m')
    assert (
        len(r.rows) == 3
        and r.settings['cut'] == 3
        and all(x['tokens'] <= 296 for x in r.rows)
        and 0 <= r.micro['share'] <= 1
    )
    assert r.micro['hi'] > r.micro['lo']  # three zeros are no certainty
    assert (
        r.settings['prompts']['multifieldqa_zh'].startswith('阅读以下文字')
        and longbench(tiny, short, max_len=300, form='chat', out=tmp_path, name='m').to_dict()
        == r.to_dict()
    )
    assert longbench(
        tiny,
        [
            dict(
                dataset='x',
                input='问',
                context='文',
                answers=['x'],
                prompt='{context}{input}',
                metric='f1',
                longest=2,
            )
        ],
        form='base',
    ).rows[0]['tokens'] == 1 + len('文问'.encode())
