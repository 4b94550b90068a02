"""Faster decoding that changes no answer, and guidance that equals two forwards."""

import copy
import json

import pytest
from helpers.conversations import users

from llama_zh_nb.chat import Chat
from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.generation import decoding
from llama_zh_nb.generation.sampling import sampling
from llama_zh_nb.text.templates import get_template

torch = pytest.importorskip('torch')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    from llama_zh_nb.weights import acquire

    return acquire('mini', tmp_path_factory.mktemp('decoding') / 'base')


@pytest.fixture(scope='module')
def mini(folder):
    from llama_zh_nb.checkpoint.folder import load

    return load(folder, 'cpu', 'float32')


def prompts(n=40):
    t = ['The capital of {} is', 'Tell me about {}.', '{}的首都是', 'Once upon a time in {}']
    return [
        t[i % 4].format(w)
        for i, w in enumerate(
            ['France', 'Japan', 'Egypt', 'Peru', '法国', '日本', 'Rome', 'China', 'Spain', 'Kenya']
            * (n // 10)
        )
    ]


@pytest.fixture(scope='module')
def draft(mini):
    torch.manual_seed(0)
    return decoding._cut_down(mini[0], 2).eval()


@pytest.mark.parametrize('penalty', [1.0, 1.1])
def test_speculative_is_identical(mini, draft, penalty):
    model, tok = mini
    ids = [
        [tok.bos_token_id, *tok(p, add_special_tokens=False)['input_ids']]
        for p in prompts(20 if penalty == 1 else 10)
    ]
    settings, plain, drafted = (
        dict(sampling('greedy'), repetition_penalty=penalty),
        decoding.Decoded(),
        {},
    )
    for adaptive in (False, True):
        d = decoding.load_draft(copy.deepcopy(draft), model, tok, 4, adaptive)
        drafted[adaptive] = decoding.Decoded()
        for x in ids:
            decoding.decode(model, tok, x, 12, drafted[adaptive], settings, assistant_model=d)
    for x in ids:
        decoding.decode(model, tok, x, 12, plain, settings)
    assert plain.forwards == plain.tokens and plain.accepted == 0
    for d in drafted.values():
        assert d.ids == plain.ids and 0 < d.accepted < d.drafted and d.forwards < plain.forwards


def test_race(mini, draft):
    r = decoding.race(
        *mini,
        [[1, *mini[1](p, add_special_tokens=False)['input_ids']] for p in prompts(10)[:3]],
        copy.deepcopy(draft),
        max_new_tokens=12,
    )
    assert (
        [r.same(k) for k in r.done] == [3] * 4
        and 'plain' in r._repr_html_()
        and 'forwards' in repr(r)
    )


def test_make_draft(folder, mini, tmp_path):
    chats = [dict(messages=users(f'What is {i}?', f'It is {i}.')) for i in range(40)]
    rows = decoding.make_draft(
        folder,
        chats,
        tmp_path / 'draft',
        template='alpaca2',
        steps=4,
        batch=2,
        block=64,
        device='cpu',
    )
    assert len(rows) == 4 and rows[-1]['loss'] < rows[0]['loss']
    d = decoding.load_draft(tmp_path / 'draft', *mini)
    assert d.config.num_hidden_layers == 1 and d.generation_config.num_assistant_tokens == 4
    c = Chat(
        mini, preset='alpaca2', template='alpaca2', draft=tmp_path / 'draft', max_new_tokens=12
    )
    assert c.ask('Hello?') and len(c.turns) == 2
    with pytest.raises(LlamaZhError, match='together'):
        Chat(mini, template='alpaca2', draft=d, guidance=2)
    conf = json.loads((tmp_path / 'draft' / 'config.json').read_text())
    (tmp_path / 'draft' / 'config.json').write_text(
        json.dumps(dict(conf, quantization_config={'bits': 4}))
    )
    with pytest.raises(LlamaZhError, match='quantized'):
        decoding.make_draft(tmp_path / 'draft', chats, tmp_path / 'x', template='alpaca2')
    assert not (tmp_path / 'x').exists()


def test_other_vocabulary(mini):
    import transformers as tf

    with pytest.raises(LlamaZhError, match='vocabulary'):
        decoding.load_draft(
            tf.LlamaForCausalLM(
                tf.LlamaConfig(
                    vocab_size=100,
                    hidden_size=16,
                    intermediate_size=16,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                )
            ),
            *mini,
        )


@torch.inference_mode()
def naive_guided(model, ids, neg, scale, n):
    new = []
    for _ in range(n):
        p, q = (model(torch.tensor([x + new])).logits[0, -1].log_softmax(-1) for x in (ids, neg))
        new.append((q + scale * (p - q)).argmax().item())
        if new[-1] == 2:
            break
    return new


@pytest.mark.parametrize('scale', [0.5, 2.0])
def test_guidance_is_two_forwards(mini, scale):
    model, tok = mini
    t = get_template('alpaca2')
    for p in prompts(10)[:2]:
        c = Chat(
            mini,
            preset='greedy',
            template='alpaca2',
            system='Be short.',
            guidance=scale,
            negative='Be long.',
            max_new_tokens=8,
        )
        c.ask(p)
        ids, neg = (
            t.encode(tok, [dict(role='system', content=s), *users(p)], True).ids
            for s in ('Be short.', 'Be long.')
        )
        want = tok.decode(naive_guided(model, ids, neg, scale, 8), skip_special_tokens=True)
        assert (
            c.turns[-1]['content'] == want.rstrip('\ufffd').strip()
        )  # a character that never became whole is dropped
