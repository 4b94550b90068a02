"LangChain's own standard tests for our chat model and retriever, and what they do not ask: batches, cancelling, expression language."

import asyncio
import inspect
import threading
from functools import lru_cache

import pytest

pytest.importorskip('langchain_tests')
from helpers.pieces import train_bpe
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_tests.integration_tests import ChatModelIntegrationTests, RetrieversIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.core.settings import RagArgs
from llama_zh_nb.documents.chat_model import ChatLlama, load_chat
from llama_zh_nb.documents.index import build_index
from llama_zh_nb.documents.load import Document
from llama_zh_nb.documents.retriever import ZhRetriever

TEXT = '问答之间，山高水长。码头在镇子东头，每天早上七点有船去县城，票价五元。The boat leaves at nine. Hello, what is 2 + 2?\n'
TOWN = [
    ('码头', '码头在镇子东头，每天早上七点有船去县城，票价五元。'),
    ('茶馆', '茶馆开了六十年，早上六点开门。'),
    ('船坞', '旧船停在船坞，早上没有人。'),
    ('学校', '学校早上八点上课，放学后敲钟。'),
]


@lru_cache
def _where():
    import tempfile
    from pathlib import Path

    return Path(tempfile.mkdtemp(prefix='llama-zh-lc-'))


@lru_cache
def tiny():
    "(model, tokenizer): a tiny random Llama that writes whole characters and never ends by itself"
    import sentencepiece as spm
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from llama_zh_nb.tokenizer.exact import save_tokenizer

    d = _where()
    more = dict(allow_whitespace_only_pieces=True, pad_id=3, hard_vocab_limit=False)
    train_bpe(d / 'm', [TEXT] * 20, 360, character_coverage=1.0, **more)
    save_tokenizer(d / 'm.model', d / 'hf')
    torch.manual_seed(0)
    n = spm.SentencePieceProcessor(model_file=str(d / 'm.model')).vocab_size()
    m = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=n,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=2048,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    m.lm_head.weight.data[:264] = 0
    return m.eval(), AutoTokenizer.from_pretrained(d / 'hf')


def run_async(cls):
    "LangChain's packages set asyncio_mode=auto in their configuration; here the coroutines among the tests are marked instead"
    for name, f in inspect.getmembers(cls, inspect.iscoroutinefunction):
        if name.startswith('test_') and not any(
            m.name == 'asyncio' for m in getattr(f, 'pytestmark', [])
        ):
            pytest.mark.asyncio(f)
    return cls


class Ours:
    "What a test class is told about our model: it was not trained for tools, so what asks for them is left out"

    @property
    def chat_model_class(self):
        return ChatLlama

    @property
    def chat_model_params(self):
        return dict(zip(('model', 'tokenizer'), tiny()))

    @property
    def has_tool_calling(self):
        return False

    @property
    def has_structured_output(self):
        return False


class TestUnit(Ours, ChatModelUnitTests):
    @pytest.fixture
    def benchmark(self, benchmark):
        "One go instead of a second of timing, and no table at the end of the suite"
        benchmark.disabled = True
        return benchmark


@run_async
class TestIntegration(Ours, ChatModelIntegrationTests):
    @property
    def standard_chat_model_params(self):
        return {
            **super().standard_chat_model_params,
            'max_tokens': 16,
        }  # a random model never ends by itself


@lru_cache
def index():
    docs = [Document(f'{name}。{text}', metadata={'source': name}) for name, text in TOWN]
    return build_index(docs, _where() / 'index', args=RagArgs(chunk_tokens=64))


@run_async
class TestRetriever(RetrieversIntegrationTests):
    @property
    def retriever_constructor(self):
        return ZhRetriever

    @property
    def retriever_constructor_params(self):
        return {
            f: getattr(index(), f)
            for f in ZhRetriever.model_fields
            if f != 'k' and f in index().model_fields_set
        }

    @property
    def retriever_query_example(self):
        return '早上几点有船？'


# what the standard tests do not ask


@pytest.fixture(scope='module')
def llm():
    return load_chat(tiny(), max_new_tokens=16)


def test_expression_language(llm):
    join = RunnableLambda(lambda ds: '\n'.join(d.page_content for d in ds))
    chain = (
        {'context': index() | join, 'question': RunnablePassthrough()}
        | ChatPromptTemplate.from_template('{context}\n{question}')
        | llm
        | StrOutputParser()
    )
    q = '早上几点有船？'
    whole = chain.invoke(q)
    assert (
        whole == llm.invoke(join.invoke(index().invoke(q)) + '\n' + q).content
        and ''.join(chain.stream(q)).strip() == whole
    )
    assert asyncio.run(chain.ainvoke(q)) == whole and chain.batch([q, q]) == [whole, whole]
    assert (
        llm.bind(stop=[whole[2:4]]).invoke(join.invoke(index().invoke(q)) + '\n' + q).content
        == whole[: whole.index(whole[2:4])].strip()
    )


def test_batch_is_one_generate(llm, monkeypatch):
    calls, generate = [], type(llm.model).generate
    monkeypatch.setattr(
        type(llm.model),
        'generate',
        lambda self, *a, **kw: calls.append(len(kw['input_ids'])) or generate(self, *a, **kw),
    )
    asks = [f'{"船" * i}几点开？' for i in range(1, 7)]
    alone = [llm.invoke(a) for a in asks]
    assert calls == [1] * 6
    calls.clear()
    together = llm.batch(asks)
    assert calls == [6] and [m.content for m in together] == [m.content for m in alone]
    assert [(m.usage_metadata, m.response_metadata) for m in together] == [
        (m.usage_metadata, m.response_metadata) for m in alone
    ]
    calls.clear()
    llm.batch(asks, {'max_concurrency': 2})
    assert calls == [2, 2, 2]
    calls.clear()
    asyncio.run(llm.abatch(asks))
    assert calls == [6]
    for kw in (
        dict(temperature=0.7),
        dict(repetition_penalty=1.2),
        dict(timeout=60),
    ):  # drawn, or depending on the padding: each alone
        calls.clear()
        llm.batch(asks[:2], **kw)
        assert calls == [1, 1]


def test_batch_errors_and_callbacks(llm):
    ends = []

    class Watch(BaseCallbackHandler):
        def on_llm_end(self, response, **kw):
            ends.append(response.generations[0][0].text)

    got = llm.batch(['船', '船' * 5000, '票'], {'callbacks': [Watch()]}, return_exceptions=True)
    assert isinstance(got[1], LlamaZhError) and sorted(ends) == sorted(
        [got[0].content, got[2].content]
    )
    with pytest.raises(LlamaZhError, match='shorten'):
        llm.batch(['船', '船' * 5000])


def test_cancelled_stream_stops_the_model(llm):
    before, seen = set(threading.enumerate()), []

    async def read():
        async for c in llm.astream('船', max_new_tokens=1900):
            seen.append(c.content)

    async def main():
        task = asyncio.create_task(read())
        while len(seen) < 3:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(400):
            if not any(
                t.daemon and t.is_alive() and 'work' in t.name
                for t in set(threading.enumerate()) - before
            ):
                return
            await asyncio.sleep(0.01)
        raise AssertionError('the model goes on')

    asyncio.run(main())
    assert len(seen) < 1000


def test_others_run_while_it_answers(llm):
    ticks = []

    async def clock():
        while True:
            ticks.append(1)
            await asyncio.sleep(0.001)

    async def main():
        t = asyncio.create_task(clock())
        got = await asyncio.gather(*[llm.ainvoke(q, max_new_tokens=40) for q in ('船', '票')])
        t.cancel()
        return got

    assert [m.content for m in asyncio.run(main())] == [
        llm.invoke(q, max_new_tokens=40).content for q in ('船', '票')
    ] and len(ticks) > 5


def test_async_errors_arrive(llm):
    with pytest.raises(LlamaZhError, match='shorten'):
        asyncio.run(llm.ainvoke('船' * 5000))


def test_names_and_refusals(llm):
    model, tok = tiny()
    assert (
        ChatLlama(
            model=model,
            tokenizer=tok,
            max_tokens=7,
            stop_sequences=['x'],
            max_retries=2,
            streaming=True,
        ).max_new_tokens
        == 7
    )
    assert (
        llm.invoke('船', max_tokens=3).usage_metadata['output_tokens']
        == 3
        == llm.bind(max_new_tokens=3).invoke('船').usage_metadata['output_tokens']
    )
    with pytest.raises(LlamaZhError, match='max_new_tokens'):
        ChatLlama(model=model, tokenizer=tok, max_new_token=3)
    with pytest.raises(LlamaZhError, match='tools'):
        llm.bind_tools([])
    with pytest.raises(LlamaZhError, match='tools'):
        llm.with_structured_output({'title': 'x', 'type': 'object', 'properties': {}})
    assert llm.get_num_tokens('</s>') > 1 and llm.get_num_tokens_from_messages(
        [HumanMessage('船')]
    ) == len(llm.encode([HumanMessage('船')]))


def test_answers_keep_to_the_reach(llm):
    n = llm.invoke('船' * 1900, max_new_tokens=500).usage_metadata
    assert n['total_tokens'] <= llm.context_length and n['output_tokens'] > 0
