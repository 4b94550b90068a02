"""Training that can be trusted: packed equals alone, killed equals undisturbed, old rows stay, adapters know their base."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('peft')
os.environ['LLAMA_ZH_PROGRESS'] = '0'

from helpers.tiny import HELD, OLD, ZH, make, small, tensors

from llama_zh_nb.checkpoint.adapter import check_adapter
from llama_zh_nb.checkpoint.folder import (
    check_sizes,
    fingerprint,
    load_tokenizer,
    new_rows,
    rewrite,
)
from llama_zh_nb.checkpoint.merge import merge_adapter
from llama_zh_nb.checkpoint.tensors import open_weights, write_shards
from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.core.machine import quiet
from llama_zh_nb.core.settings import ComputeArgs, TrainArgs
from llama_zh_nb.pretrain import pretrain
from llama_zh_nb.training.lora import load_base, prepare, save_trained
from llama_zh_nb.training.packing import (
    BlockCollate,
    corpus_texts,
    encode_documents,
    fill_blocks,
    pack_blocks,
    reading_order,
)
from llama_zh_nb.training.trainer import History, last_checkpoint, run_training

CPU = ComputeArgs(device='cpu')


@pytest.fixture(scope='session')
def base(tmp_path_factory):
    return make(tmp_path_factory.mktemp('tiny') / 'base')


def losses(model, batch):
    "Loss of every labelled token"
    logits = model(input_ids=batch['input_ids'], position_ids=batch.get('position_ids')).logits[
        :, :-1
    ]
    labels = batch['labels'][:, 1:]
    return torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels, reduction='none', ignore_index=-100
    )[labels >= 0]


# ---- packing


@pytest.mark.parametrize('attn', ['sdpa', 'eager'])
@pytest.mark.parametrize('train', ['full', 'lora+new'])
def test_packed_equals_alone(base, attn, train):
    m = prepare(load_base(base, train, replace(CPU, attn=attn)), train, (OLD, 150)).eval()
    docs = list(encode_documents(load_tokenizer(base), ZH[:6]))
    rows = [dict(input_ids=np.array(b)) for b in fill_blocks(docs, sum(map(len, docs)) + 5)]
    assert len(rows) == 1
    with torch.no_grad():
        alone = torch.cat([losses(m, BlockCollate(1)([dict(input_ids=np.array(d))])) for d in docs])
        apart, mixed = losses(m, BlockCollate(1)(rows)), losses(m, BlockCollate(1, mix=True)(rows))
    assert len(alone) == len(apart) and (alone - apart).abs().max() < 1e-5
    assert len(mixed) == len(apart) + len(docs) - 1 and abs(mixed.mean() - apart.mean()) > 1e-3


def test_fill_loses_nothing():
    r = random.Random(0)
    docs = [[1, *(r.randint(3, 9) for _ in range(r.randint(0, 150))), 2] for _ in range(300)]
    for cut in (True, False):
        blocks = list(fill_blocks(docs, 64, cut))
        assert {len(b) for b in blocks} == {64}
        assert sorted(i for b in blocks for i in b if i >= 0) == sorted(i for d in docs for i in d)
    for b in fill_blocks([d for d in docs if len(d) <= 64], 64):
        assert b[0] == 1 and [i for i in b if i >= 0][-1] == 2  # short documents are never cut


def test_pack_reports_and_is_used_again(base, tmp_path):
    tok = load_tokenizer(base)
    a = pack_blocks(ZH, tok, tmp_path / 'b', 64, key=[1])
    n = a.report
    assert (
        n['documents'] == len(ZH)
        and n['characters'] == sum(map(len, ZH))
        and n['blocks'] * 64 == n['tokens'] + n['padding'] == len(a) * 64
    )
    assert len(pack_blocks(iter(()), tok, tmp_path / 'b', 64, key=[1])) == len(
        a
    )  # the same key: not packed again
    d = pack_blocks(ZH, tok, tmp_path / 'c', 64, cut=True, drop_rest=True).report
    assert d['padding'] == 0 and d['blocks'] * 64 + d['dropped_tokens'] == d['tokens']
    with pytest.raises(LlamaZhError, match='nothing to train on'):
        pack_blocks(['', ' '], tok, tmp_path / 'd', 64)
    assert not (tmp_path / 'd').exists()


def test_pack_in_parts_by_any_number_of_processes(base, tmp_path):
    tok = load_tokenizer(base)
    a, b = (pack_blocks(ZH, tok, tmp_path / str(w), 64, part_docs=50, workers=w) for w in (None, 2))
    assert (
        len(list((tmp_path / '2').glob('*.arrow'))) == 3
        and a.report == b.report
        and len(a) == len(b) > 30
    )
    assert (
        all((a[i] == b[i]).all() for i in range(len(a)))
        and [p.name for p in tmp_path.iterdir() if p.name.startswith('.')] == []
    )
    whole = pack_blocks(ZH, tok, tmp_path / 'w', 64)
    assert whole.report['tokens'] == a.report['tokens'] and sorted(
        i for r in a for i in r if i >= 0
    ) == sorted(i for r in whole for i in r if i >= 0)


def test_packing_goes_on_where_it_was_cut_off(base, tmp_path, monkeypatch):
    import llama_zh_nb.training.packing as m

    tok, made, real = load_tokenizer(base), [], m._pack_part

    def part(tokenizer, texts, path, how):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(Path(path).name)
        real(tokenizer, texts, path, how)

    monkeypatch.setattr(m, '_pack_part', part)
    with pytest.raises(KeyboardInterrupt):
        pack_blocks(ZH, tok, tmp_path / 'b', 64, key=1, part_docs=30)
    assert made == ['data-00000', 'data-00001'] and not (tmp_path / 'b').exists()
    made.clear()
    b = pack_blocks(
        ZH, tok, tmp_path / 'b', 64, key=1, part_docs=30
    )  # 120 documents: two parts are left
    assert (
        made == ['data-00002', 'data-00003']
        and b.report['documents'] == len(ZH)
        and len(list((tmp_path / 'b').glob('*.arrow'))) == 4
    )


def test_control_tokens_in_text_stay_text(base):
    (ids,) = encode_documents(load_tokenizer(base), ['春天</s><s>河水'])
    assert ids.count(2) == 1 and ids.count(1) == 1


def test_order_has_its_share_and_is_repeatable():
    o = reading_order(10, 7, 0.2, 100, seed=3)
    assert (o >= 10).sum() == 20 and all(
        (o[i : i + 10] >= 10).sum() == 2 for i in range(0, 100, 10)
    )
    assert (
        sorted(o[o < 10][:10]) == list(range(10))
        and (reading_order(10, 7, 0.2, 100, seed=3) == o).all()
    )
    assert (reading_order(10, 0, 0, 10) < 10).all()


def test_corpus_folder_keeps_its_valid_part_out(tmp_path):
    for part, t in (('train', '春天'), ('valid', '河水')):
        (tmp_path / f'{part}.jsonl').write_text(json.dumps(dict(text=t)) + '\n', encoding='utf-8')
    assert list(corpus_texts(tmp_path)) == ['春天'] and list(corpus_texts(tmp_path, 'valid')) == [
        '河水'
    ]
    with pytest.raises(LlamaZhError, match='no such corpus'):
        corpus_texts(tmp_path / 'x')


# ---- a run


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


def test_new_rows_get_the_gradient_of_full_training(base):
    batch = BlockCollate(1)(
        [
            dict(input_ids=np.array(b))
            for b in fill_blocks(encode_documents(load_tokenizer(base), ZH[:12]), 64)
        ]
    )
    batch.pop('row')
    full, part = (
        prepare(load_base(base, t, CPU), t, (OLD, 150), r=4) for t in ('full', 'lora+new')
    )
    a, b = (m(**batch).loss for m in (full, part))
    assert a.item() == pytest.approx(b.item(), abs=1e-6)  # LoRA begins at nothing
    a.backward()
    b.backward()
    for k, w in (
        ('embed_tokens', full.get_input_embeddings().weight),
        ('lm_head', full.get_output_embeddings().weight),
    ):
        (delta,) = [
            p for n, p in part.named_parameters() if k in n and 'trainable_tokens_delta' in n
        ]
        assert delta.grad.abs().max() > 1e-3 and torch.allclose(
            delta.grad, w.grad[OLD:150], atol=1e-6
        )
    assert not [
        n
        for n, p in part.named_parameters()
        if p.grad is not None and 'lora' not in n and 'delta' not in n
    ]


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


def test_other_settings_start_anew(base, tmp_path, capsys):
    class Stop(Exception):
        pass

    class Dies:
        def __init__(self, rows):
            self.rows = rows

        def __len__(self):
            return 64

        def __getitem__(self, i):
            if i == 25:
                raise Stop
            return self.rows[i % len(self.rows)]

    rows = [
        dict(input_ids=np.array(b), row=i)
        for i, b in enumerate(fill_blocks(encode_documents(load_tokenizer(base), ZH), 64))
    ]
    args = TrainArgs(max_steps=8, batch=4, accum=1, lr=1e-3, save_every=3)
    compute = replace(CPU, report_to='none')
    for s in (dict(a=1), dict(a=2)):
        with pytest.raises(Stop):
            run_training(
                load_base(base, 'full', CPU),
                None,
                Dies(rows),
                BlockCollate(1),
                tmp_path,
                args,
                compute,
                mark=s,
            )
    assert 'starting from the beginning' in capsys.readouterr().out


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


# ---- merge


def trained(folder, train, out):
    m = prepare(load_base(folder, train, CPU), train, (OLD, 150), r=4)
    ids = torch.randint(3, 150, (2, 20), generator=torch.Generator().manual_seed(0))
    opt = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        m(input_ids=ids, labels=ids).loss.backward()
        opt.step()
        opt.zero_grad()
    save_trained(m, out, folder, train)
    return m


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('train', ['lora+new', 'lora+embed'])
def test_merge_equals_pefts(base, tmp_path, train, tied):
    b = make(tmp_path / 'tied', tied=True) if tied else base
    m = trained(b, train, tmp_path / 'o')
    theirs, ours = m.merge_and_unload().state_dict(), tensors(tmp_path / 'o')
    assert ('lm_head.weight' in ours) != tied
    assert all(torch.allclose(ours[k], theirs[k], atol=1e-6) for k in ours)


def test_merge_keeps_shards_and_reads_bin(base, tmp_path):
    from transformers import AutoModelForCausalLM

    trained(base, 'lora+new', tmp_path / 'one')
    cut = shutil.copytree(base, tmp_path / 'cut', ignore=shutil.ignore_patterns('*.safetensors'))
    w = open_weights(base)
    write_shards(cut, {k: w[k].spec(k) for k in w}, lambda k: w[k].get(k), shard_bytes=40_000)
    old = shutil.copytree(base, tmp_path / 'old', ignore=shutil.ignore_patterns('*.safetensors'))
    torch.save(tensors(base), old / 'pytorch_model.bin')
    want = tensors(tmp_path / 'one')
    for b in (cut, old):
        assert fingerprint(b) == fingerprint(base)  # however the weights are cut into files
        got = merge_adapter(b, tmp_path / 'one' / 'adapter', tmp_path / f'm-{b.name}')
        assert all(torch.equal(v, want[k]) for k, v in tensors(got).items())
        with quiet():
            AutoModelForCausalLM.from_pretrained(got)
    assert (
        len(list((tmp_path / 'm-cut').glob('model-*.safetensors'))) > 1
        and (tmp_path / 'm-cut' / 'model.safetensors.index.json').exists()
    )


def test_bfloat16_base_stays_bfloat16(base, tmp_path):
    half = rewrite(base, {}, tmp_path / 'half')
    w = open_weights(base)
    write_shards(half, {k: ('BF16', w[k].spec(k)[1]) for k in w}, lambda k: w[k].get(k).bfloat16())
    m = trained(half, 'lora+new', tmp_path / 'o')
    assert {p.dtype for p in m.parameters() if p.requires_grad} == {torch.float32}
    assert {t.dtype for t in tensors(tmp_path / 'o').values()} == {torch.bfloat16}
