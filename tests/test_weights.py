"""Weights: Meta's layout against an independent reference, verify, every source and every refusal."""

import http.server
import json
import shutil
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.pieces import train_bpe

from llama_zh_nb.checkpoint.folder import check_sizes
from llama_zh_nb.checkpoint.meta import (
    EMBED,
    HEAD,
    convert_meta,
    ffn_width,
    llama_shapes,
    meta_names,
    packaged,
    to_meta,
)
from llama_zh_nb.checkpoint.tensors import SafeFile, TorchFile, open_weights, write_safetensors
from llama_zh_nb.core.errors import LlamaZhError, read_json, write_json
from llama_zh_nb.weights import acquire, verify

P = dict(
    dim=128, n_layers=2, n_heads=16, n_kv_heads=8, norm_eps=1e-5, vocab_size=-1, max_seq_len=256
)


@pytest.fixture(scope='session')
def spm(tmp_path_factory):
    "A small SentencePiece BPE model with byte fallback, of Llama's kind."
    d = tmp_path_factory.mktemp('spm')
    text = 'the cat sat on the mat and looked at the rain over the old town while people went home from work slowly'
    lines = [' '.join(text.split()[i:] + text.split()[:i]) for i in range(20)]
    return train_bpe(d / 'tokenizer', lines, 330, pad_id=-1, character_coverage=1.0)


def random_meta(
    folder, spm, shards=1, p=P, rows=384, ffn=320, vocab_cut=False, dtype=torch.float32
):
    "A random checkpoint cut the way Meta's model-parallel layers are; gives the whole tensors."
    torch.manual_seed(0)
    kv = p.get('n_kv_heads') or p['n_heads']
    c = dict(
        hidden_size=p['dim'],
        num_attention_heads=p['n_heads'],
        num_key_value_heads=kv,
        vocab_size=rows,
        intermediate_size=ffn,
        num_hidden_layers=p['n_layers'],
    )
    whole = {
        m: torch.randn(llama_shapes(c)[hf]) * 0.3
        for hf, (m, _) in meta_names(p['n_layers']).items()
    }
    column, row = ('wq', 'wk', 'wv', 'w1', 'w3', 'output'), ('wo', 'w2')

    def part(name, t, i):
        if 'tok_embeddings' in name:
            return t.chunk(shards, 0 if vocab_cut else 1)[i]
        if any(f'{k}.weight' in name for k in column):
            return t.chunk(shards, 0)[i]
        if any(f'{k}.weight' in name for k in row):
            return t.chunk(shards, 1)[i]
        return t

    folder.mkdir(parents=True)
    for i in range(shards):
        torch.save(
            {k: part(k, t, i).to(dtype).contiguous() for k, t in whole.items()}
            | {'rope.freqs': torch.ones(4)},
            folder / f'consolidated.{i:02}.pth',
        )
    write_json(folder / 'params.json', p)
    shutil.copyfile(spm, folder / 'tokenizer.model')
    return {k: t.to(dtype).float() for k, t in whole.items()}


def reference(w, p, ids):
    "Logits as Meta's published code computes them: neighbours turned as complex numbers."
    h, kv, hd, n = (
        p['n_heads'],
        p.get('n_kv_heads') or p['n_heads'],
        p['dim'] // p['n_heads'],
        len(ids),
    )
    angle = torch.outer(
        torch.arange(n).float(), 1 / p.get('rope_theta', 10000.0) ** (torch.arange(0, hd, 2) / hd)
    )
    fr = torch.polar(torch.ones_like(angle), angle)[:, None]

    def norm(x, g):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + p['norm_eps']) * g

    def turn(x):
        pairs = torch.view_as_complex(x.reshape(n, -1, hd // 2, 2))
        return torch.view_as_real(pairs * fr).flatten(2)

    def weight(layer, name):
        return w[f'layers.{layer}.{name}.weight']

    x = w['tok_embeddings.weight'][ids]
    for i in range(p['n_layers']):
        y = norm(x, weight(i, 'attention_norm'))
        q, k, v = [(y @ weight(i, f'attention.w{o}').T).view(n, -1, hd) for o in 'qkv']
        q, k, v = turn(q), turn(k).repeat_interleave(h // kv, 1), v.repeat_interleave(h // kv, 1)
        att = torch.einsum('ahd,bhd->hab', q, k) / hd**0.5 + torch.full((n, n), float('-inf')).triu(
            1
        )
        x = (
            x
            + torch.einsum('hab,bhd->ahd', att.softmax(-1), v).flatten(1)
            @ weight(i, 'attention.wo').T
        )
        y = norm(x, weight(i, 'ffn_norm'))
        x = (
            x
            + (F.silu(y @ weight(i, 'feed_forward.w1').T) * (y @ weight(i, 'feed_forward.w3').T))
            @ weight(i, 'feed_forward.w2').T
        )
    return norm(x, w['norm.weight']) @ w['output.weight'].T


def logits(folder, ids):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            .eval()(ids[None])
            .logits[0]
        )


@pytest.mark.parametrize(
    'shards,heads',
    [(1, {}), (2, {}), (8, {}), (8, dict(n_kv_heads=None)), (2, dict(rope_theta=1e6))],
)
def test_convert_against_metas_computation(tmp_path, spm, shards, heads):
    p = {k: v for k, v in (P | heads).items() if v is not None}
    whole = random_meta(tmp_path / 'meta', spm, shards, p)
    out = convert_meta(tmp_path / 'meta', tmp_path / 'hf', shard_bytes=300_000)
    ids = torch.randint(0, 384, (50,))
    want, got = reference(whole, p, ids), logits(out, ids)
    assert (want - got).abs().max() < 1e-3 * want.abs().max()
    assert len(list(out.glob('model-*.safetensors'))) > 2 and verify(out).ok
    c = read_json(out / 'config.json')
    assert (c['vocab_size'], c['intermediate_size'], c['max_position_embeddings']) == (
        384,
        320,
        256,
    )


def test_embedding_cut_along_the_vocabulary(tmp_path, spm):
    whole = random_meta(tmp_path / 'm', spm, 2, vocab_cut=True)
    f = open_weights(convert_meta(tmp_path / 'm', tmp_path / 'hf'))[EMBED]
    assert torch.equal(f.get(EMBED), whole['tok_embeddings.weight'])


@pytest.mark.parametrize('shards', [1, 2, 8])
def test_there_and_back(tmp_path, spm, shards):
    random_meta(tmp_path / 'm', spm, 1, dtype=torch.bfloat16)
    hf = convert_meta(tmp_path / 'm', tmp_path / 'hf')
    again = convert_meta(to_meta(hf, tmp_path / 'm2', shards=shards, dtype=None), tmp_path / 'hf2')
    a, b = open_weights(hf), open_weights(again)
    assert a.keys() == b.keys() and all(
        torch.equal(a[k].get(k), b[k].get(k)) and a[k].spec(k)[0] == 'BF16' for k in a
    )
    c, d = read_json(hf / 'config.json'), read_json(again / 'config.json')
    assert c == d


def test_tied_model_to_meta(tmp_path, spm):
    random_meta(tmp_path / 'm', spm)
    hf = convert_meta(tmp_path / 'm', tmp_path / 'hf')
    w = open_weights(hf)
    write_safetensors(
        tmp_path / 't', {k: f.spec(k) for k, f in w.items() if k != HEAD}, lambda k: w[k].get(k)
    )
    (tmp_path / 't').replace(hf / 'model.safetensors')
    write_json(hf / 'config.json', read_json(hf / 'config.json') | dict(tie_word_embeddings=True))
    back = convert_meta(to_meta(hf, tmp_path / 'm2', dtype=None), tmp_path / 'hf2')
    ids = torch.arange(20)
    assert torch.equal(logits(hf, ids), logits(back, ids))


def test_dtype_and_determinism(tmp_path, spm):
    random_meta(tmp_path / 'm', spm)
    hf = convert_meta(tmp_path / 'm', tmp_path / 'hf', dtype='bfloat16')
    assert {f.spec(k)[0] for k, f in open_weights(hf).items()} == {'BF16'} and read_json(
        hf / 'config.json'
    )['torch_dtype'] == 'bfloat16'
    a, b = to_meta(hf, tmp_path / 'a'), to_meta(hf, tmp_path / 'b')
    assert (a / 'checklist.chk').read_text() == (b / 'checklist.chk').read_text()


def test_published_widths():
    assert [ffn_width(4096), ffn_width(5120), ffn_width(8192, 4096, 1.3)] == [11008, 13824, 28672]
    c = dict(
        hidden_size=128,
        intermediate_size=896,
        num_hidden_layers=1,
        num_attention_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=9,
        max_position_embeddings=64,
    )
    from llama_zh_nb.checkpoint.meta import meta_params

    p = meta_params(c)
    assert ffn_width(128, p['multiple_of'], p['ffn_dim_multiplier']) == 896


def _refused(tmp_path, call, *words):
    with pytest.raises(LlamaZhError) as e:
        call()
    assert all(w in str(e.value) for w in words), str(e.value)
    assert not (tmp_path / 'out').exists() and not list(tmp_path.glob('.out*'))


def test_broken_meta_folders(tmp_path, spm):
    def make(name, **kw):
        random_meta(tmp_path / name, spm, 2, **kw)
        return tmp_path / name

    d = make('gap')
    (d / 'consolidated.00.pth').unlink()
    _refused(tmp_path, lambda: convert_meta(d, tmp_path / 'out'), 'consolidated.00.pth missing')
    d = make('layers')
    write_json(d / 'params.json', P | dict(n_layers=3))
    _refused(tmp_path, lambda: convert_meta(d, tmp_path / 'out'), 'layers.2', 'n_layers = 3')
    d = make('dim')
    write_json(d / 'params.json', P | dict(n_kv_heads=16))
    _refused(tmp_path, lambda: convert_meta(d, tmp_path / 'out'), 'attention.wk', 'params.json')
    d = make('lfs')
    (d / 'consolidated.01.pth').write_text(
        'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n'
    )
    _refused(tmp_path, lambda: convert_meta(d, tmp_path / 'out'), 'git-LFS pointer', 'git lfs pull')
    d = make('sum')
    (d / 'checklist.chk').write_text(f'{"0" * 32} *./params.json\n')
    _refused(tmp_path, lambda: convert_meta(d, tmp_path / 'out'), 'params.json has md5')
    d = make('notok')
    (d / 'tokenizer.model').unlink()
    _refused(tmp_path, lambda: convert_meta(d, tmp_path / 'out'), 'tokenizer.model')
    d = make('code')
    torch.save({'a': Path('/')}, d / 'consolidated.00.pth')
    _refused(tmp_path, lambda: convert_meta(d, tmp_path / 'out'), 'plain tensors')
    d = make('cut')
    b = (d / 'consolidated.00.pth').read_bytes()
    (d / 'consolidated.00.pth').write_bytes(b[: len(b) // 2])
    _refused(tmp_path, lambda: convert_meta(d, tmp_path / 'out'), 'consolidated.00.pth')


@pytest.fixture
def hf(tmp_path, spm):
    random_meta(tmp_path / 'meta', spm)
    return convert_meta(tmp_path / 'meta', tmp_path / 'hf', shard_bytes=300_000)


def _edit(folder, name, change):
    f = open_weights(folder)[name]
    t = {k: f.get(k).clone() for k in f}
    t[name] = change(t[name])
    new = folder / 'edited'
    write_safetensors(new, {k: (f.spec(k)[0], tuple(v.shape)) for k, v in t.items()}, t.get)
    new.replace(f.path)


def _set(i, v):
    def change(t):
        t[i] = v
        return t

    return change


@pytest.mark.parametrize(
    'name,change,words',
    [
        (
            'model.layers.1.mlp.down_proj.weight',
            _set((3, 4), float('nan')),
            ('NaN in row 3', 'layers.1.mlp.down_proj'),
        ),
        ('model.norm.weight', _set(7, float('inf')), ('Inf in row 7', 'model.norm')),
        (
            'model.layers.1.mlp.up_proj.weight',
            _set(slice(None), 0),
            ('320 rows of zeros', 'up_proj'),
        ),
        (HEAD, _set(slice(10, 12), 0), ('2 rows of zeros', 'row 10', HEAD)),
        (
            'model.layers.0.self_attn.k_proj.weight',
            lambda t: t[:-8],
            ('(56, 128)', '(64, 128)', 'k_proj'),
        ),
        (EMBED, lambda t: t[:0], ('0 rows', 'ZeRO-3')),
    ],
)
def test_verify_names_what_and_where(hf, name, change, words):
    assert verify(hf).ok
    _edit(hf, name, change)
    with pytest.raises(LlamaZhError) as e:
        verify(hf).check()
    assert all(w in str(e.value) for w in words), str(e.value)


def test_unused_rows_within_a_layer_are_noted(hf):
    _edit(hf, 'model.layers.0.self_attn.q_proj.weight', _set(slice(3, 5), 0))
    rep = verify(hf).check()
    assert [d for _, s, d in rep.rows if s == 'note'] == [
        'model.layers.0.self_attn.q_proj.weight has 2 rows of zeros, the first is row 3'
    ]


def test_padding_rows_may_be_zero(hf):
    _edit(hf, EMBED, _set(slice(340, 384), 0))
    assert verify(hf).ok


def test_verify_files(hf):
    f = next(hf.glob('model-00002-of-*'))
    shutil.copyfile(f, hf / 'model-99999.safetensors')
    assert 'model-99999.safetensors is not in the index' in verify(hf).problems[0]
    f.write_bytes(f.read_bytes()[:-10])
    assert 'cut off' in verify(hf).problems[0]
    f.write_text('<!DOCTYPE html><html>')
    assert 'an HTML page' in verify(hf).problems[0]
    f.unlink()
    assert f.name in verify(hf).problems[0] and 'missing' in verify(hf).problems[0]
    assert '✗' in verify(hf)._repr_html_()


def _index(hf, change):
    j = read_json(hf / 'model.safetensors.index.json')
    change(j['weight_map'])
    write_json(hf / 'model.safetensors.index.json', j)


def _problem(folder, *words):
    rep = verify(folder)
    assert not rep.ok and all(w in ' '.join(rep.problems) for w in words), rep.problems
    return rep


def test_verify_index_against_files(hf):
    up = 'model.layers.1.mlp.up_proj.weight'
    _index(hf, lambda m: m.update({up: m[EMBED]}))
    _problem(hf, 'index.json', up, 'not there')


def test_verify_tensors_missing_and_strange(hf):
    gone = 'model.layers.0.mlp.up_proj.weight'
    _index(hf, lambda m: m.pop(gone))
    _problem(hf, f'{gone} is missing', f'{gone} in model-', 'not in the index')
    write_json(hf / 'config.json', read_json(hf / 'config.json') | dict(num_hidden_layers=1))
    _problem(hf, 'model.layers.1.self_attn.q_proj.weight is not a part of this model')


@pytest.mark.parametrize(
    'dtype,ok', [(torch.int8, False), (torch.float64, True), (torch.bfloat16, True)]
)
def test_verify_dtype(hf, dtype, ok):
    "Whole numbers are named as wrong, other kinds of numbers only as a mixture"
    name = 'model.layers.1.mlp.up_proj.weight'
    f = open_weights(hf)[name]
    t = {k: f.get(k).clone() for k in f}
    t[name] = (t[name] * 30).to(dtype)
    code = {torch.int8: 'I8', torch.float64: 'F64', torch.bfloat16: 'BF16'}[dtype]
    write_safetensors(
        hf / 'new', {k: (code if k == name else 'F32', tuple(v.shape)) for k, v in t.items()}, t.get
    )
    (hf / 'new').replace(f.path)
    if ok:
        assert [(s, f'1 in {code}' in d) for w, s, d in verify(hf).rows if w == 'dtype'] == [
            ('note', True)
        ]
    else:
        _problem(hf, '1 in I8', 'quantized')


def test_verify_more_pieces_than_rows(hf, shared):
    from llama_zh_nb.tokenizer.exact import save_tokenizer

    save_tokenizer(shared / 'data/tokenizers/llama2_32000.model', hf)
    _problem(hf, 'tokenizer 32,000 pieces', '384 rows', 'more pieces than the model has rows')


def test_verify_meta_folder_and_its_sums(tmp_path, hf):
    meta = to_meta(hf, tmp_path / 'm', shards=2)
    assert verify(meta).ok
    f = meta / 'consolidated.01.pth'
    blob = bytearray(f.read_bytes())
    blob[-5000] ^= 1
    f.write_bytes(blob)
    _problem(meta, 'md5', 'consolidated.01.pth has md5')
    (meta / 'tokenizer.model').unlink()
    _problem(meta, 'tokenizer.model is listed in checklist.chk, but missing')


def test_verify_nothing_there(tmp_path, spm):
    (tmp_path / 'empty').mkdir()
    for d, word in (
        (tmp_path / 'empty', 'nothing'),
        (tmp_path / 'none', 'neither config.json'),
        (spm, 'neither'),
    ):
        _problem(d, word)


def test_size_check_names_every_number(hf, shared):
    with pytest.raises(LlamaZhError) as e:
        check_sizes(hf, shared / 'data/tokenizers/llama2_32000.model')
    assert all(w in str(e.value) for w in ('vocab_size 384', '384 rows', '32,000', "Llama-2's")), (
        str(e.value)
    )
    write_json(hf / 'config.json', read_json(hf / 'config.json') | dict(vocab_size=383))
    with pytest.raises(LlamaZhError, match='different models'):
        check_sizes(hf)


def test_packaged_mini(tmp_path):
    packaged('mini')
    out = acquire('mini', tmp_path / 'out')
    assert verify(out).ok and (out / 'tokenizer.json').exists()


def test_acquire_folders(tmp_path, hf):
    (hf / 'chat_template.jinja').write_text('{{ messages }}')
    (hf / 'LICENSE.txt').write_text('terms')
    out = acquire(hf, tmp_path / 'out', link=True)
    a, b = open_weights(hf), open_weights(out)
    assert (
        all(a[k].path.samefile(b[k].path) for k in a)
        and (out / 'chat_template.jinja').read_text() == '{{ messages }}'
        and (out / 'LICENSE.txt').exists()
    )
    assert not any(
        f.path.samefile(a[k].path) for k, f in open_weights(acquire(hf, tmp_path / 'copy')).items()
    )
    state = {k: f.get(k) for k, f in a.items()} | {
        'model.layers.0.self_attn.rotary_emb.inv_freq': torch.ones(4)
    }
    old = tmp_path / 'old'
    old.mkdir()
    for n in ('config.json', 'tokenizer.model'):
        shutil.copyfile(hf / n, old / n)
    torch.save(state, old / 'pytorch_model.bin')
    c = open_weights(acquire(old, tmp_path / 'frombin'))
    assert c.keys() == a.keys() and all(torch.equal(c[k].get(k), state[k]) for k in c)


def test_acquire_refuses(tmp_path, hf, spm):
    for source, words in (
        (tmp_path / 'nowhere', ('no such folder', 'Hub id')),
        (spm, ('a SentencePiece model', 'folder')),
        (tmp_path, ('neither config.json', 'meta')),
    ):
        _refused(tmp_path, partial(acquire, source, tmp_path / 'out'), *words)
    _edit(hf, 'model.norm.weight', _set(0, float('nan')))
    _refused(tmp_path, lambda: acquire(hf, tmp_path / 'out'), 'NaN', str(hf))
    write_json(hf / 'config.json', read_json(hf / 'config.json') | dict(model_type='qwen2'))
    _refused(tmp_path, lambda: acquire(hf, tmp_path / 'out'), "'qwen2'")
    (hf / 'tokenizer.model').unlink()
    write_json(hf / 'config.json', read_json(hf / 'config.json') | dict(model_type='llama'))
    _refused(tmp_path, lambda: acquire(hf, tmp_path / 'out'), 'no tokenizer.model')


class Hub(http.server.BaseHTTPRequestHandler):
    "As much of the Hub as a download needs; `folder` is what it serves, names decide what it refuses, files in `cut` break off in the middle."

    folder, seen, cut = None, [], set()

    def log_message(self, *a):
        pass

    def do_HEAD(self):
        self.do_GET(False)

    def do_GET(self, body=True):
        self.seen.append((self.path, self.headers.get('Authorization'), self.headers.get('Range')))
        if 'gated401' in self.path:
            return self.reply(401, b'{}', {'X-Error-Code': 'GatedRepo'}, body)
        if 'gated' in self.path:
            return self.reply(403, b'{}', {'X-Error-Code': 'GatedRepo'}, body)
        if 'nobody' in self.path:
            return self.reply(404, b'{}', {'X-Error-Code': 'RepoNotFound'}, body)
        if 'norev' in self.path:
            return self.reply(404, b'{}', {'X-Error-Code': 'RevisionNotFound'}, body)
        if 'locked' in self.path:
            return self.reply(401, b'{}', {}, body)
        if 'badtoken' in self.path:
            return self.reply(
                401, b'{}', {'X-Error-Message': 'Invalid credentials in Authorization header'}, body
            )
        if 'forbidden' in self.path:
            return self.reply(403, b'{}', {}, body)
        if 'broken' in self.path:
            return self.reply(500, b'{}', {}, body)
        files, sha = sorted(p.name for p in self.folder.iterdir()), 'a' * 40
        if self.path.startswith('/api/') and '/tree/' in self.path:
            return self.reply(
                200,
                json.dumps(
                    [
                        dict(
                            type='file', path=f, size=(self.folder / f).stat().st_size, oid='b' * 40
                        )
                        for f in files
                    ]
                ).encode(),
                {},
                body,
            )
        if self.path.startswith('/api/'):
            return self.reply(
                200,
                json.dumps(
                    dict(
                        id='some/model',
                        sha=sha,
                        siblings=[dict(rfilename=f) for f in files],
                        private=False,
                        tags=[],
                        downloads=0,
                    )
                ).encode(),
                {},
                body,
            )
        name = self.path.split('/')[-1].split('?')[0]
        data, extra = (self.folder / name).read_bytes(), {'ETag': f'"{name}"', 'X-Repo-Commit': sha}
        start = int((self.headers.get('Range') or 'bytes=0-')[6:].split('-')[0])
        if name in self.cut and body and start:
            return self.reply(503, b'', {}, body)
        if start:
            return self.reply(
                206,
                data[start:],
                extra | {'Content-Range': f'bytes {start}-{len(data) - 1}/{len(data)}'},
                body,
            )
        self.reply(200, data, extra, body, len(data) // 2 if name in self.cut else None)
        return None

    def reply(self, code, data, headers, body, most=None):
        self.send_response(code)
        for k, v in (
            headers | {'Content-Length': str(len(data)), 'Content-Type': 'application/json'}
        ).items():
            self.send_header(k, v)
        self.end_headers()
        if body:
            self.wfile.write(data[:most])
        if most:
            self.close_connection = True


@pytest.fixture
def hub(tmp_path, monkeypatch, hf):
    import huggingface_hub as h
    import huggingface_hub.constants

    Hub.folder, Hub.seen, Hub.cut = hf, [], set()
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for k, v in dict(
        HF_ENDPOINT=f'http://127.0.0.1:{server.server_port}', HF_TOKEN='hf_secret'
    ).items():
        monkeypatch.setenv(k, v)
    for k in ('http_proxy', 'https_proxy', 'all_proxy', 'HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY'):
        monkeypatch.delenv(k, raising=False)
    monkeypatch.setattr(h.constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(h.constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    'repo,words',
    [
        (
            'meta/gated-llama',
            ('gated', 'licence', 'https://huggingface.co/meta/gated-llama', 'HF_TOKEN'),
        ),
        ('nobody/nothing', ("no model 'nobody/nothing'", 'spelling')),
        ('meta/gated401', ('gated', 'HTTP 401', 'licence', 'HF_TOKEN')),
        ('some/locked', ('401', 'HF_TOKEN')),
        ('some/badtoken', ('HTTP 401', 'token is wrong', 'HF_TOKEN')),
        ('some/forbidden', ('HTTP 403', 'right to read', 'HF_TOKEN')),
        ('some/norev@v9', ('not this revision', 'commits')),
        ('some/broken', ('HTTP 500', 'later', 'HF_ENDPOINT')),
    ],
)
def test_hub_refusals(tmp_path, hub, repo, words):
    _refused(tmp_path, lambda: acquire(repo, tmp_path / 'out'), *words)


def test_hub_download_from_a_mirror(tmp_path, hub, hf):
    (hf / 'pytorch_model.bin').write_bytes(b'not wanted')
    (hf / 'optimizer.pt').write_bytes(b'not wanted')
    out = acquire('some/model', tmp_path / 'out')
    a, b = open_weights(hf), open_weights(out)
    assert all(torch.equal(a[k].get(k), b[k].get(k)) for k in a)
    asked = {p.split('/')[-1] for p, *_ in Hub.seen}
    assert (
        'config.json' in asked
        and not asked & {'pytorch_model.bin', 'optimizer.pt'}
        and all(t == 'Bearer hf_secret' for _, t, _ in Hub.seen)
    )
    hub.shutdown()
    hub.server_close()
    assert verify(
        acquire('some/model', tmp_path / 'again')
    ).ok  # from the cache, nobody answers any more


def test_a_broken_download_goes_on_where_it_stopped(tmp_path, hub, hf, monkeypatch):
    import time

    import huggingface_hub as h
    import huggingface_hub.constants

    monkeypatch.setattr(time, 'sleep', lambda s: None)  # the client waits before it tries again,
    monkeypatch.setattr(h.constants, 'DOWNLOAD_CHUNK_SIZE', 1000)  # and writes pieces of 10 MB
    name = max(hf.glob('*.safetensors'), key=lambda p: p.stat().st_size).name
    Hub.cut = {name}
    _refused(tmp_path, lambda: acquire('some/model', tmp_path / 'out'), 'some/model')
    Hub.cut, Hub.seen = set(), []
    out = acquire('some/model', tmp_path / 'out')
    assert f'bytes={(hf / name).stat().st_size // 2000 * 1000}-' in [
        r for p, _, r in Hub.seen if name in p
    ] and not [r for p, _, r in Hub.seen if name not in p and r]
    a, b = open_weights(hf), open_weights(out)
    assert all(torch.equal(a[k].get(k), b[k].get(k)) for k in a)


def test_errors_in_the_middle_of_a_download(tmp_path, hub, monkeypatch):
    import errno

    import huggingface_hub as h

    def failing(error):
        def fail(*a, **k):
            raise error

        return fail

    for error, words in (
        (OSError(errno.ENOSPC, 'No space left'), ('no space left', 'HF_HOME')),
        (
            OSError('Consistency check failed: file should be of size 9'),
            ('broke off', 'same command'),
        ),
    ):
        monkeypatch.setattr(h, 'snapshot_download', failing(error))
        _refused(tmp_path, lambda: acquire('some/model', tmp_path / 'out'), *words)


def test_hub_unreachable(tmp_path, hub):
    hub.shutdown()
    hub.server_close()
    _refused(
        tmp_path,
        lambda: acquire('some/model', tmp_path / 'out'),
        'cannot be reached',
        'HF_ENDPOINT',
        'local folder',
    )


def test_hub_offline(tmp_path):
    _refused(
        tmp_path,
        lambda: acquire('nobody/never-was', tmp_path / 'out'),
        'HF_HUB_OFFLINE',
        'local folder',
    )


def test_modelscope(tmp_path, hf, monkeypatch):
    import sys
    import types

    ms = types.ModuleType('modelscope')
    ms.snapshot_download = lambda repo, revision='master': (
        str(hf) if repo == 'some/model' and revision in ('master', 'v2') else 1 / 0
    )
    monkeypatch.setitem(sys.modules, 'modelscope', ms)
    assert (
        verify(acquire('modelscope:some/model', tmp_path / 'ok')).ok
        and verify(acquire('modelscope:some/model@v2', tmp_path / 'ok2')).ok
    )
    _refused(tmp_path, lambda: acquire('modelscope:no/model', tmp_path / 'out'), 'ModelScope')
    monkeypatch.setitem(sys.modules, 'modelscope', None)
    _refused(
        tmp_path,
        lambda: acquire('modelscope:some/model', tmp_path / 'out'),
        'pip install',
        'modelscope',
    )


def test_real_small_model(shared, tmp_path):
    src = shared / 'data/models/stories260K_hf'
    out = acquire(src, tmp_path / 'out')
    ids = torch.randint(0, 512, (30,))
    assert torch.equal(logits(src, ids), logits(out, ids))
    meta = convert_meta(to_meta(out, tmp_path / 'meta', shards=2, dtype=None), tmp_path / 'hf')
    assert torch.allclose(logits(src, ids), logits(meta, ids), atol=1e-4)


def test_no_file_stays_open_or_mapped(tmp_path):
    f = tmp_path / 'a.bin'
    torch.save({f'w{i}': torch.randn(1000) for i in range(10)}, f)
    t = TorchFile(f, keep=8000)
    assert all(t.get(k).shape == (1000,) for k in t)
    write_safetensors(tmp_path / 'b', {k: t.spec(k) for k in t}, t.get)
    s = SafeFile(tmp_path / 'b')
    assert (
        torch.equal(s.get('w3', slice(10, 20)), t.get('w3')[10:20])
        and len(b''.join(s.raw('w3', slice(2, 5)))) == 12
    )


def test_nothing_replaces_what_it_is_made_from(tmp_path, hf):
    for call in (
        lambda: acquire(hf, hf),
        lambda: acquire(hf, tmp_path),
        lambda: convert_meta(tmp_path / 'meta', tmp_path / 'meta'),
        lambda: convert_meta(tmp_path / 'meta', tmp_path),
    ):
        _refused(tmp_path, call, 'another folder')
    assert verify(hf).ok and verify(tmp_path / 'meta').ok


def test_convert_says_what_it_got(tmp_path, hf):
    _refused(
        tmp_path,
        lambda: convert_meta(hf, tmp_path / 'out'),
        'a Hugging Face folder already',
        'weights get',
    )
    _refused(tmp_path, lambda: convert_meta(tmp_path / 'none', tmp_path / 'out'), 'no params.json')
    _refused(
        tmp_path, lambda: convert_meta(tmp_path / 'meta', tmp_path / 'out', dtype='int3'), 'int3'
    )
