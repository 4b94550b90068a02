"""Embeddings: resizing on disk equals resizing in memory, touches nothing else, and leaves nothing behind when killed."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.pieces import train_bpe

from llama_zh_nb.checkpoint.meta import EMBED, HEAD, llama_shapes
from llama_zh_nb.checkpoint.tensors import open_weights, write_shards
from llama_zh_nb.checkpoint.translations import translations
from llama_zh_nb.core.errors import LlamaZhError, read_json, write_json
from llama_zh_nb.embeddings import INITS, Spelling, mixtures, plain_sp, resize
from llama_zh_nb.tokenizer.exact import load_sp, read_model, save_tokenizer
from llama_zh_nb.weights import verify

ZH = ['苏州', '苏', '州', '江苏', '的省份', '长沙', '湖南', '越来越', '北京烤鸭']
TOY = [
    '苏州的省份是江苏。 The province of Suzhou is Jiangsu.',
    '苏州在江苏。 Suzhou is in Jiangsu.',
    '长沙的省份是湖南。 The province of Changsha is Hunan.',
    '湖南有长沙。 Hunan has Changsha.',
    '苏州和长沙。 Suzhou and Changsha.',
    '江苏和湖南。 Jiangsu and Hunan.',
    '苏州的人。 people in Suzhou.',
] * 5


@pytest.fixture(scope='session')
def toks(tmp_path_factory):
    "(base, extended) tokenizer folders: a small BPE model, and the same with a pad and Chinese pieces behind it."
    d = tmp_path_factory.mktemp('tok')
    text = 'the province of suzhou Suzhou Jiangsu is Changsha Hunan The in has and looked at the rain over the old town while people went home'
    lines = [' '.join(text.split()[i:] + text.split()[:i]) for i in range(25)]
    train_bpe(d / 't', lines, 360, pad_id=-1, character_coverage=1.0)
    m = read_model(d / 't.model')
    low = min(p.score for p in m.pieces)
    for i, p in enumerate(['<pad>', *sorted(set(''.join(ZH)) - set(ZH)), *ZH]):
        m.pieces.add(piece=p, score=low - 1 - i, type=3 if p == '<pad>' else 1)
    (d / 'big.model').write_bytes(m.SerializeToString())
    return save_tokenizer(d / 't.model', d / 'base'), save_tokenizer(d / 'big.model', d / 'big')


def make(folder, tok, tied=False, shard_bytes=10**9, rows=None, code='F32', n=3):
    "A small random Llama folder."
    rows = rows or len(load_sp(tok))
    c = dict(
        architectures=['LlamaForCausalLM'],
        model_type='llama',
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=rows,
        intermediate_size=64,
        num_hidden_layers=n,
        tie_word_embeddings=tied,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        hidden_act='silu',
        torch_dtype='float32',
    )
    g, dt = (
        torch.Generator().manual_seed(0),
        {'F32': torch.float32, 'BF16': torch.bfloat16, 'F16': torch.float16}[code],
    )
    folder.mkdir()
    w = {k: (torch.randn(s, generator=g) * 0.2).to(dt) for k, s in llama_shapes(c).items()}
    write_shards(folder, {k: (code, tuple(t.shape)) for k, t in w.items()}, w.get, shard_bytes)
    write_json(folder / 'config.json', c)
    save_tokenizer(tok, folder)
    return folder, w


def in_memory(w, base, big, total, side):
    n = len(load_sp(base))
    old = w[side][:n].double()
    rows = [old[ids].mean(0) if ids else old.mean(0) for _, ids in Spelling(base, big)]
    return torch.cat([old, torch.stack(rows + [old.mean(0)] * (total - n - len(rows)))]).to(
        w[side].dtype
    )


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('shard_bytes', [10**9, 60_000])
@pytest.mark.parametrize('pad_to,code', [(64, 'F32'), (1, 'BF16')])
def test_equals_memory(tmp_path, toks, tied, shard_bytes, pad_to, code):
    base, big = toks
    src, w = make(tmp_path / 'm', base, tied, shard_bytes, code=code)
    out = resize(src, big, tmp_path / 'out', init='subword-mean', pad_to=pad_to)
    n = len(load_sp(big))
    total, got = -(-n // pad_to) * pad_to, open_weights(out)
    assert list(got) == list(w)
    for k, t in w.items():
        want = in_memory(w, base, big, total, k) if k in (EMBED, HEAD) else t
        assert torch.equal(got[k].get(k), want) and got[k].spec(k)[0] == code, k
    for k in {EMBED, HEAD} & set(w):
        assert torch.equal(got[k].get(k, slice(0, len(w[k]))), w[k])
    c, g = read_json(out / 'config.json'), read_json(out / 'generation_config.json')
    assert (
        c['vocab_size'] == total
        and c['pad_token_id'] == g['pad_token_id'] == load_sp(big).piece_to_id('<pad>')
        and c['eos_token_id'] == 2
    )
    assert verify(out).ok and read_json(out / 'resize.json')['old_rows'] == len(load_sp(base))
    if shard_bytes < 10**9:
        assert read_json(out / 'model.safetensors.index.json')['metadata']['total_size'] == sum(
            f.get(k).nbytes for k, f in got.items()
        )


@pytest.mark.parametrize('tied', [False, True])
def test_transformers_loads_and_old_text_scores_the_same(tmp_path, toks, tied):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    src, w = make(tmp_path / 'm', toks[0], tied)
    out = resize(src, toks[1], tmp_path / 'out')
    a, b = (AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32).eval() for d in (src, out))
    ids = torch.tensor([load_sp(toks[0]).encode('the old town')])
    with torch.no_grad():
        la, lb = a(ids).logits, b(ids).logits
    assert torch.allclose(la, lb[..., : la.shape[-1]], atol=1e-5)
    assert (
        len(AutoTokenizer.from_pretrained(out)) == len(load_sp(toks[1]))
        and (b.lm_head.weight is b.model.embed_tokens.weight) == tied
    )


def test_only_the_files_that_change_are_written(tmp_path, toks):
    src, w = make(tmp_path / 'm', toks[0], shard_bytes=60_000)
    (src / 'LICENSE').write_text('terms')
    out = resize(src, toks[1], tmp_path / 'out', link=True)
    same = {p.name: p.samefile(out / p.name) for p in src.glob('*.safetensors')}
    holds = {f.path.name for k, f in open_weights(src).items() if k in (EMBED, HEAD)}
    assert (
        {n for n, s in same.items() if not s} == holds
        and len(same) > len(holds)
        and (out / 'LICENSE').exists()
    )
    copy = resize(src, toks[1], tmp_path / 'copy')
    assert not any(p.samefile(copy / p.name) for p in src.glob('*.safetensors'))


def test_rows_and_pieces_of_other_sizes(tmp_path, toks):
    base, big = toks
    n, m = len(load_sp(base)), len(load_sp(big))
    src, w = make(
        tmp_path / 'padded', base, rows=-(-n // 64) * 64
    )  # padding rows of the base mean nothing: they get new ones
    got = open_weights(resize(src, big, tmp_path / 'o1', init='subword-mean'))
    assert torch.equal(got[EMBED].get(EMBED), in_memory(w, base, big, -(-m // 64) * 64, EMBED))
    small = open_weights(resize(tmp_path / 'o1', base, tmp_path / 'o2', pad_to=1))
    assert (
        all(torch.equal(small[k].get(k), w[k][:n] if k in (EMBED, HEAD) else w[k]) for k in w)
        and read_json(tmp_path / 'o2/config.json')['vocab_size'] == n
    )
    same = open_weights(resize(src, base, tmp_path / 'o3', pad_to=1))
    assert torch.equal(same[HEAD].get(HEAD), w[HEAD][:n])


def test_inits(tmp_path, toks):
    base, big = toks
    src, w = make(tmp_path / 'm', base)
    n, rows = len(load_sp(base)), {}
    for init in INITS:
        rows[init] = {
            k: f.get(k)[n : len(load_sp(big))]
            for k, f in open_weights(
                resize(src, big, tmp_path / init, init=init, texts=TOY)
            ).items()
            if k in (EMBED, HEAD)
        }
    assert torch.equal(
        rows['random'][HEAD],
        open_weights(resize(src, big, tmp_path / 'again', init='random'))[HEAD].get(HEAD)[
            n : len(load_sp(big))
        ],
    )
    assert (
        not torch.equal(rows['random'][HEAD], rows['random'][EMBED])
        and 0.015 < rows['random'][EMBED].std() < 0.025
    )
    assert not torch.equal(
        rows['random'][EMBED],
        open_weights(resize(src, big, tmp_path / 'other', init='random', seed=1))[EMBED].get(EMBED)[
            n : len(load_sp(big))
        ],
    )
    assert torch.allclose(
        rows['mean'][EMBED], w[EMBED].mean(0).expand_as(rows['mean'][EMBED]), atol=1e-6
    )
    assert torch.equal(rows['first-heavy'][EMBED], rows['subword-mean'][EMBED]) and not torch.equal(
        rows['first-heavy'][HEAD], rows['subword-mean'][HEAD]
    )
    s = Spelling(base, big)
    for init in INITS:
        for side in (EMBED, HEAD):
            assert all(
                len(ids) == len(x) and min(x, default=1) > 0 for ids, x in mixtures(s, init, side)
            )


@pytest.mark.parametrize('tied', [False, True])
def test_full_length(tmp_path, toks, tied):
    "Weights as rare-heavy; the input side stretched to the length of an average old row, the output side untouched"
    base, big = toks
    src, w = make(tmp_path / 'm', base, tied)
    n, m = len(load_sp(base)), len(load_sp(big))
    a, b = (
        open_weights(resize(src, big, tmp_path / i, init=i)) for i in ('rare-heavy', 'full-length')
    )
    old, x, y = (
        w[EMBED].double(),
        a[EMBED].get(EMBED, slice(n + 1, m)).double(),
        b[EMBED].get(EMBED, slice(n + 1, m)).double(),
    )
    assert torch.allclose(
        y.norm(dim=1), old.norm(dim=1).mean().expand(len(y)), rtol=1e-5
    ) and torch.allclose(
        torch.cosine_similarity(x, y), torch.ones(len(y), dtype=torch.double), atol=1e-6
    )
    assert torch.equal(
        b[EMBED].get(EMBED, slice(n, n + 1)), a[EMBED].get(EMBED, slice(n, n + 1))
    )  # <pad> has no spelling: the mean
    if not tied:
        assert torch.equal(a[HEAD].get(HEAD), b[HEAD].get(HEAD))


def test_spelling_has_no_dummy_prefix(toks):
    base, big = toks
    s = Spelling(base, big)
    assert (
        s[0] == ('<pad>', [])
        and all(s.sp.decode(ids) == p for p, ids in s[1:])
        and len(dict(s)['苏']) == 3
    )
    assert '▁' not in plain_sp(base).encode('苏', out_type=str) and '苏' in s._repr_html_()


def test_dictionary_finds_translations(toks):
    base, big = toks
    d, sp = translations(TOY, base, big), load_sp(big)

    def best(piece):
        weights = d[sp.piece_to_id(piece)]
        return sp.id_to_piece(max(weights.items(), key=lambda x: x[1])[0])

    assert 'Suzhou'.startswith(best('苏州').strip('▁')) and set(d) <= set(
        range(len(load_sp(base)), len(sp))
    )
    assert translations(['no Chinese here'], base, big) == {}


def _refused(tmp_path, words, *args, **kw):
    with pytest.raises(LlamaZhError) as e:
        resize(*args, tmp_path / 'out', **kw)
    assert all(w in str(e.value) for w in words), str(e.value)
    assert not (tmp_path / 'out').exists() and not list(tmp_path.glob('.out*'))


def test_refusals(tmp_path, toks):
    base, big = toks
    src, w = make(tmp_path / 'm', base)
    _refused(tmp_path, ('magic', 'subword-mean'), src, big, init='magic')
    _refused(tmp_path, ('texts',), src, big, init='dictionary')
    _refused(tmp_path, ('no line',), src, big, init='dictionary', texts=['nothing'])
    _refused(tmp_path, ('no such file',), src, tmp_path / 'nowhere')
    m = read_model(big)
    m.pieces[300].piece = 'moved'
    (tmp_path / 'moved.model').write_bytes(m.SerializeToString())
    _refused(tmp_path, ("piece 300 is 'moved'", 'does not extend'), src, tmp_path / 'moved.model')
    write_json(src / 'config.json', read_json(src / 'config.json') | dict(vocab_size=999))
    _refused(tmp_path, ('do not agree', '999', '360'), src, big)
    dead, _ = make(tmp_path / 'dead', base)
    w = {k: f.get(k) for k, f in open_weights(dead).items()}
    w[EMBED][:] = 0
    write_shards(dead, {k: ('F32', tuple(t.shape)) for k, t in w.items()}, w.get)
    _refused(tmp_path, ('all zeros', EMBED), dead, big)
    old = tmp_path / 'old'
    shutil.copytree(src, old)
    (old / 'model.safetensors').unlink()
    torch.save(w, old / 'pytorch_model.bin')
    _refused(tmp_path, ('.bin', 'weights get'), old, big)


def test_killed_half_way(tmp_path, toks):
    src, w = make(tmp_path / 'm', toks[0], shard_bytes=60_000)
    code = f"""import time, llama_zh_nb.embeddings as e
keep = e.initial_rows
def slow(*a, **k): print('now', flush=True); time.sleep(60); yield from keep(*a, **k)
e.initial_rows = slow
e.resize({str(src)!r}, {str(toks[1])!r}, {str(tmp_path / 'out')!r})"""
    p = subprocess.Popen(
        [sys.executable, '-c', code], stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent
    )
    assert p.stdout.readline().strip() == b'now'
    assert list(tmp_path.glob('.out.partial-*'))
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not (tmp_path / 'out').exists()
    out = resize(src, toks[1], tmp_path / 'out')
    assert verify(out).ok and not list(tmp_path.glob('.out*'))


@pytest.mark.filterwarnings('ignore:.*follow this model')
def test_real_vocabularies(tmp_path, shared):
    t = shared / 'data/tokenizers'
    src, w = make(tmp_path / 'm', t / 'llama2_32000.model', n=1)
    out = resize(src, t / 'chinese_llama2_55296.model', tmp_path / 'resized', init='subword-mean')
    c, f = read_json(out / 'config.json'), open_weights(out)[HEAD]
    assert c['vocab_size'] == 55296 and torch.equal(f.get(HEAD, slice(0, 32000)), w[HEAD])
    ids = dict(Spelling(src, t / 'chinese_llama2_55296.model'))['越来越']
    i = load_sp(out).piece_to_id('越来越')
    assert len(ids) > 2 and torch.equal(f.get(HEAD)[i], w[HEAD][ids].double().mean(0).float())
    _refused(tmp_path, ('does not extend',), out, t / 'literary_alpaca2_merged.model')


def test_nothing_replaces_what_it_is_made_from(tmp_path, toks):
    src, w = make(tmp_path / 'm', toks[0])
    for out in (src, tmp_path, toks[1]):
        with pytest.raises(LlamaZhError, match='another folder'):
            resize(src, toks[1], out)
    assert verify(src).ok and (toks[1] / 'tokenizer.json').exists()
