"""Merging: the same as peft's to the last place, whatever the adapter; whole or not at all; the wrong base is refused."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny import make, tensors

from llama_zh_nb.checkpoint.adapter import apply_changes, nf4_changes
from llama_zh_nb.checkpoint.folder import fingerprint, load_tokenizer, tokenizer_hash
from llama_zh_nb.checkpoint.merge import merge_lora
from llama_zh_nb.checkpoint.meta import EMBED, HEAD, convert_meta
from llama_zh_nb.checkpoint.tensors import open_weights, write_shards
from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.core.machine import quiet
from llama_zh_nb.core.settings import ComputeArgs
from llama_zh_nb.training.lora import load_base, prepare, save_adapter

torch = pytest.importorskip('torch')
peft = pytest.importorskip('peft')


def cast(base, out, dtype):
    "The same folder in another type"
    from transformers import AutoModelForCausalLM

    shutil.copytree(base, out, ignore=shutil.ignore_patterns('*.safetensors'))
    with quiet():
        AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(out)
    return out


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    return make(tmp_path_factory.mktemp('merge') / 'base')


def model_of(folder, dtype=None):
    from transformers import AutoModelForCausalLM

    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or 'auto')


def random_adapter(base, out, old=False, seed=0, **kw):
    "An adapter as peft saves it, its matrices random; `old`: a .bin file"
    torch.manual_seed(seed)
    c = (
        dict(
            r=4,
            lora_alpha=8,
            target_modules=['q_proj', 'v_proj', 'down_proj', 'up_proj'],
            task_type='CAUSAL_LM',
        )
        | kw
    )
    with quiet():
        m = peft.get_peft_model(model_of(base), peft.LoraConfig(**c))
    for _k, p in m.named_parameters():
        if p.requires_grad:
            p.data = p.data + torch.randn_like(p) * 0.05
    with quiet():
        m.save_pretrained(out, safe_serialization=not old, save_embedding_layers=False)
    if old and not (out / 'adapter_model.bin').exists():
        from safetensors.torch import load_file

        torch.save(load_file(out / 'adapter_model.safetensors'), out / 'adapter_model.bin')
        (out / 'adapter_model.safetensors').unlink()
    return out


def by_peft(base, *adapters):
    "peft, one adapter after the other"
    m = model_of(base)
    for a in adapters:
        with quiet():
            m = peft.PeftModel.from_pretrained(m, a).merge_and_unload()
    return m.state_dict()


def places(a, b):
    "Distance in units of the last place"
    kind, sign = (torch.int32, 2**31) if a.dtype == torch.float32 else (torch.int16, 2**15)
    a, b = (
        (lambda i: torch.where(i < 0, -sign - i, i))(t.contiguous().view(kind).long())
        for t in (a, b)
    )
    return (a - b).abs().max().item()


def same(folder, theirs, most=1):
    ours = tensors(folder)
    assert set(ours) == set(theirs) - ({HEAD} if HEAD not in ours else set())
    for k, t in ours.items():
        assert t.dtype == theirs[k].dtype and places(t, theirs[k]) <= most, (
            k,
            places(t, theirs[k]),
        )


# ---- equal to peft


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('old', [False, True])
def test_equals_pefts(base, tmp_path, dtype, old):
    b = cast(base, tmp_path / 'b', dtype)
    a = random_adapter(b, tmp_path / 'a', old)
    m = merge_lora(b, a, tmp_path / 'm')
    same(m, by_peft(b, a))
    if dtype == torch.float32:
        assert max((t - by_peft(b, a)[k]).abs().max() for k, t in tensors(m).items()) < 1e-6
    assert (
        open_weights(m)[EMBED].spec(EMBED)[0]
        == {torch.float32: 'F32', torch.bfloat16: 'BF16', torch.float16: 'F16'}[dtype]
    )
    assert 'no hashes' in repr(m)  # peft's own adapters say nothing of their base


@pytest.mark.parametrize(
    'kw',
    [
        dict(use_rslora=True),
        dict(use_dora=True),
        dict(alpha_pattern={'q_proj': 3, r'layers\.1\..*up_proj': 32}, rank_pattern={'v_proj': 2}),
        dict(fan_in_fan_out=True),
        dict(modules_to_save=['embed_tokens', 'lm_head']),
        dict(modules_to_save=['norm']),
        dict(target_modules=['q_proj', 'embed_tokens', 'lm_head']),
        dict(trainable_token_indices=[3, 140]),
        dict(layers_to_transform=[1]),
        dict(init_lora_weights='gaussian'),
    ],
    ids=lambda kw: '-'.join(kw) + str(len(str(kw))),
)
@pytest.mark.filterwarnings('ignore')
def test_every_kind_of_lora(base, tmp_path, kw):
    b = cast(base, tmp_path / 'b', torch.bfloat16)
    a = random_adapter(b, tmp_path / 'a', **kw)
    same(merge_lora(b, a, tmp_path / 'm'), by_peft(b, a))


@pytest.mark.parametrize(
    'kw,why',
    [
        (dict(init_lora_weights='pissa'), 'plain adapter'),
        (dict(init_lora_weights='olora'), 'plain adapter'),
        (dict(peft_type='IA3'), 'IA3'),
        (dict(alora_invocation_tokens=[5]), 'certain tokens'),
        (dict(layer_replication=[[0, 2], [1, 2]]), 'more layers'),
        (dict(a_setting_of_tomorrow=1), 'merge with peft itself'),
    ],
)
def test_what_cannot_be_added_is_refused(base, tmp_path, kw, why):
    a = random_adapter(base, tmp_path / 'a')
    c = json.loads((a / 'adapter_config.json').read_text())
    (a / 'adapter_config.json').write_text(json.dumps(c | kw))
    with pytest.raises(LlamaZhError, match=why):
        merge_lora(base, a, tmp_path / 'm')
    assert not (tmp_path / 'm').exists()


def test_several_in_order(base, tmp_path):
    b = cast(base, tmp_path / 'b', torch.bfloat16)
    a = [random_adapter(b, tmp_path / f'a{i}', seed=i) for i in range(3)]
    same(merge_lora(b, a, tmp_path / 'm'), by_peft(b, *a))
    assert fingerprint(tmp_path / 'm') != fingerprint(merge_lora(b, a[:2], tmp_path / 'm2'))


def test_files_stay_cut_and_bin_bases_merge(base, tmp_path):
    a = random_adapter(base, tmp_path / 'a')
    want = tensors(merge_lora(base, a, tmp_path / 'one'))
    cut = shutil.copytree(base, tmp_path / 'cut', ignore=shutil.ignore_patterns('*.safetensors'))
    w = open_weights(base)
    write_shards(cut, {k: w[k].spec(k) for k in w}, lambda k: w[k].get(k), shard_bytes=40_000)
    old = shutil.copytree(base, tmp_path / 'old', ignore=shutil.ignore_patterns('*.safetensors'))
    torch.save(tensors(base), old / 'pytorch_model.bin')
    for b in (cut, old):
        got = merge_lora(b, a, tmp_path / f'm-{b.name}')
        assert all(torch.equal(t, want[k]) for k, t in tensors(got).items())
        model_of(got.path)
    assert len(list((tmp_path / 'm-cut').glob('model-0*'))) == len(list(cut.glob('model-0*'))) > 1


def test_blocks_and_threads_change_nothing(base, tmp_path, monkeypatch):
    import llama_zh_nb.checkpoint.adapter as ad
    import llama_zh_nb.checkpoint.merge as mg

    b = cast(base, tmp_path / 'b', torch.bfloat16)
    a = random_adapter(b, tmp_path / 'a', use_dora=True)
    want = tensors(merge_lora(b, a, tmp_path / 'm'))

    def small(shape):
        if not shape:
            return [slice(None)]
        return [slice(i, min(i + 24, shape[0])) for i in range(0, shape[0], 24)]

    monkeypatch.setattr(ad, 'row_blocks', small)
    monkeypatch.setattr(mg, 'row_blocks', small)
    monkeypatch.setattr(mg, '_SMALL_MODEL', 0)
    was = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        got = tensors(merge_lora(b, a, tmp_path / 'm2'))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(was)
    assert all(places(got[k], want[k]) <= 1 for k in want)


# ---- Meta's layout


@pytest.mark.parametrize('tied', [False, True])
def test_metas_layout(shared, tmp_path, tied):
    b = llama2(shared, tmp_path / 'b', tied)
    a = random_adapter(b, tmp_path / 'a')
    hf = tensors(merge_lora(b, a, tmp_path / 'hf'))
    for n in (1, 2):
        m = merge_lora(b, a, tmp_path / f'meta{n}', layout='meta', shards=n)
        assert len(list(m.path.glob('consolidated.*.pth'))) == n
        back = tensors(convert_meta(m, tmp_path / f'back{n}'))
        assert all(torch.equal(back[k], hf[k]) for k in hf) and torch.equal(
            back[HEAD], hf.get(HEAD, hf[EMBED])
        )


# ---- the old projects' adapters


def llama2(shared, out, tied=False, rows=32000):
    "A thin Llama with Llama-2's tokenizer"
    from transformers import LlamaConfig, LlamaForCausalLM

    from llama_zh_nb.tokenizer.exact import save_tokenizer

    torch.manual_seed(0)
    c = LlamaConfig(
        vocab_size=rows,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    with quiet():
        LlamaForCausalLM(c).bfloat16().save_pretrained(out)
    save_tokenizer(shared / 'data' / 'tokenizers' / 'llama2_32000.model', out)
    return out


@pytest.fixture(scope='module')
def old_alpaca(shared, tmp_path_factory):
    "As those projects left it: a .bin in float16, whole embeddings, tokenizer.model beside it, no hashes"
    d = tmp_path_factory.mktemp('old')
    b, a = llama2(shared, d / 'b'), d / 'a'
    with quiet():
        m = model_of(b)
        m.resize_token_embeddings(55296, mean_resizing=False)
        torch.manual_seed(5)
        m = peft.get_peft_model(
            m,
            peft.LoraConfig(
                r=4,
                lora_alpha=8,
                target_modules=['q_proj', 'v_proj'],
                modules_to_save=['embed_tokens', 'lm_head'],
                task_type='CAUSAL_LM',
            ),
        )
    for _k, p in m.named_parameters():
        if p.requires_grad:
            p.data = p.data + torch.randn_like(p) * 0.05
    state = {k: v.half() for k, v in peft.get_peft_model_state_dict(m).items()}
    m.peft_config['default'].save_pretrained(a)
    torch.save(state, a / 'adapter_model.bin')
    shutil.copyfile(
        shared / 'data' / 'tokenizers' / 'chinese_llama2_55296.model', a / 'tokenizer.model'
    )
    (a / 'special_tokens_map.json').write_text('{}')
    return b, a, state


@pytest.mark.filterwarnings('ignore')
def test_old_adapter_brings_rows_and_tokenizer(old_alpaca, tmp_path):
    b, a, state = old_alpaca
    m = merge_lora(b, a, tmp_path / 'm')
    c, t = json.loads((m.path / 'config.json').read_text()), tensors(m)
    assert (
        c['vocab_size'] == 55296
        and {t[k].shape[0] for k in (EMBED, HEAD)} == {55296}
        and t[EMBED].dtype == torch.bfloat16
    )
    assert torch.equal(t[HEAD], state['base_model.model.lm_head.weight'].bfloat16())
    assert (m.path / 'tokenizer.model').read_bytes() == (a / 'tokenizer.model').read_bytes()
    assert json.loads((m.path / 'resize.json').read_text()) == dict(
        old_rows=32000, pieces=55296, rows=55296, init='adapter'
    )
    assert '55,296 rows for 32,000' in repr(m)
    assert len(load_tokenizer(m.path)) == 55296 and model_of(m.path).config.vocab_size == 55296
    meta = merge_lora(b, a, tmp_path / 'meta', layout='meta')
    assert json.loads((meta.path / 'params.json').read_text())['vocab_size'] == 55296


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('rows', [49953, 49954])
def test_first_generations_adapters(shared, tmp_path, rows):
    "LLaMA's 32,000 and the 49,953 of the first Chinese-LLaMA-Alpaca, or 49,954 with [PAD]; keys as the peft of 2023 wrote them"
    b, a, d = llama2(shared, tmp_path / 'b'), tmp_path / 'a', shared / 'data' / 'tokenizers'
    from llama_zh_nb.vocab import merge

    model = (
        Path(
            merge(
                d / 'llama2_32000.model',
                [d / 'chinese_sp_20000.model'],
                tmp_path / 'tok',
                compat='chinese-llama' if rows == 49953 else 'chinese-alpaca',
            )
        )
        / 'tokenizer.model'
    )
    torch.manual_seed(7)
    a.mkdir()
    pre, state = 'base_model.model.', {}
    for i in range(2):
        for p, n in (('self_attn.q_proj', 16), ('mlp.up_proj', 32)):
            state |= {
                f'{pre}model.layers.{i}.{p}.lora_A.weight': torch.randn(8, 16).half(),
                f'{pre}model.layers.{i}.{p}.lora_B.weight': torch.randn(n, 8).half(),
            }
    state |= {f'{pre}{k}': torch.randn(rows, 16).half() for k in (EMBED, HEAD)}
    torch.save(state, a / 'adapter_model.bin')
    (a / 'adapter_config.json').write_text(
        json.dumps(
            dict(
                base_model_name_or_path='/somewhere/llama-7b-hf',
                bias='none',
                fan_in_fan_out=False,
                inference_mode=True,
                lora_alpha=32.0,
                lora_dropout=0.1,
                merge_weights=False,
                modules_to_save=['embed_tokens', 'lm_head'],
                peft_type='LORA',
                r=8,
                target_modules=['q_proj', 'up_proj'],
                task_type='CAUSAL_LM',
                enable_lora=None,
            )
        )
    )
    shutil.copyfile(model, a / 'tokenizer.model')
    m = merge_lora(b, a, tmp_path / 'm')
    t, old = tensors(m), tensors(b)
    q = 'model.layers.1.self_attn.q_proj'
    by_hand = old[f'{q}.weight'].float() + 32 / 8 * (
        state[f'{pre}{q}.lora_B.weight'].float() @ state[f'{pre}{q}.lora_A.weight'].float()
    )
    assert places(t[f'{q}.weight'], by_hand.bfloat16()) <= 1
    assert all(torch.equal(t[k], state[pre + k].bfloat16()) for k in (EMBED, HEAD)) and torch.equal(
        t['model.layers.0.self_attn.k_proj.weight'], old['model.layers.0.self_attn.k_proj.weight']
    )
    assert len(load_tokenizer(m.path)) == model_of(
        m.path
    ).config.vocab_size == rows and f'{rows:,} rows for 32,000' in repr(m)
    assert (m.path / 'tokenizer.model').read_bytes() == model.read_bytes()
    meta = merge_lora(b, a, tmp_path / 'meta', layout='meta')
    assert open_weights(convert_meta(meta, tmp_path / 'back'))[EMBED].spec(EMBED)[1] == (rows, 16)


@pytest.mark.filterwarnings('ignore')
def test_old_adapter_that_lacks_something(old_alpaca, shared, tmp_path):
    b, a, state = old_alpaca
    bare = shutil.copytree(a, tmp_path / 'bare')
    (bare / 'tokenizer.model').unlink()
    with pytest.raises(LlamaZhError, match='brings no tokenizer.model'):
        merge_lora(b, bare, tmp_path / 'm')
    with pytest.raises(LlamaZhError, match='32,000 pieces, but the adapter has 55,296'):
        merge_lora(b, bare, tmp_path / 'm', tokenizer=b)
    named = tmp_path / 'named'
    named.mkdir()
    shutil.copyfile(a / 'tokenizer.model', named / 'tokenizer.model')
    assert merge_lora(b, bare, tmp_path / 'ok', tokenizer=named).plan.rows == 55296
    torch.save({k: v for k, v in state.items() if 'lm_head' not in k}, bare / 'adapter_model.bin')
    with pytest.raises(LlamaZhError, match='only one of them'):
        merge_lora(b, bare, tmp_path / 'm')
    assert not (tmp_path / 'm').exists()


# ---- whose adapter


def taught(base, out, train='lora', seed=0, steps=2):
    m = prepare(load_base(base, train, ComputeArgs(device='cpu')), train, None, r=2, seed=seed)
    ids, opt = (
        torch.arange(3, 40)[None],
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-2),
    )
    for _ in range(steps):
        m(input_ids=ids, labels=ids).loss.backward()
        opt.step()
    return save_adapter(m, out, base)


def test_only_its_own_base(base, tmp_path):
    a, other = taught(base, tmp_path / 'a'), make(tmp_path / 'other', seed=9)
    with pytest.raises(
        LlamaZhError, match='trained on weights .* use the folder it was trained on'
    ):
        merge_lora(other, a, tmp_path / 'm')
    assert not (tmp_path / 'm').exists()
    assert 'not compared' in repr(merge_lora(other, a, tmp_path / 'm', force=True))
    with pytest.raises(LlamaZhError, match='which is needed for this merge'):
        merge_lora(base, a, base)
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'letter.txt').write_text('x')
    with pytest.raises(LlamaZhError, match='holds other things'):
        merge_lora(base, a, tmp_path / 'mine')


def test_what_is_there_stays(base, tmp_path):
    a = random_adapter(base, tmp_path / 'a')
    m = merge_lora(base, a, tmp_path / 'm').path
    was = fingerprint(m)
    two = random_adapter(base, tmp_path / 'two', seed=1)
    with pytest.raises(LlamaZhError, match='exists already.*--overwrite'):
        merge_lora(base, two, m)
    assert fingerprint(m) == was != fingerprint(merge_lora(base, two, m, overwrite=True))
    (tmp_path / 'empty').mkdir()
    merge_lora(base, a, tmp_path / 'empty')
    (tmp_path / 'file').write_text('x')
    with pytest.raises(LlamaZhError, match='exists already'):
        merge_lora(base, a, tmp_path / 'file')
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'letter.txt').write_text('x')
    with pytest.raises(LlamaZhError, match='holds other things'):
        merge_lora(base, a, tmp_path / 'mine', overwrite=True)


def test_nonsense_is_refused(base, tmp_path):
    a = random_adapter(base, tmp_path / 'a')
    for bad, why in (
        (dict(layout='meta', shards=0), 'shards = 0'),
        (dict(shards=2), "Meta's layout"),
        (dict(layout='gguf'), 'unknown layout'),
        (dict(adapters=[]), 'no adapter'),
    ):
        with pytest.raises(LlamaZhError, match=why):
            merge_lora(**dict(base=base, adapters=a, out=tmp_path / 'm') | bad)
    assert not (tmp_path / 'm').exists()


def test_the_second_knows_the_first(base, tmp_path):
    a = taught(base, tmp_path / 'a')
    one = merge_lora(base, a, tmp_path / 'one').path
    b = taught(one, tmp_path / 'b', seed=1)
    both = merge_lora(base, [a, b], tmp_path / 'both')
    assert both.plan.notes == [] and fingerprint(both) == fingerprint(
        merge_lora(one, b, tmp_path / 'two')
    )
    with pytest.raises(LlamaZhError, match='trained on weights'):
        merge_lora(base, b, tmp_path / 'm')
    beside = merge_lora(base, [a, taught(base, tmp_path / 'c', seed=2)], tmp_path / 'beside')
    assert 'trained on the base itself' in repr(beside)


def test_empty_and_zero_adapters(base, tmp_path):
    from safetensors.torch import load_file, save_file

    a = random_adapter(base, tmp_path / 'a')
    state = load_file(a / 'adapter_model.safetensors')
    b = next(k for k in state if 'lora_B' in k)
    for bad, why in (
        ({}, '0 tensors'),
        ({k: v * 0 if 'lora_B' in k else v for k, v in state.items()}, 'every lora_B is zero'),
        ({k: v * 0 for k, v in state.items() if 'lora_A' in k}, 'all .* zero'),
        ({k: v for k, v in state.items() if k != b}, 'no lora_B'),
        (state | {b: state[b] * float('inf')}, 'NaN or infinity'),
        (state | {b: state[b][:0]}, 'size 0'),
        (state | {b: state[b][:-1].clone()}, 'another size'),
        (
            state
            | {
                b.replace('layers.0', 'layers.7'): state[b].clone(),
                b.replace('layers.0', 'layers.7').replace('lora_B', 'lora_A'): state[
                    b.replace('lora_B', 'lora_A')
                ].clone(),
            },
            'which .* does not have',
        ),
    ):
        save_file(bad, a / 'adapter_model.safetensors')
        with pytest.raises(LlamaZhError, match=why):
            merge_lora(base, a, tmp_path / 'm')
    (a / 'adapter_model.safetensors').write_bytes(b'version https://git-lfs.github.com/spec/v1')
    with pytest.raises(LlamaZhError, match='LFS'):
        merge_lora(base, a, tmp_path / 'm')
    assert not (tmp_path / 'm').exists()


def test_tied_bases(tmp_path):
    b = make(tmp_path / 'b', tied=True)
    with quiet():
        same(
            merge_lora(b, random_adapter(b, tmp_path / 'a'), tmp_path / 'm'),
            by_peft(b, tmp_path / 'a'),
        )
    from safetensors.torch import load_file, save_file

    a = random_adapter(b, tmp_path / 'c', modules_to_save=['embed_tokens', 'lm_head'])
    state = load_file(a / 'adapter_model.safetensors')
    save_file(
        state | {k: v + 1 for k, v in state.items() if 'lm_head' in k},
        a / 'adapter_model.safetensors',
    )
    with pytest.raises(LlamaZhError, match='changes them apart'):
        merge_lora(b, a, tmp_path / 'm2')


# ---- QLoRA


@pytest.fixture(scope='module')
def wide(tmp_path_factory):
    "A base whose columns are multiples of 64"
    from transformers import LlamaConfig, LlamaForCausalLM

    b = make(tmp_path_factory.mktemp('wide') / 'b')
    c = LlamaConfig.from_pretrained(b, hidden_size=128, head_dim=32, intermediate_size=192)
    with quiet():
        torch.manual_seed(3)
        LlamaForCausalLM(c).bfloat16().save_pretrained(b)
    return b


def test_qlora_is_added_to_the_dequantized_base(wide, tmp_path):
    a = random_adapter(wide, tmp_path / 'a')
    w4 = {
        k: f.get(k)
        for k, f in apply_changes(open_weights(wide), nf4_changes(open_weights(wide), {})).items()
    }
    flat = shutil.copytree(wide, tmp_path / 'flat', ignore=shutil.ignore_patterns('*.safetensors'))
    write_shards(flat, {k: ('BF16', tuple(t.shape)) for k, t in w4.items()}, w4.get)
    m = merge_lora(wide, a, tmp_path / 'm', in_4bit=True)
    same(m, by_peft(flat, a))
    assert 'NF4' in repr(m) and 'merge with --in-4bit' in repr(merge_lora(wide, a, tmp_path / 'm2'))
    (a / 'belongs_to.json').write_text(
        json.dumps(
            dict(base=fingerprint(wide), tokenizer=tokenizer_hash(wide), rows=152, in_4bit=True)
        )
    )
    assert fingerprint(merge_lora(wide, a, tmp_path / 'm3')) == fingerprint(m)  # it says so itself
    assert fingerprint(merge_lora(wide, a, tmp_path / 'm4', in_4bit=False)) == fingerprint(
        tmp_path / 'm2'
    )


def test_qlora_that_cannot_be_followed(base, wide, tmp_path):
    a = random_adapter(base, tmp_path / 'a')
    with pytest.raises(LlamaZhError, match='runs of 64'):
        merge_lora(base, a, tmp_path / 'm', in_4bit=True)
    q = shutil.copytree(wide, tmp_path / 'q')
    (q / 'config.json').write_text(
        json.dumps(
            json.loads((q / 'config.json').read_text())
            | dict(quantization_config=dict(load_in_4bit=True))
        )
    )
    with pytest.raises(LlamaZhError, match='is quantized'):
        merge_lora(q, a, tmp_path / 'm')


class OneTensor:
    "Stands for an open weight file that holds one tensor under any name"

    def __init__(self, tensor):
        self.tensor = tensor

    def spec(self, name):
        code = {torch.float32: 'F32', torch.bfloat16: 'BF16', torch.float16: 'F16'}
        return code[self.tensor.dtype], tuple(self.tensor.shape)

    def get(self, name, rows=slice(None)):
        return self.tensor[rows]


def test_nf4_is_that_of_bitsandbytes():
    F = pytest.importorskip('bitsandbytes.functional')
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        w = (torch.randn(512, 704) * 0.02).to(dtype)
        for double in (False, True):
            ours = apply_changes(
                {'q_proj.weight': OneTensor(w)}, nf4_changes(['q_proj.weight'], dict(double=double))
            )['q_proj.weight'].get('q_proj.weight')
            theirs = F.dequantize_4bit(
                *F.quantize_4bit(w, quant_type='nf4', compress_statistics=double)
            )
            if not double:
                assert torch.equal(ours, theirs)
            else:  # their search in the 8-bit code takes the second nearest now and then
                assert (ours != theirs).float().mean() < 0.01 and (
                    ours - theirs
                ).abs().max() < 0.02 * w.abs().max()


# ---- whole or not at all

SLOWLY = """
import sys, time
import llama_zh_nb.checkpoint.merge as m, llama_zh_nb.checkpoint.adapter as ad
old = m.read_tensor_rows
def read_tensor_rows(*a):
    print('portion', flush=True); time.sleep(.15)
    return old(*a)
m.read_tensor_rows = read_tensor_rows
m.merge_lora(*sys.argv[1:4])
"""


def test_killed_half_way_leaves_nothing(base, tmp_path):
    a = random_adapter(base, tmp_path / 'a')
    p = subprocess.Popen(
        [sys.executable, '-c', SLOWLY, base, a, tmp_path / 't' / 'm'],
        stdout=subprocess.PIPE,
        text=True,
    )
    for _ in range(8):
        assert 'portion' in p.stdout.readline()
    assert list((tmp_path / 't').glob('.m.partial-*'))
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not (tmp_path / 't' / 'm').exists()
    m = merge_lora(base, a, tmp_path / 't' / 'm')
    assert [p.name for p in (tmp_path / 't').iterdir()] == ['m'] and fingerprint(
        m
    )  # what lay around is gone


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from llama_zh_nb.app.cli import main
import llama_zh_nb.checkpoint.merge as m
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
try: m.merge_lora(*sys.argv[1:4])
except m.LlamaZhError as e: print('LlamaZhError:', e)
"""


def test_full_disk(base, tmp_path, monkeypatch):
    a = random_adapter(base, tmp_path / 'a')
    out = subprocess.run(
        [sys.executable, '-c', FULL, base, a, tmp_path / 't' / 'm'], capture_output=True, text=True
    )
    assert 'LlamaZhError: no space left while writing' in out.stdout, out.stderr
    assert not list((tmp_path / 't').iterdir())
    import llama_zh_nb.checkpoint.merge as mg

    monkeypatch.setattr(mg.shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(1, 1, 10))
    with pytest.raises(LlamaZhError, match='make room'):
        merge_lora(base, a, tmp_path / 't' / 'm')
    assert not list((tmp_path / 't').iterdir())


# ---- frugal

BIG = """
import sys
sys.path.insert(0, sys.argv[1])
from merge_lora import *
d = Path(sys.argv[2])
tokenizers(d); make(d/'m', '70b-layer'); adapter(d/'a', '70b-layer', 16)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(root, tmp_path):
    "Two layers' worth of 70B, 2.7 GB: within 1.5 GB, with torch and all"
    subprocess.run([sys.executable, '-c', BIG, root / 'benchmarks', tmp_path], check=True)
    code = 'import sys, llama_zh_nb.checkpoint.merge as m; m.merge_lora(*sys.argv[1:4]); print(next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM")))'
    for name in ('m', 'meta'):
        out = subprocess.run(
            [
                sys.executable,
                '-c',
                code.replace('[1:4])', f'[1:4], layout={"hf" if name == "m" else "meta"!r})'),
                tmp_path / 'm',
                tmp_path / 'a',
                tmp_path / f'out-{name}',
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        assert (
            int(out.stdout) * 1024 < 1.5e9
        )  # of this process alone: ru_maxrss begins with what the process that started it had
