"""Scaled positions: the projects' formula, folders that equal models scaled in memory."""

import copy
import random

import pytest

from llama_zh_nb.checkpoint.folder import context_length
from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.generation import long_context

torch = pytest.importorskip('torch')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    from llama_zh_nb.weights import acquire

    return acquire('mini', tmp_path_factory.mktemp('long') / 'base')


@pytest.fixture(scope='module')
def mini(folder):
    from llama_zh_nb.checkpoint.folder import load

    return load(folder, 'cpu', 'float32')


@pytest.mark.parametrize('dim,max_pos,base', [(64, 256, 1e4), (128, 4096, 1e4), (128, 2048, 5e5)])
def test_dynamic_2_is_adaptive(dim, max_pos, base):
    import transformers as tf
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = tf.LlamaConfig(
        hidden_size=dim * 2,
        num_attention_heads=2,
        max_position_embeddings=max_pos,
        rope_parameters=dict(rope_type='default', rope_theta=base),
    )
    for k, v in long_context.rope_settings(config, 'dynamic').items():
        setattr(config, k, v)
    rope, rng = LlamaRotaryEmbedding(config), random.Random(0)
    for n in sorted(
        [1, max_pos, max_pos + 1, *(rng.randrange(1, 8 * max_pos) for _ in range(12))]
    ):  # growing: after a longer text transformers keep its base
        alpha = n / (max_pos / 2) - 1 if n > max_pos else 1.0
        want = 1 / (base * alpha ** (dim / (dim - 2))) ** (torch.arange(0, dim, 2).float() / dim)
        rope(torch.zeros(1), torch.arange(n)[None])
        torch.testing.assert_close(rope.inv_freq, want, rtol=1e-5, atol=0)
    assert context_length(config) == 2 * max_pos


@pytest.mark.parametrize('kind', long_context.SCALINGS)
def test_folder_equals_memory(folder, mini, tmp_path, kind):
    from llama_zh_nb.checkpoint.folder import load

    before = {p.name: p.read_bytes() for p in folder.glob('*.json')}
    model, tok = load(
        long_context.write_rope(folder, tmp_path / 'long', kind, 4, 128), 'cpu', 'float32'
    )
    x = torch.randint(10, 2000, (1, 300), generator=torch.Generator().manual_seed(0))
    scaled = long_context.scale_rope(copy.deepcopy(mini[0]), kind, 4, 128)
    with torch.inference_mode():
        torch.testing.assert_close(model(x).logits, scaled(x).logits)
        assert not torch.allclose(scaled(x).logits, mini[0](x).logits, atol=1e-2)
        back = long_context.scale_rope(
            scaled, 'none', original=mini[0].config.max_position_embeddings
        )
        torch.testing.assert_close(back(x).logits, mini[0](x).logits)
    assert context_length(model.config) == 512 and before == {
        p.name: p.read_bytes() for p in folder.glob('*.json')
    }


def test_scaling_refused(folder, tmp_path, mini):
    for kw, word in ((dict(kind='ntk'), 'linear'), (dict(factor=0.5), 'above 1')):
        with pytest.raises(LlamaZhError, match=word):
            long_context.write_rope(folder, tmp_path / 'x', **kw)
    with pytest.raises(LlamaZhError, match='config.json'):
        long_context.write_rope(tmp_path, tmp_path / 'x')
    with pytest.raises(LlamaZhError, match='another'):
        long_context.write_rope(folder, folder)
    assert not (tmp_path / 'x').exists()
