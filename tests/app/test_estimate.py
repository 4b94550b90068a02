"estimate: parameters to the number, tensors of a step within 15 %, and what fits where"

import pytest

from llama_zh_nb.app.estimate import (
    GPUS,
    SHAPES,
    Shape,
    estimate,
    find_gpu,
    fits,
    memory,
    peak,
    probe,
    shape_of,
    skeleton,
    trace,
    trained_params,
)
from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.recipes import get_recipe, presets

torch = pytest.importorskip('torch')
S7 = 'meta-llama/Llama-2-7b-hf'
SMALL = Shape(layers=3, hidden=96, inter=256, vocab=512, heads=6, kv=2, dim=16)


@pytest.mark.parametrize(
    'size,n', [('7b', 6_738_415_616), ('13b', 13_015_864_320), ('70b', 68_976_648_192)]
)
def test_golden_parameter_counts(size, n):
    assert SHAPES[f'meta-llama/Llama-2-{size}-hf'].params() == n


def test_golden_trained_counts():
    s = SHAPES[S7]
    assert s.lora(64) == 159_907_840  # what peft prints for r 64 on the seven projections
    assert trained_params(s, 'lora+new', 23296, 55296, 64) == {
        'new rows': 2 * 4096 * 23296,
        'LoRA': 159_907_840,
        'other': 0,
    }
    assert (
        trained_params(s, 'full', 0, 55296)['other']
        == s.params(55296)
        == 6_738_415_616 + 2 * 4096 * 23296
    )


@pytest.mark.parametrize('train', ['lora+new', 'lora+embed', 'lora', 'embed', 'full'])
def test_trained_parameters_of_the_real_model(train):
    new = 64 if train == 'lora+new' else 0
    m = skeleton(SMALL, train, (512, 576) if new else None, 4, rows=576)
    assert sum(p.numel() for p in m.parameters() if p.requires_grad) == sum(
        trained_params(SMALL, train, new, 576, 4).values()
    )


def saved_by_hooks(s, **kw):
    "Bytes that autograd saves, counted by its own hooks, of a real step"
    m = skeleton(
        s,
        kw['train'],
        (s.vocab, kw['rows']) if kw['new'] else None,
        kw['r'],
        rows=kw['rows'],
        checkpointing=kw.get('checkpointing', False),
    )
    for mod in m.modules():
        for k, p in list(mod._parameters.items()):
            if p is not None:
                mod._parameters[k] = torch.nn.Parameter(
                    torch.randn(p.shape) * 0.02, requires_grad=p.requires_grad
                )
        for k, b in list(mod._buffers.items()):
            if b is not None:
                mod._buffers[k] = torch.zeros(b.shape, dtype=b.dtype)
    own, seen = {p.untyped_storage()._cdata for p in m.parameters()}, {}

    def hook(t):
        st = t.untyped_storage()
        if st._cdata not in own:
            seen[st._cdata] = st
        return t

    ids = torch.ones(kw['batch'], kw['block'], dtype=torch.int64)
    pos = (torch.arange(kw['block']) % (kw['block'] // 2)).expand_as(ids)
    with torch.autograd.graph.saved_tensors_hooks(hook, lambda t: t):
        m(input_ids=ids, labels=ids, position_ids=pos).loss
    return sum(st.nbytes() for st in seen.values())


@pytest.mark.parametrize('s', [SMALL, Shape(2, 192, 512, 700, 4, 4, 48)])
@pytest.mark.parametrize(
    'kw',
    [
        dict(train='lora+new', batch=2, block=64),
        dict(train='full', batch=1, block=160),
        dict(train='lora+new', batch=2, block=64, checkpointing=True),
    ],
)
def test_saved_tensors_within_15_percent(s, kw):
    new = 128 if kw['train'] == 'lora+new' else 0
    kw = dict(kw, new=new, rows=s.vocab + new, r=8)
    got, m = saved_by_hooks(s, **kw), peak(s, **kw)
    logits = kw['batch'] * kw['block'] * kw['rows'] * 4
    ours = m['moments']['loss'] - 2 * logits  # in the loss two more copies live
    assert abs(ours / got - 1) < 0.15


@pytest.mark.parametrize(
    'kw',
    [
        dict(),
        dict(checkpointing=True),
        dict(train='full'),
        dict(half=True),
        dict(half=True, dropout=0.1),
        dict(train='lora+embed', half=True, checkpointing=True),
    ],
)
def test_peak_within_15_percent_of_the_tensors_of_a_step(kw):
    kw = dict(train='lora+new', batch=2, block=96, r=8, rows=640) | kw
    kw['new'] = 128 if kw['train'] == 'lora+new' else 0
    t, p = trace(SMALL, **kw), peak(SMALL, **kw)
    assert (
        abs(
            (p['peak'] - p['parts']['optimizer'])
            / (t['weights'] + max(t['forward'], t['backward']))
            - 1
        )
        < 0.15
    )


def test_what_fits_is_ordered():
    for p in presets():
        sizes = [g for g in GPUS if p in fits(g, [p])]
        assert sizes and all(GPUS[g][0] >= min(GPUS[o][0] for o in sizes) for g in sizes), p
    assert (
        fits('t4', ['llama2-7b-16gb'])
        and not fits('t4', ['llama2-7b-24gb'])
        and fits('rtx4090', ['llama2-7b-24gb'])
    )
    assert all(
        n in fits('h100')
        for n in (
            'llama2-7b-80gb',
            'llama2-13b-80gb',
            'llama2-7b-8x80gb-full',
            'llama2-70b-multinode',
        )
    )


def test_sharing_and_accumulating():
    kw = dict(train='full', batch=1, block=128)
    one, zero2, fsdp = (
        peak(SHAPES[S7], **kw, **e)
        for e in (dict(), dict(engine='zero2', gpus=8), dict(engine='fsdp2', gpus=8))
    )
    w = 'other trained weights'
    assert (
        zero2['parts'][w] == one['parts'][w] == 8 * fsdp['parts'][w]
        and zero2['parts']['optimizer']
        == fsdp['parts']['optimizer']
        == one['parts']['optimizer'] / 8
    )
    assert peak(SHAPES[S7], **kw, engine='zero2-offload', gpus=8)['parts']['optimizer'] == 0
    assert peak(SHAPES[S7], **kw, accum=2)['peak'] > one['peak'] > fsdp['peak']


def test_the_estimate_reads_well():
    e = estimate(get_recipe('llama2-7b-24gb'), gpu='T4', chars=3_000_000)
    assert (
        'does NOT fit' in repr(e)
        and 'not measured' in repr(e)
        and 't4' not in e['fits on']
        and e['tokens'] == 2_000_000
    )
    assert '| memory: LoRA |' in e._repr_markdown_() and e['disk: sum'] > 4 * 13e9
    twice = estimate(get_recipe('llama2-7b-24gb'), gpu='T4', chars=6_000_000)
    assert twice['time of pretraining, about'] == pytest.approx(2 * e['time of pretraining, about'])
    assert 'GPU' not in estimate(get_recipe('mini'), gpu='cpu').note


@pytest.mark.parametrize(
    'kw',
    [
        dict(batch=0),
        dict(block=-1),
        dict(accum=0),
        dict(gpus=0),
        dict(lora_r=0),
        dict(epochs=0),
        dict(replay=1),
        dict(lora_dropout=1.5),
        dict(vocab_size=0),
        dict(pad_to=0),
        dict(lr=-1),
        dict(max_steps=0),
        dict(sft_batch=0),
    ],
    ids=lambda kw: next(iter(kw)),
)
def test_numbers_that_mean_nothing(kw):
    with pytest.raises(LlamaZhError, match=next(iter(kw))):
        estimate(get_recipe('mini', **kw))


@pytest.mark.parametrize(
    'kw',
    [
        dict(tokens=0),
        dict(chars=-5),
        dict(tflops=0),
        dict(chars_per_token=0),
        dict(tflops=float('nan')),
    ],
)
def test_amounts_that_mean_nothing(kw):
    with pytest.raises(LlamaZhError, match='expected more than 0'):
        estimate(get_recipe('mini'), **kw)


def test_what_was_assumed_is_said():
    r = get_recipe('llama2-7b-24gb')
    assert (
        'ONE MILLION TOKENS ARE ASSUMED' in estimate(r).note and estimate(r)['tokens'] == 1_000_000
    )
    assert (
        '3,000,000 characters at 1.5 a token' in estimate(r, chars=3_000_000).note
        and '5,000 tokens of the corpus' in estimate(r, tokens=5000).note
    )
    assert (
        '600 steps of 2,048 tokens' in estimate(get_recipe('mini'), gpu='cpu').note
        and 'an assumption' in estimate(r, gpu='h100').note
    )
    assert (
        'GFLOP for a token at the given 50 TFLOP/s' in estimate(r, tflops=50).note
        and 'needs a GPU' in estimate(get_recipe('llama2-7b-16gb'), gpu='cpu').note
    )


def test_what_fits_on_this_machine(monkeypatch):
    import llama_zh_nb.app.estimate as e

    for gb, ok in ((1, ['mini']), (4000, ['mini', 'llama2-7b-24gb'])):
        monkeypatch.setattr(e.os, 'sysconf', lambda k: 4096 if 'SIZE' in k else gb * 2**30 // 4096)
        got = fits('CPU')
        assert (
            set(ok) <= set(got)
            and not {'llama2-7b-16gb', 'llama2-70b-multinode'} & set(got)
            and ('llama2-7b-24gb' in got) == ('llama2-7b-24gb' in ok)
        )


def test_engines_of_presets():
    "Each GPU of a sharded preset holds its share; ten times the GPUs, a tenth of the optimizer"
    r = get_recipe('llama2-7b-8x80gb-full')
    eight, one = (
        memory(get_recipe('llama2-7b-8x80gb-full', gpus=n), gpu='h100')['parts'] for n in (8, 1)
    )
    assert (
        eight['optimizer'] == one['optimizer'] / 8
        and eight['other trained weights'] == one['other trained weights'] / 8
        and eight['gathered'] > one['gathered'] == 0
    )
    assert f'each of {r.compute.gpus} GPUs' in estimate(r, gpu='h100').note
    t = [
        estimate(get_recipe('llama2-7b-8x80gb-full', gpus=n), gpu='h100', tokens=10**9)[
            'time of pretraining, about'
        ]
        for n in (8, 16)
    ]
    assert t[0] == pytest.approx(2 * t[1])


def test_unknown_gpu_and_base():
    with pytest.raises(LlamaZhError, match="did you mean 'rtx4090'"):
        find_gpu('RTX 4099')
    with pytest.raises(LlamaZhError, match='cannot tell the shape'):
        estimate(get_recipe('mini', base='somebody/some-model'))


def test_shape_of_folders(tmp_path):
    (tmp_path / 'params.json').write_text(
        '{"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "vocab_size": -1}'
    )
    assert shape_of(tmp_path) == SHAPES['meta-llama/Llama-2-70b-hf']
    (tmp_path / 'config.json').write_text(
        '{"hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 172, "vocab_size": 512}'
    )
    assert shape_of(str(tmp_path)) == Shape(5, 64, 172, 512, 8, 4, 8)


def test_probe_gives_seconds():
    assert 0 < probe(SMALL, 'lora', batch=1, block=16, device='cpu', steps=1) < 60
