"What the commands `llama-zh rag ...` call."

import json
import subprocess
import sys

import pytest
from helpers.documents import DOCS, POEMS, fake_server, heard

from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.documents.assistant import Assistant
from llama_zh_nb.documents.chat_model import load_chat
from llama_zh_nb.documents.index import open_index
from llama_zh_nb.documents.scoring import (
    bootstrap_interval,
    evaluate_answers,
)
from llama_zh_nb.rag import open_assistant, rag_ask, rag_eval
from llama_zh_nb.text.questions import read_questions

pytest_plugins = ['helpers.documents']  # its fixtures


def test_server_as_model(index, monkeypatch):
    pytest.importorskip('langchain_openai')
    monkeypatch.setenv('OPENAI_API_KEY', 'key-of-the-test')
    with fake_server(lambda p: '五元[1]。[9]') as (url, asked):
        a = rag_ask(index, '码头的票价多少？', llm=url, max_new_tokens=9)
        assert a.text == '五元[1]。[?]' and a.invented == [9]
        assert (
            asked[0]['path'] == '/v1/chat/completions'
            and asked[0]['model'] == 'm'
            and asked[0]['key'] == 'Bearer key-of-the-test'
            and asked[0]['temperature'] == 0
        )
        assert (
            9 in (asked[0].get('max_tokens'), asked[0].get('max_completion_tokens'))
            and '<资料 编号="1">' in asked[0]['messages'][0]['content']
        )
        *parts, last = open_assistant(index, llm=url).stream('码头的票价多少？')
        assert asked[-1]['stream'] and ''.join(parts) == last.text == a.text and len(parts) > 3
        assert [
            x.text
            for x in open_assistant(index, llm=url + '/v1').ask_all(
                ['码头的票价多少？', '量子纠缠？']
            )
        ] == [a.text, Assistant(index).refusal]
        for kw in (dict(template='alpaca2'), dict(system='x'), dict(top_k=3)):
            with pytest.raises(LlamaZhError, match='server'):
                load_chat(url, **kw)


def test_rag_eval(poems, tmp_path):
    rows = [
        {
            'data': [
                {
                    'paragraphs': [
                        {
                            'context': t.split('\n')[1],
                            'qas': [
                                {
                                    'id': n,
                                    'question': t.split('\n')[1][:4] + '？',
                                    'answers': [{'text': t.split('\n')[1][3:6]}],
                                }
                            ],
                        }
                    ]
                }
            ]
        }
        for n, t in POEMS.items()
    ]
    (tmp_path / 'q.json').write_text(
        json.dumps({'data': [x for r in rows for x in r['data']]}, ensure_ascii=False),
        encoding='utf-8',
    )
    e = rag_eval(poems / 'ix', tmp_path / 'q.json', search='hybrid', out=tmp_path / 'e.json')
    found = e.retrieval
    assert found['recall']['1']['share'] == 1 and '95 % interval' in e._repr_markdown_()
    j = json.loads((tmp_path / 'e.json').read_text())
    assert j['n'] == 4 and j['retrieval']['recall']['1']['interval'][0] < 1 == found['mrr']
    for text in ('', '[]', 'x', '{"a": 1}'):
        (tmp_path / 'bad').write_text(text)
        with pytest.raises(LlamaZhError):
            read_questions(tmp_path / 'bad')
    with pytest.raises(LlamaZhError):
        read_questions(tmp_path / 'none')


def test_evaluation(tmp_path, index):
    squad = dict(
        data=[
            dict(
                paragraphs=[
                    dict(
                        id=n,
                        context=f'{n}。{t}',
                        qas=[dict(id=n, question=q, answers=[dict(text=a)])],
                    )
                    for (n, t), q, a in zip(
                        DOCS.items(),
                        ('码头的票价多少？', '茶馆掌柜姓什么？', '学校有多少学生？'),
                        ('五元', '姓罗', '三百个'),
                    )
                ]
            )
        ]
    )
    f = tmp_path / 'q.json'
    f.write_text(json.dumps(squad, ensure_ascii=False), encoding='utf-8')
    e = rag_eval(tmp_path / 'made', f)  # retrieval only; the index is made
    assert (
        open_index(tmp_path / 'made').info['documents'] == 3
        and e.retrieval['recall']['1']['share'] == 1.0
        and 'exact' not in e.to_dict()
    )
    bot = Assistant(
        tmp_path / 'made',
        heard(
            lambda p: (
                '五元' if '票价' in p.split('\n')[-1] else '他姓罗' if '姓什么' in p else '不知道'
            )
        ),
        k=1,
        threshold=0.0,
    )
    e = evaluate_answers(bot, read_questions(f))
    d = e.to_dict()
    assert (
        d['exact']['right'] == 1
        and d['named']['right'] == 2
        and d['f1']['mean'] == pytest.approx((1 + 2 * 2 / 5 + 0) / 3, abs=1e-3)
        and d['exact']['interval'][0] < 1 / 3 < d['exact']['interval'][1]
    )
    e.save(tmp_path / 'out.json')
    rows = json.loads((tmp_path / 'out.json').read_text(encoding='utf-8'))['rows']
    assert (
        [r['answer'] for r in rows] == ['五元', '他姓罗', '不知道']
        and '票价五元' in rows[0]['prompt']
        and rows[0]['sources'][0]['name'] == '码头'
    )
    by_answer = evaluate_answers(
        Assistant(index), [dict(question='码头的票价多少？', answers=['五元'])]
    )
    assert (
        'holds the shortest answer' in by_answer.retrieval['note']
        and by_answer.retrieval['recall']['1']['share'] == 1
    )
    for bad in (
        dict(),
        dict(questions=tmp_path / 'no'),
        dict(questions=f, limit=0),
        dict(questions=f, k=0),
        dict(questions=f, out=tmp_path),
        dict(questions=f, out=tmp_path / 'no' / 'x.json'),
    ):
        with pytest.raises(LlamaZhError):
            rag_eval(tmp_path / 'made', **bad)
    assert bootstrap_interval([0, 1] * 50) == bootstrap_interval(
        [0, 1] * 50
    ) and bootstrap_interval([]) == (0.0, 1.0)


def test_commands_in_a_pipe(index):
    "`rag chat` as the shell runs it, passages only"

    p = subprocess.run(
        [
            sys.executable,
            '-c',
            f'from llama_zh_nb.rag import rag_chat; rag_chat({str(index)!r}, k=1)',
        ],
        input='码头的票价多少？\n茶馆开了多少年？\n/sources\n/quit\n'.encode(),
        capture_output=True,
        timeout=120,
    )
    out = p.stdout.decode()
    assert p.returncode == 0 and '[1] 码头' in out and '掌柜姓罗' in out, p.stderr.decode()[-500:]
