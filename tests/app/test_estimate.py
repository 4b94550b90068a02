"estimate: what fits where, what was assumed, and what makes no sense"

import pytest

from llama_zh_nb.app.estimate import GPUS, estimate, find_gpu, fits, memory
from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.recipes import get_recipe, presets


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
        '240 steps of 2,048 tokens' in estimate(get_recipe('mini'), gpu='cpu').note
        and 'an assumption' in estimate(r, gpu='h100').note
    )
    assert (
        'GFLOP for a token at the given 50 TFLOP/s' in estimate(r, tflops=50).note
        and 'needs a GPU' in estimate(get_recipe('llama2-7b-16gb'), gpu='cpu').note
    )


def test_what_fits_on_this_machine(monkeypatch):
    import llama_zh_nb.app.estimate as e

    for gb, ok in ((1, ['mini']), (4000, ['mini', 'llama2-7b-24gb'])):
        memory = {'SC_PAGE_SIZE': 4096, 'SC_PHYS_PAGES': gb * 2**30 // 4096}
        monkeypatch.setattr(e.os, 'sysconf', memory.get)
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
        memory(get_recipe('llama2-7b-8x80gb-full', gpus=n), gpu='h100').parts for n in (8, 1)
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
