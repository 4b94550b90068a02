"""LoRA and new rows: the gradient of full training, and a merge that equals peft's."""

import os
import shutil

import numpy as np
import pytest
from helpers.tiny import OLD, ZH, make, tensors

from llama_zh_nb.checkpoint.folder import (
    fingerprint,
    load_tokenizer,
    rewrite,
)
from llama_zh_nb.checkpoint.merge import merge_adapter
from llama_zh_nb.checkpoint.tensors import open_weights, write_shards
from llama_zh_nb.core.machine import quiet
from llama_zh_nb.core.settings import ComputeArgs
from llama_zh_nb.training.lora import load_base, prepare, save_trained
from llama_zh_nb.training.packing import (
    BlockCollate,
    encode_documents,
    fill_blocks,
)

torch = pytest.importorskip('torch')
pytest.importorskip('peft')
os.environ['LLAMA_ZH_PROGRESS'] = '0'

CPU = ComputeArgs(device='cpu')


@pytest.fixture(scope='session')
def base(tmp_path_factory):
    return make(tmp_path_factory.mktemp('tiny') / 'base')


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
