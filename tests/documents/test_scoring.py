"Exact match and F1 as CMRC 2018 defines them."

import json
import re

import pytest
from helpers.documents import DOCS

from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.documents.index import open_index
from llama_zh_nb.documents.scoring import (
    answer_f1,
    answer_tokens,
    exact_match,
)
from llama_zh_nb.text.questions import read_questions


def test_scores_by_hand():
    "Each figure worked out from the definition"
    for answers, said, em, f in [
        (['踢爆'], '踢爆', 1, 1),
        (['踢爆'], '《踢爆》。', 1, 1),
        (['光荣和ω-force'], '光荣和ω－Force', 1, 1),
        (['1999年'], '1998年', 0, 2 * 1 / 4),
        (['北京大学'], '在北京大学读书', 0, 2 * 4 / (4 + 7)),
        (['甲乙丙'], '甲丙乙', 0, 2 * 1 / 6),
        (['Windows 95', '视窗'], 'windows 95', 1, 1),
        (['a b c'], 'a b', 0, 2 * 2 / 5),
        (['3.5公里'], '3.5公里', 1, 1),
        (['甲'], '', 0, 0),
        (['，。'], '甲', 0, 0),
    ]:
        assert exact_match(answers, said) == bool(em) and answer_f1(answers, said) == pytest.approx(
            f
        ), (
            answers,
            said,
        )


def test_segments_as_the_official_script(shared):
    "The script cuts Latin runs with nltk's tokenizer; on real answers the cuts agree"
    tok = pytest.importorskip('nltk.tokenize').NLTKWordTokenizer()
    from llama_zh_nb.documents.scoring import normalize_answer

    answers = {
        a
        for q in read_questions(shared / 'data/eval/cmrc2018/cmrc2018_trial.json', answered=True)
        for a in q['answers']
    } | {
        a
        for q in read_questions(shared / 'data/eval/drcd/DRCD_dev.json', answered=True)
        for a in q['answers']
    }

    def official(text):
        return [
            w
            for run in re.findall('[\u4e00-\u9fa5]|[^\u4e00-\u9fa5]+', normalize_answer(text))
            for w in ([run] if re.match('[\u4e00-\u9fa5]', run) else tok.tokenize(run))
        ]

    same = sum(official(a) == answer_tokens(a) for a in answers)
    print(same, len(answers))
    assert same / len(answers) > 0.97


def test_question_files(tmp_path, shared):
    qs = read_questions(shared / 'data/eval/cmrc2018/cmrc2018_trial.json', answered=True)
    assert (len(qs), len(qs.bad), len(qs.paragraphs)) == (
        1000,
        2,
        256,
    )  # two of its questions are empty
    assert qs[0]['paragraph'] in qs.paragraphs and all(
        any(a in qs.paragraphs[q['paragraph']] for a in q['answers']) for q in qs[:200]
    )
    f = tmp_path / 'q.jsonl'
    f.write_text(
        '\ufeff{"question": "甲？", "answer": "乙"}\n{broken\n\n{"question": "丙？"}\n["x"]\n{"query": "丁？", "answers": {"text": ["戊", "戊"]}}\n',
        encoding='utf-8',
    )
    got = read_questions(f, answered=True)
    assert [(q['question'], q['answers']) for q in got] == [
        ('甲？', ['乙']),
        ('丁？', ['戊']),
    ] and got.bad == [2, 4, 5]
    (tmp_path / 'c.json').write_text(
        json.dumps(
            [
                {
                    'context_id': 'D1',
                    'context_text': '甲是乙。',
                    'qas': [{'query_id': 'Q', 'query_text': '甲是？', 'answers': ['乙']}],
                }
            ],
            ensure_ascii=False,
        ),
        encoding='utf-8',
    )
    assert read_questions(tmp_path / 'c.json')[0]['paragraph'] == 'D1'
    for text in ('', '{}', '[]', '{"data": 3}', '{"data": [{"paragraphs": [{}]}]}', '<html>'):
        (tmp_path / 'bad.json').write_text(text)
        with pytest.raises(LlamaZhError):
            read_questions(tmp_path / 'bad.json')


def test_paragraphs_known_by_their_text(tmp_path, index):
    "An index made of other files: the passage is recognised by what it says"
    from llama_zh_nb.documents.scoring import judge_retrieval

    q = dict(question='码头的票价多少？', answers=['五元'], source='somewhere')
    same, other = '前言。码头。' + DOCS['码头'], '别的五元。'
    got = judge_retrieval(open_index(index), [q | dict(context=same)])
    assert 'note' not in got and got['recall']['1']['share'] == 1.0
    got = judge_retrieval(open_index(index), [q | dict(context=other)])
    assert got['recall']['10']['share'] == 0.0
