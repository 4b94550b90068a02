"the cost of a step: parameters to the number, tensors of a step within 15 %"

from dataclasses import replace

import pytest

from llama_zh_nb.app.step_cost import (
    SHAPES,
    Shape,
    Step,
    peak,
    probe,
    shape_of,
    skeleton,
    trace,
    trained_params,
)

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
    assert trained_params(Step(s, new=23296, rows=55296, r=64)) == {
        'new rows': 2 * 4096 * 23296,
        'LoRA': 159_907_840,
        'other': 0,
    }
    assert (
        trained_params(Step(s, train='full', rows=55296))['other']
        == s.params(55296)
        == 6_738_415_616 + 2 * 4096 * 23296
    )


@pytest.mark.parametrize('train', ['lora+new', 'lora+embed', 'lora', 'embed', 'full'])
def test_trained_parameters_of_the_real_model(train):
    step = Step(SMALL, train=train, new=64 if train == 'lora+new' else 0, rows=576, r=4)
    trained = sum(p.numel() for p in skeleton(step).parameters() if p.requires_grad)
    assert trained == sum(trained_params(step).values())


def saved_by_hooks(step):
    "Bytes that autograd saves, counted by its own hooks, of a real step"
    m = skeleton(step)
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

    ids = torch.ones(step.batch, step.block, dtype=torch.int64)
    pos = (torch.arange(step.block) % (step.block // 2)).expand_as(ids)
    with torch.autograd.graph.saved_tensors_hooks(hook, lambda t: t):
        _ = m(input_ids=ids, labels=ids, position_ids=pos).loss
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
    step = Step(s, new=new, rows=s.vocab + new, r=8, **kw)
    got, p = saved_by_hooks(step), peak(step)
    logits = step.tokens * step.rows * 4
    ours = p.moments['loss'] - 2 * logits  # in the loss two more copies live
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
    t, p = trace(Step(SMALL, **kw)), peak(Step(SMALL, **kw))
    ours, held = p.bytes - p.parts['optimizer'], t['weights'] + max(t['forward'], t['backward'])
    assert abs(ours / held - 1) < 0.15


def test_sharing_and_accumulating():
    step = Step(SHAPES[S7], train='full', block=128)
    engines = (dict(), dict(engine='zero2', gpus=8), dict(engine='fsdp2', gpus=8))
    one, zero2, fsdp = (peak(replace(step, **e)) for e in engines)
    w = 'other trained weights'
    assert zero2.parts[w] == one.parts[w] == 8 * fsdp.parts[w]
    optimizer = one.parts['optimizer'] / 8
    assert zero2.parts['optimizer'] == fsdp.parts['optimizer'] == optimizer
    assert peak(replace(step, engine='zero2-offload', gpus=8)).parts['optimizer'] == 0
    assert peak(replace(step, accum=2)).bytes > one.bytes > fsdp.bytes


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
    assert 0 < probe(Step(SMALL, train='lora', block=16), device='cpu', steps=1) < 60
