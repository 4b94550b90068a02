"measure: the fast way equals the slow way, on a real small model with a real tokenizer"

import math

import pytest

from llama_zh_nb.checkpoint.folder import load
from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.evals.measure import bits, greedy, score, wilson, windows
from llama_zh_nb.text.templates import encode_texts

torch = pytest.importorskip('torch')


@pytest.fixture(scope='module')
def tiny():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(['<s>', '</s>', *alphabet])}, merges=[])
    )
    t.pre_tokenizer, t.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tok = PreTrainedTokenizerFast(tokenizer_object=t, bos_token='<s>', eos_token='</s>')
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=48,
            initializer_range=0.3,
        )
    ).eval()
    return model, tok


@torch.no_grad()
def slow(model, tok, text, max_len):
    ids, nats = encode_texts(tok, [text])[0], 0.0
    for s, e, first in windows(len(ids), max_len):
        x = torch.tensor([[tok.bos_token_id] + ids[s:e]])
        lp = model(x).logits[0].double().log_softmax(-1)
        nats -= sum(lp[i - s, ids[i]].item() for i in range(first, e))
    return nats


TEXTS = [
    '',
    'a',
    '秋天的湖水很静。',
    'The lake is calm in autumn. ' * 9,
    '稻谷熟了，' * 21,
    'é😀',
    'x' * 47,
    'x' * 48,
]


@pytest.mark.parametrize('max_len', [None, 7, 48])
@pytest.mark.parametrize('batch', [1, 3])
def test_bits_equal_the_slow_way(tiny, max_len, batch):
    b = bits(*tiny, TEXTS, batch=batch, max_len=max_len)
    want = sum(slow(*tiny, t, max_len or 48) for t in TEXTS if t)
    assert abs(b.nats - want) < 1e-4 * want
    assert b.chars == sum(map(len, TEXTS)) and b.bytes == sum(len(t.encode()) for t in TEXTS)
    assert math.isclose(b.bpc * b.chars, b.bpb * b.bytes) and math.isclose(
        b.ppl, math.exp(b.nats / b.tokens)
    )


def test_control_tokens_in_text_are_text(tiny):
    assert len(encode_texts(tiny[1], ['</s>'])[0]) == 4


def test_bits_refuses_nan(tiny):
    import copy

    m = copy.deepcopy(tiny[0])
    m.lm_head.weight.data[3] = float('nan')
    with pytest.raises(LlamaZhError, match='NaN'):
        bits(m, tiny[1], 'abc')


def test_greedy_is_the_argmax_and_keeps_order(tiny):
    model, tok = tiny
    prompts = [[0, 9], [0, 20, 21, 22, 23], [0, 7, 7]]

    def naive(ids, n):
        out = []
        with torch.no_grad():
            for _ in range(n):
                out.append(model(torch.tensor([ids + out])).logits[0, -1].argmax().item())
        return out

    assert greedy(model, tok, prompts, 8, stop_ids=[], batch=2, as_ids=True) == [
        naive(p, 8) for p in prompts
    ]
    assert greedy(model, tok, [], 8) == []


def test_wilson():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-3) and wilson(0, 0) == (0.0, 1.0)


def test_score():
    qs = [
        dict(question='?', answer='茶来自云南。', value='云南', kind='a'),
        dict(question='?', value='1998', kind='b'),
    ]
    assert [r['right'] for r in score(['茶来自 云南', '11998'], qs).rows] == [False, False]
    assert [r['right'] for r in score(['茶来自云南', '在1998年'], qs).rows] == [True, True]
    with pytest.raises(LlamaZhError):
        score(['a'], qs)


def test_load_refuses_a_tokenizer_that_is_too_large(shared, tmp_path):
    import shutil

    src = shared / 'data' / 'models' / 'stories260K_hf'
    shutil.copytree(src, tmp_path / 'm')
    shutil.copy(
        shared / 'data' / 'tokenizers' / 'llama2_32000.model', tmp_path / 'm' / 'tokenizer.model'
    )
    with pytest.raises(LlamaZhError, match='32000|32,000'):
        load(tmp_path / 'm')
    with pytest.raises(LlamaZhError, match='not a model'):
        load(tmp_path / 'nowhere')
