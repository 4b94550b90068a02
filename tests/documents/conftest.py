"Small indexes and a tiny model, for all tests of documents."

import pytest
from helpers.documents import DOCS, POEMS, TOWN

from llama_zh_nb.core.settings import RagArgs
from llama_zh_nb.documents.chat_model import load_chat
from llama_zh_nb.documents.index import build_index
from llama_zh_nb.documents.load import Document


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A tiny random Llama with an exact tokenizer, as this project saves it. Rows of byte pieces are zero, so it writes whole characters."
    import sentencepiece as spm
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llama_zh_nb.tokenizer.exact import save_tokenizer

    d = tmp_path_factory.mktemp('model')
    text = (TOWN + '问答之间，山高水长。The boat leaves at nine.\n') * 20
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_prefix=str(d / 'm'),
        vocab_size=420,
        model_type='bpe',
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name='identity',
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        pad_id=3,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    save_tokenizer(d / 'm.model', d / 'hf')
    torch.manual_seed(0)
    m = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=448,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    n = spm.SentencePieceProcessor(model_file=str(d / 'm.model')).vocab_size()
    m.lm_head.weight.data[:264] = 0
    m.lm_head.weight.data[n:] = 0
    m.save_pretrained(d / 'hf')
    return d / 'hf'


@pytest.fixture(scope='module')
def llm(folder):
    return load_chat(folder, device='cpu', max_new_tokens=12)


@pytest.fixture(scope='module')
def town(tmp_path_factory):
    d = tmp_path_factory.mktemp('town')
    (d / 'docs').mkdir()
    (d / 'docs' / '青石镇.md').write_text(TOWN, encoding='utf-8')
    build_index(d / 'docs', d / 'index', args=RagArgs(chunk_tokens=80))
    return d


@pytest.fixture(scope='module')
def poems(tmp_path_factory):
    d = tmp_path_factory.mktemp('poems')
    (d / 'docs').mkdir()
    for n, t in POEMS.items():
        (d / 'docs' / n).write_text(t, encoding='utf-8')
    build_index(d / 'docs', d / 'ix')
    return d


@pytest.fixture(scope='module')
def index(tmp_path_factory):
    d = tmp_path_factory.mktemp('answers')
    build_index(
        [Document(f'{n}。{t}', metadata={'source': n}) for n, t in DOCS.items()],
        d / 'index',
        args=RagArgs(chunk_tokens=64),
    )
    return d / 'index'
