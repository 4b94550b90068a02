"""Training that can be trusted: packed equals alone, killed equals undisturbed, old rows stay, adapters know their base."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny import HELD, OLD, ZH, make, small, tensors

from llama_zh_nb.checkpoint.adapter import check_adapter
from llama_zh_nb.checkpoint.folder import (
    check_sizes,
    new_rows,
    rewrite,
)
from llama_zh_nb.checkpoint.merge import merge_adapter
from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.core.machine import quiet
from llama_zh_nb.core.settings import ComputeArgs
from llama_zh_nb.pretrain import pretrain
from llama_zh_nb.training.trainer import History, last_checkpoint

torch = pytest.importorskip('torch')
pytest.importorskip('peft')
os.environ['LLAMA_ZH_PROGRESS'] = '0'

CPU = ComputeArgs(device='cpu')


@pytest.fixture(scope='session')
def base(tmp_path_factory):
    return make(tmp_path_factory.mktemp('tiny') / 'base')


@pytest.fixture(scope='session')
def done(base, tmp_path_factory):
    out = tmp_path_factory.mktemp('run') / 'whole'
    return out, pretrain(base, ZH, out, **small())


def test_learns_and_leaves_a_plain_folder(base, done):
    out, h = done
    assert h.last('zh_bpc') < h.first('zh_bpc') and h.last('step') == 12 and h.first('tokens') == 0
    assert [r['step'] for r in h if 'zh_bpc' in r] == [0, 4, 8, 12] and History.load(
        out / 'history.json'
    ) == h
    assert (
        not (out / 'checkpoints').exists() and check_sizes(out).config == check_sizes(base).config
    )
    assert '<table>' in h._repr_html_() and len(h.plot().axes) == 3


def test_merged_folder_measures_as_the_run_said(done):
    from llama_zh_nb.checkpoint.folder import load
    from llama_zh_nb.evals.measure import bits

    out, h = done
    with quiet():
        m, tok = load(out, 'cpu')
    assert abs(bits(m, tok, HELD['zh']).bpc - h.last('zh_bpc')) < 1e-5


def test_old_rows_stay_bit_for_bit(base, done):
    a, b = tensors(base), tensors(done[0])
    for k in ('model.embed_tokens.weight', 'lm_head.weight'):
        assert (
            torch.equal(a[k][:OLD], b[k][:OLD])
            and not torch.equal(a[k][OLD:150], b[k][OLD:150])
            and torch.equal(a[k][150:], b[k][150:])
        )


def test_done_is_not_done_again(base, done, capsys):
    out, h = done
    before = (out / 'model.safetensors').stat().st_mtime_ns
    assert pretrain(base, ZH, out, **small()) == h and 'done before' in capsys.readouterr().out
    assert (out / 'model.safetensors').stat().st_mtime_ns == before


KILL = """
import sys, os, signal
sys.path.insert(0, {tests!r})
import torch; torch.set_num_threads({threads})
import helpers.tiny as t, llama_zh_nb.pretrain as p
class Dies(p.BlockCollate):
    n = 0
    def __call__(self, rows):
        Dies.n += 1
        if Dies.n == 11: os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(rows)
p.BlockCollate = Dies
p.pretrain({base!r}, t.ZH, {out!r}, **t.small())
"""


@pytest.mark.skipif(os.name == 'nt', reason='needs SIGKILL')
def test_kill_9_and_resume_is_bit_identical(base, done, tmp_path, capsys):
    whole, h = done
    code = KILL.format(
        tests=str(Path(__file__).parent),
        base=str(base),
        out=str(tmp_path / 'cut'),
        threads=torch.get_num_threads(),
    )
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
    assert p.returncode == -signal.SIGKILL, p.stderr[-2000:]
    assert (
        last_checkpoint(tmp_path / 'cut' / 'checkpoints').name == 'checkpoint-8'
        and not (tmp_path / 'cut' / 'config.json').exists()
    )
    (
        tmp_path / 'cut' / 'checkpoints' / 'checkpoint-99'
    ).mkdir()  # as a process leaves that was killed while writing
    h2 = pretrain(base, ZH, tmp_path / 'cut', **small())
    assert 'resuming from checkpoint-8' in capsys.readouterr().out
    for k in ('loss', 'zh_bpc', 'en_bpb', 'lr', 'grad_norm'):
        assert h.column(k) == h2.column(k), k
    assert (whole / 'model.safetensors').read_bytes() == (
        tmp_path / 'cut' / 'model.safetensors'
    ).read_bytes()
    assert (whole / 'adapter' / 'adapter_model.safetensors').read_bytes() == (
        tmp_path / 'cut' / 'adapter' / 'adapter_model.safetensors'
    ).read_bytes()


@pytest.mark.parametrize('train', ['lora+embed', 'embed', 'full', 'lora'])
def test_other_things_to_train(base, tmp_path, train):
    h = pretrain(
        base,
        ZH,
        tmp_path / 'o',
        **small(train=train, max_steps=4, replay_corpus=None, save_every=None),
    )
    a, b = tensors(base), tensors(tmp_path / 'o')
    moved = {k for k in a if not torch.equal(a[k], b[k])}
    emb, norms = {'model.embed_tokens.weight', 'lm_head.weight'}, {k for k in a if 'norm' in k}
    assert (
        moved
        == {
            'lora+embed': set(a) - norms,
            'embed': emb,
            'full': set(a),
            'lora': set(a) - norms - emb,
        }[train]
    )
    assert (tmp_path / 'o' / 'adapter').exists() == train.startswith('lora') and h.last(
        'zh_bpc'
    ) < h.first('zh_bpc')


def test_accumulation_equals_the_large_batch(base, tmp_path):
    kw = dict(max_steps=4, lora_dropout=0.0, save_every=None, log_every=1)
    a = pretrain(base, ZH, tmp_path / 'a', **small(**kw))
    b = pretrain(base, ZH, tmp_path / 'b', **small(**kw | dict(batch=1, accum=4)))
    assert np.allclose(a.column('loss')[1], b.column('loss')[1], atol=1e-5)
    x, y = tensors(tmp_path / 'a'), tensors(tmp_path / 'b')
    assert all(torch.allclose(x[k], y[k], atol=1e-4) for k in x)


def test_gradient_checkpointing_changes_nothing(base, tmp_path):
    kw = dict(max_steps=3, lora_dropout=0.0, save_every=None, log_every=1)
    a, b = (
        pretrain(base, ZH, tmp_path / str(g), **small(**kw | dict(gradient_checkpointing=g)))
        for g in (False, True)
    )
    assert np.allclose(a.column('loss')[1], b.column('loss')[1], atol=1e-6)


def test_two_stages(base, tmp_path, capsys):
    kw = dict(max_steps=4, save_every=None, embed_steps=3, log_every=1, replay_corpus=None)
    h = pretrain(base, ZH, tmp_path / 'o', **small(**kw))
    assert (
        h.column('loss')[0] == [1, 2, 3, 4, 5, 6, 7]
        and h.last('tokens') == 7 * 4 * 64
        and h.last('zh_bpc') < h.first('zh_bpc')
    )
    a, b, c = (tensors(p) for p in (base, tmp_path / 'o' / 'embed', tmp_path / 'o'))
    emb = {'model.embed_tokens.weight', 'lm_head.weight'}
    assert {k for k in a if not torch.equal(a[k], b[k])} == emb and all(
        torch.equal(b[k][:OLD], c[k][:OLD]) for k in emb
    )
    check_adapter(tmp_path / 'o' / 'adapter', tmp_path / 'o' / 'embed')
    assert (
        pretrain(base, ZH, tmp_path / 'o', **small(**kw)) == h
        and capsys.readouterr().out.count('done before') == 2
    )


def test_speed_and_tensorboard(base, tmp_path):
    pytest.importorskip('tensorboard')
    h = pretrain(base, ZH, tmp_path / 'o', **small(max_steps=4, save_every=None, report_to='auto'))
    assert len(h.column('tokens_per_second')[1]) == 2 and all(
        v > 0 for v in h.column('tokens_per_second')[1]
    )
    assert list((tmp_path / 'o' / 'tensorboard').glob('events*'))


def test_two_learning_rates(base, tmp_path):
    pretrain(
        base,
        ZH,
        tmp_path / 'e',
        **small(max_steps=2, save_every=None, lr=1e-9, embed_lr=1e-2, weight_decay=0.0),
    )
    a, b = tensors(base), tensors(tmp_path / 'e')
    d = {k: (a[k] - b[k]).abs().max() for k in a}
    assert d['lm_head.weight'] > 1e-3 and d['model.layers.0.mlp.up_proj.weight'] < 1e-5


def test_stops_at_nan_and_names_the_step(base, tmp_path):
    bad = rewrite(
        base,
        {'lm_head.weight': lambda w: w.index_fill(0, torch.tensor([80]), float('nan'))},
        tmp_path / 'bad',
    )
    with pytest.raises(LlamaZhError, match=r'nan at step 1, in the batch of rows \[\d+'):
        pretrain(bad, ZH, tmp_path / 'o', **small(heldout={}))
    assert not (tmp_path / 'o' / 'config.json').exists()


def test_folder_without_new_rows_says_so(base, tmp_path, capsys):
    plain = shutil.copytree(base, tmp_path / 'plain', ignore=shutil.ignore_patterns('resize.json'))
    h = pretrain(plain, ZH, tmp_path / 'o', **small(max_steps=2))
    assert 'no new rows' in capsys.readouterr().out and h.info['train'] == 'lora'


# ---- refusals


def test_sizes_that_disagree_are_all_named(base, tmp_path):
    bad = make(tmp_path / 'bad', rows=2000)
    with pytest.raises(LlamaZhError, match='2,000.*150 pieces'):
        pretrain(bad, ZH, tmp_path / 'o', **small())
    bad = shutil.copytree(base, tmp_path / 'bad2')
    c = json.loads((bad / 'config.json').read_text())
    (bad / 'config.json').write_text(json.dumps(c | dict(vocab_size=160)))
    with pytest.raises(LlamaZhError, match='vocab_size 160.*152 rows.*150 pieces'):
        check_sizes(bad)


def test_what_cannot_be_done_is_said(base, tmp_path):
    with pytest.raises(LlamaZhError, match='CUDA'):
        pretrain(base, ZH, tmp_path / 'o', **small(load_in_4bit=True))
    with pytest.raises(LlamaZhError, match='lora\\+new'):
        pretrain(base, ZH, tmp_path / 'o', **small(train='lora+nwe'))
    with pytest.raises(LlamaZhError, match='config.json'):
        pretrain(tmp_path, ZH, tmp_path / 'o', **small())
    with pytest.raises(LlamaZhError, match='not within'):
        new_rows(base, (0, 999))


def test_adapter_knows_its_base(base, done, tmp_path):
    a = done[0] / 'adapter'
    check_adapter(a, base)
    other = make(tmp_path / 'other', seed=1)
    with pytest.raises(LlamaZhError, match='trained on weights'):
        merge_adapter(other, a, tmp_path / 'm')
    (other / 'tokenizer.json').write_text(
        (other / 'tokenizer.json').read_text().replace('春天', '秋天')
    )
    with pytest.raises(LlamaZhError, match='tokenizer'):
        merge_adapter(other, a, tmp_path / 'm')
    assert not (tmp_path / 'm').exists()


def test_useless_adapters_are_refused(base, done, tmp_path):
    from safetensors.torch import load_file, save_file

    a = shutil.copytree(done[0] / 'adapter', tmp_path / 'a')
    f, state = (
        a / 'adapter_model.safetensors',
        load_file(done[0] / 'adapter' / 'adapter_model.safetensors'),
    )
    for bad, why in (
        ({}, '0 tensors'),
        ({k: v * 0 for k, v in state.items()}, 'every lora_B is zero'),
        (state | {next(iter(state)): next(iter(state.values())) * float('nan')}, 'NaN'),
    ):
        save_file(bad, f)
        with pytest.raises(LlamaZhError, match=why):
            merge_adapter(base, a, tmp_path / 'm')
    f.unlink()
    with pytest.raises(LlamaZhError, match='not an adapter folder'):
        merge_adapter(base, a, tmp_path / 'm')
