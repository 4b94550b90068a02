"""Rows of chats: answers are learnt and nothing else, packed equals alone, what is too long is counted."""

import pytest
from helpers.tiny import CHATS, talk, tiny

from llama_zh_nb.core.errors import LlamaZhError


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp('model'))


@pytest.fixture(scope='module')
def tok(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_only_answers_and_ends_are_learnt(tok):
    from llama_zh_nb.training.chat_rows import ChatCollate, examples

    data = examples(CHATS, tok)
    b = ChatCollate(3)([dict(parts=data.items[:3], row=0), dict(parts=data.items[3:4], row=1)])
    for i in range(2):
        learnt = [t for t in b['labels'][i].tolist() if t != -100]
        assert learnt.count(2) == (6, 2)[i] and 1 not in learnt and 3 not in learnt
    text = tok.decode([t for t in b['labels'][1].tolist() if t != -100])
    assert 'Where' not in text and '长江很长。' in text and '21' in text
    assert data.report['learnt_tokens'] == sum(sum(e.mask) for e in data.items)


@pytest.mark.parametrize('attn', ['sdpa', 'eager'])
def test_packed_equals_unpacked_per_token(folder, tok, attn):
    import torch
    from transformers import AutoModelForCausalLM

    from llama_zh_nb.training.chat_rows import ChatCollate, Packed, examples, token_losses

    m = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attn).eval()
    p, c = Packed(examples(CHATS, tok), 200), ChatCollate(3)
    rows = [p[i] for i in range(4)]
    alone = torch.cat(
        [token_losses(m, c([dict(parts=[e], row=0)])) for r in rows for e in r['parts']]
    )
    assert len([e for r in rows for e in r['parts']]) > 8
    torch.testing.assert_close(token_losses(m, c(rows)), alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        token_losses(m, ChatCollate(3, flat=True)(rows)), alone, atol=1e-5, rtol=0
    )


def test_too_long_is_counted_not_cut(tok):
    from llama_zh_nb.training.chat_rows import examples

    long = [dict(messages=talk('q', 'far ' * 100), source='f:9'), *CHATS[:1]]
    d = examples(long, tok, block=64)
    assert (
        d.report['left_out'] == 1
        and d.report['left_out_rows'][0].startswith('f:9')
        and all(e.ids[-1] == 2 for e in d.items)
    )
    d = examples([dict(messages=talk('q', 'a', 'r', 'far ' * 100))], tok, block=64)
    assert (
        d.report['shortened'] == 1
        and d.items[0].ids[-1] == 2
        and sum(i == 2 for i in d.items[0].ids) == 1
    )
    with pytest.raises(LlamaZhError, match='raise block'):
        examples(long[:1], tok, block=64)
    with pytest.raises(LlamaZhError, match='unknown too_long'):
        examples(long, tok, block=64, too_long='x')


def test_pad_is_never_the_end(tok, folder):
    from transformers import AutoTokenizer

    from llama_zh_nb.checkpoint.folder import pad_id

    t = AutoTokenizer.from_pretrained(folder)
    t.pad_token = t.eos_token
    assert (
        pad_id(t) == t.unk_token_id == 0
    )  # a folder that pads with its end mark: the unknown token takes its place
    t.unk_token = None
    with pytest.raises(LlamaZhError, match='never learns to stop'):
        pad_id(t)


def test_packing_order(tok):
    from llama_zh_nb.training.chat_rows import Packed, examples, with_texts

    d = with_texts(examples(CHATS, tok), ['The river is long. ' * 9] * 30, tok, 128)
    p, q = (Packed(d, 128, epochs=3, share=0.25, seed=s) for s in (0, 0))
    assert p.rows == q.rows != Packed(d, 128, epochs=3, share=0.25, seed=1).rows and p.filled > 0.75

    def n(text):
        return sum(len(d[i].ids) for r in p.rows for i in r if (d.kinds[i] == 'text') == text)

    assert abs(n(True) / (n(True) + n(False)) - 0.25) < 0.05
    assert (
        len(Packed(d, 128, rows=10)) == 10 and len(Packed(d, 128, epochs=0.5, multiple=4)) % 4 == 0
    )
    assert sorted(i for r in Packed(d, 128).rows for i in r) == list(range(len(d)))


def test_mix_of_languages(tok):
    from llama_zh_nb.training.chat_rows import Packed, examples, with_texts

    chats = [dict(messages=talk('q', 'It is far, the river is long.'))] * 10 + [
        dict(messages=talk('长江?', '长江很长。'))
    ] * 30
    d = with_texts(examples(chats, tok), ['The river is long. ' * 9] * 30, tok, 128)
    assert (d.report['chinese'], d.report['english']) == (30, 10)

    def share(**kw):
        p = Packed(d, 128, epochs=4, **kw)
        assert sum(p.mix.values()) == sum(len(d[i].ids) for r in p.rows for i in r)
        return p.mix['en'] / (p.mix['en'] + p.mix['zh']), p.mix['text'] / sum(p.mix.values())

    for want in (0.1, 0.5, 0.7):
        assert (
            abs(share(en_share=want, share=0.2)[0] - want) < 0.04
            and abs(share(en_share=want, share=0.2)[1] - 0.2) < 0.05
        )
    assert share(en_share=0.0, share=0.0) == (0, 0)
    one = examples(chats[:10], tok)
    with pytest.raises(LlamaZhError, match='all English'):
        Packed(one, 128, en_share=0.5)
    with pytest.raises(LlamaZhError, match='from 0 to below 1'):
        Packed(d, 128, en_share=1)


def test_truncation_is_counted_by_kind(tok):
    from llama_zh_nb.training.chat_rows import examples

    chats = [
        dict(messages=talk('q', 'a', 'r', 'far ' * 60, 'u', 'b')),
        dict(messages=talk('q', 'far ' * 100)),
        dict(messages=talk('q', 'a')),
    ]

    def n(policy):
        report = examples(chats, tok, block=48, too_long=policy).report
        keys = ('chats', 'shortened', 'answers_lost', 'answers_cut', 'left_out')
        return [report[k] for k in keys]

    assert n('turns') == [2, 1, 2, 0, 1] and n('drop') == [1, 0, 0, 0, 2] and n('cut')[3:] == [2, 0]
    d = examples(chats, tok, block=48)
    assert (
        [k for _, k in d.lengths][1] == 0
        and 'chat 2' in d.lost()
        and '1 chats are shortened, by 2 answers' in d.lost()
    )
    assert (
        'in the middle of an answer' in examples(chats, tok, block=48, too_long='cut').lost()
        and examples(chats[2:], tok).lost() == ''
    )
