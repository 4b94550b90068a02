"All ways of searching, with models from folders and other people's embeddings."

import asyncio
import socket

import pytest
from helpers.documents import POEMS, bert

from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.core.settings import RagArgs
from llama_zh_nb.documents.index import build_index, open_index
from llama_zh_nb.documents.retriever import ZhRetriever, fuse_ranks


def test_both_searches(town, monkeypatch):

    monkeypatch.setattr(
        socket.socket, 'connect', lambda *a: pytest.fail('the index went to the network')
    )
    for how in ('lexical', 'dense'):
        ix = open_index(town / 'index', search=how)
        got = ix.invoke('茶馆的掌柜姓什么？')
        scores = [d.metadata['score'] for d in got]
        assert (
            '掌柜姓罗' in got[0].page_content
            and scores == sorted(scores, reverse=True)
            and all(0 <= s <= 1 for s in scores)
        )
        assert ix.find('掌柜', where={'source': 'other.md'}) == []
        assert 'chunks of' in str(ix) and len(str(ix)) < 200
    with pytest.raises(LlamaZhError):
        open_index(town / 'index', search='magic')


def test_hybrid_rerank_and_filters(poems):
    class Last:
        def predict(self, pairs):
            return [1.0 if '茶' in p else 0.1 for _, p in pairs]

    for how in ('lexical', 'dense', 'hybrid'):
        ix = open_index(poems / 'ix', search=how)
        got = ix.find('西湖在哪座城市？', k=4)
        assert got[0].metadata['source'] == '水.md' and [
            d.metadata['score'] for d in got
        ] == sorted((d.metadata['score'] for d in got), reverse=True)
        assert [d.metadata['source'] for d in ix.find('西湖', files=['茶*', '饭.md'])][
            0
        ] == '茶.md' and len(ix.find('西湖在哪', k=2)) == 2
        assert {d.metadata['source'] for d in ix.find('杭州西湖', where={'source': ['水.md']})} == {
            '水.md'
        }
        again = open_index(poems / 'ix', search=how, rerank=Last())
        assert (
            again.find('西湖在哪座城市？', k=1)[0].metadata['source'] == '茶.md'
            and again.kind == f'{how}+rerank'
        )
    assert fuse_ranks([['a', 'b', 'c'], ['b', 'c', 'a']])[0] == 'b'


def test_models_from_folders(poems, tmp_path):
    st = pytest.importorskip('sentence_transformers')
    m = getattr(st, 'models', None) or __import__('sentence_transformers.models', fromlist=['x'])
    word = m.Transformer(str(bert(tmp_path / 'bert')))
    st.SentenceTransformer(
        modules=[
            word,
            m.Pooling(
                word.get_word_embedding_dimension()
                if hasattr(word, 'get_word_embedding_dimension')
                else 32
            ),
        ],
        device='cpu',
    ).save(str(tmp_path / 'st'))
    ix = build_index(
        poems / 'docs', tmp_path / 'ix', args=RagArgs(embedding=str(tmp_path / 'st')), device='cpu'
    )
    assert ix.search == 'dense' and len(ix.find('西湖在杭州，湖上有白堤。', k=4)) == 4
    assert (
        open_index(tmp_path / 'ix', search='hybrid').find('西湖在哪座城市')[0].metadata['score'] > 0
    )
    again = open_index(tmp_path / 'ix', search='lexical', rerank=str(bert(tmp_path / 'ce', 1)))
    got = again.find('西湖在哪座城市', k=3)
    assert len(got) >= 2 and all(0 < d.metadata['score'] < 1 for d in got)
    with pytest.raises(LlamaZhError, match='one'):
        open_index(tmp_path / 'ix', rerank=str(bert(tmp_path / 'three', 3)), search='lexical').find(
            '西湖'
        )
    with pytest.raises(LlamaZhError):
        open_index(tmp_path / 'ix', rerank=str(tmp_path / 'docs'), search='lexical').find('西湖')


def test_langchain_embeddings(poems, tmp_path):
    from langchain_core.embeddings import DeterministicFakeEmbedding

    emb = DeterministicFakeEmbedding(size=16)
    ix = build_index(poems / 'docs', tmp_path / 'ix', args=RagArgs(embedding=emb))
    assert ix.search == 'dense' and ix.find(POEMS['山.md'], k=1)[0].metadata['source'] == '山.md'
    with pytest.raises(LlamaZhError, match='embedding='):
        open_index(tmp_path / 'ix').find('山')
    assert (
        open_index(tmp_path / 'ix', embedding=emb).find(POEMS['茶.md'], k=1)[0].metadata['score']
        > 0.99
    )


def test_langchain_standard(poems):
    suite = pytest.importorskip('langchain_tests.integration_tests').RetrieversIntegrationTests

    class Ours(suite):
        retriever_constructor = ZhRetriever
        retriever_constructor_params = {
            f: getattr(open_index(poems / 'ix'), f) for f in ('folder', 'info', 'chunks', 'lexicon')
        }
        retriever_query_example = '杭州西湖在哪，茶和山也要'

    t = Ours()

    def make():
        return t.retriever_constructor(**t.retriever_constructor_params)

    t.test_k_constructor_param()
    t.test_invoke_with_k_kwarg(make())
    t.test_invoke_returns_documents(make())
    asyncio.run(t.test_ainvoke_returns_documents(make()))
