"longbench: the metrics, the real file, the cut in the middle"

import importlib.util
import sys
import types
from pathlib import Path

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


@pytest.fixture
def published(monkeypatch):
    "LongBench's own metrics, as lm-eval carries them; two packages that it wants are not needed here"
    spec = importlib.util.find_spec('lm_eval')
    rouge = pytest.importorskip('rouge_chinese')
    if spec is None:
        pytest.skip('lm-eval is not installed')
    fuzzy = types.ModuleType('fuzzywuzzy')
    fuzzy.fuzz = None
    monkeypatch.setitem(sys.modules, 'fuzzywuzzy', fuzzy)
    monkeypatch.setitem(sys.modules, 'rouge', rouge)
    file = Path(spec.submodule_search_locations[0]) / 'tasks' / 'longbench' / 'metrics.py'
    spec = importlib.util.spec_from_file_location('longbench_metrics', file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_scores_agree_with_the_published_metrics(published, shared):
    rows = read_longbench(shared / 'data' / 'eval' / 'longbench' / 'multifieldqa_zh.jsonl')[:60]
    truths = [row['answers'][0] for row in rows]
    answers = truths[1:] + [t[: len(t) // 2] + '，' + t for t in truths]
    pairs = list(zip(answers, truths[:-1] + truths))
    for answer, truth in pairs:
        assert word_f1(answer, truth) == pytest.approx(published.qa_f1_zh_score(answer, truth))
        same = published.rouge_zh_score(answer, truth)
        assert rouge_l(answer, truth, unique=False) == pytest.approx(same, abs=1e-6)
    classes = ['体育', '娱乐', '财经']
    for answer in ('体育', '体育、娱乐', '没有', '财经'):
        theirs = published.classification_score(answer, '体育', all_classes=classes)
        assert class_score(answer, '体育', classes) == theirs
    for answer in ('段落3', '3和4', '段落13', '不知道'):
        theirs = published.retrieval_zh_score(answer, '段落3')
        assert retrieval_score(answer, '段落3') == theirs
