"A model folder as a chat model: streams, stops, whole characters; servers that fail."

import asyncio
import threading

import pytest
from helpers.documents import fake_server

from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.documents.chat_model import ask_model, ask_model_batch, ask_model_stream, load_chat
from llama_zh_nb.generation.streaming import IncrementalDecoder
from llama_zh_nb.rag import open_assistant


def test_stream_is_invoke(llm):
    whole = llm.invoke('末班船几点开？')
    parts = [c.content for c in llm.stream('末班船几点开？')]
    assert ''.join(parts).strip() == whole.content and len(parts) > 2
    assert whole.usage_metadata['output_tokens'] <= 12 and whole.response_metadata[
        'finish_reason'
    ] in ('stop', 'length')
    assert [m.content for m in llm.batch(['甲', '乙'])] == [
        llm.invoke('甲').content,
        llm.invoke('乙').content,
    ]
    assert asyncio.run(llm.ainvoke('甲')).content == llm.invoke('甲').content


def test_stop_and_walk_away(llm):
    full = llm.invoke('码头').content
    s = full[3:5]
    assert llm.invoke('码头', stop=[s]).content == full[: full.index(s)].strip()
    n = threading.active_count()
    it = llm.stream('码头', max_new_tokens=200)
    next(it)
    it.close()
    assert threading.active_count() <= n


def test_no_half_characters(llm):
    text = '龘龘😀船𪚥'
    ids = llm.tokenizer(text, add_special_tokens=False)['input_ids']
    for end in range(1, len(ids) + 1):
        p = IncrementalDecoder(llm.tokenizer)
        out = [p.push(i) for i in ids[:end]] + [p.end()]
        assert '\ufffd' not in ''.join(out) and text.startswith(''.join(out).strip())
    p = IncrementalDecoder(llm.tokenizer, ['龘😀'])
    assert ''.join([p.push(i) for i in ids if not p.done] + [p.end()]).strip() == '龘'


def test_messages(llm):
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage

    ids = llm.encode(
        [
            SystemMessage('短'),
            HumanMessage('甲'),
            AIMessage('乙'),
            HumanMessage('丙'),
            HumanMessage('丁'),
        ]
    )
    assert ids.count(1) == 2 and ids.count(2) == 1
    with pytest.raises(LlamaZhError, match='tool'):
        llm.invoke([HumanMessage('x'), ToolMessage('y', tool_call_id='1')])
    with pytest.raises(LlamaZhError, match='shorten'):
        llm.invoke('船' * 600)


def test_server_failures(index, monkeypatch):
    pytest.importorskip('langchain_openai')
    monkeypatch.delenv('OPENAI_API_KEY', raising=False)
    with (
        fake_server(lambda p: '', models=('a', 'b')) as (url, _),
        pytest.raises(LlamaZhError, match='a, b.*--llm-model'),
    ):
        load_chat(url)
    with fake_server(lambda p: '', status=401) as (url, _):
        llm = load_chat(url, max_retries=0)
        for f in (
            lambda: ask_model(llm, 'x'),
            lambda: list(ask_model_stream(llm, 'x')),
            lambda: ask_model_batch(llm, ['x', 'y']),
        ):
            with pytest.raises(LlamaZhError, match='OPENAI_API_KEY'):
                f()
    with pytest.raises(LlamaZhError, match='check the address'):
        load_chat(url)  # it is gone
    for bad in (
        dict(llm='folder'),
        dict(model='x', llm='http://x'),
        dict(llm_model='x'),
        dict(strategy='refine'),
        dict(k=0),
        dict(max_new_tokens=0),
    ):
        with pytest.raises(LlamaZhError):
            open_assistant(index, **bad)
