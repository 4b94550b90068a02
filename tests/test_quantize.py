"""GPTQ on small random models: shapes, calibration, what is saved, what comes back, and clear errors."""

import json
import shutil
import subprocess
import sys

import pytest

from llama_zh_nb.core.errors import LlamaZhError, read_json
from llama_zh_nb.core.settings import QuantArgs

CHATS = [
    {
        'messages': [
            {'role': 'user', 'content': f'{c}的首都是哪里？'},
            {'role': 'assistant', 'content': f'{c}的首都是{v}。'},
        ]
    }
    for c, v in [
        ('法国', '巴黎'),
        ('日本', '东京'),
        ('英国', '伦敦'),
        ('俄国', '莫斯科'),
        ('埃及', '开罗'),
        ('泰国', '曼谷'),
        ('越南', '河内'),
        ('希腊', '雅典'),
    ]
] * 3


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "A random Llama with grouped key/value heads and a tokenizer of our own"
    import sentencepiece as sp
    import torch
    import transformers as tf

    from llama_zh_nb.text.templates import write_template
    from llama_zh_nb.tokenizer.exact import save_tokenizer

    d = tmp_path_factory.mktemp('model')
    lines = [m['content'] for c in CHATS for m in c['messages']] + [
        'INST /INST [ ] hello world of rivers and hills'
    ] * 20
    sp.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(d / 'sp'),
        vocab_size=380,
        model_type='bpe',
        byte_fallback=True,
        normalization_rule_name='identity',
        character_coverage=1.0,
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
    )
    save_tokenizer(str(d / 'sp.model'), d / 'm')
    torch.manual_seed(0)
    c = tf.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=384,
        max_position_embeddings=256,
        initializer_range=0.06,
        tie_word_embeddings=False,
    )
    tf.LlamaForCausalLM(c).save_pretrained(d / 'm')
    return write_template(d / 'm', 'alpaca2')


@pytest.fixture(scope='module')
def packed(tiny):
    from llama_zh_nb.quantize import quantize

    return quantize(tiny, CHATS, tiny.parent / 'q', QuantArgs(group_size=32), device='cpu')


def logits(model, ids=(1, 50, 300, 260, 70, 310, 90, 20)):
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(ids)])).logits.float()


def test_the_module_is_light():
    code = "import sys, llama_zh_nb.quantize; assert not {'torch','transformers','gptqmodel'} & set(sys.modules)"
    subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.parametrize(
    'cpus, given, workers', [(1, None, '2'), (2, None, '2'), (2, '7', '7'), (4, None, None)]
)
def test_one_or_two_cpus_are_enough(monkeypatch, cpus, given, workers):
    "gptqmodel fails to load a model with one worker, which is what it takes by itself on 1 or 2 CPUs"
    import os

    from llama_zh_nb.core.errors import need

    monkeypatch.setenv('GPTQMODEL_CPU_WORKERS', given or '')
    if given is None:
        monkeypatch.delenv('GPTQMODEL_CPU_WORKERS')
    monkeypatch.setattr(os, 'cpu_count', lambda: cpus)
    need('json')
    assert os.environ.get('GPTQMODEL_CPU_WORKERS') == workers


def test_what_is_saved(tiny, packed):
    import torch

    from llama_zh_nb.checkpoint.tensors import open_weights

    for n in (
        'tokenizer.json',
        'tokenizer_config.json',
        'tokenizer.model',
        'chat_template.jinja',
        'generation_config.json',
    ):
        assert (packed / n).read_bytes() == (tiny / n).read_bytes(), n
    a, b = open_weights(tiny), open_weights(packed)
    for n in ('model.embed_tokens.weight', 'lm_head.weight', 'model.norm.weight'):
        assert b[n].spec(n)[0] == 'F16' and torch.equal(b[n].get(n), a[n].get(n).half())
    assert sum(n.endswith('.qweight') for n in b) == 14 and not any(
        n.endswith('_proj.weight') for n in b
    )
    c = read_json(packed / 'config.json')
    assert (
        c['dtype'] == 'float16'
        and c['quantization_config']['quant_method'] == 'gptq'
        and c['quantization_config']['group_size'] == 32
    )
    assert '/' not in json.dumps(c['quantization_config']['meta']).replace(
        'https://github.com/modelcloud/gptqmodel', ''
    )  # no folder of this machine
    q = read_json(packed / 'quantize.json')
    assert q['left'] == [] and q['examples'] == 24 and q['tokens'] > 200 and len(q['layers']) == 14
    assert not [p for p in packed.parent.iterdir() if 'partial' in p.name]


def test_reload_through_transformers(tiny, packed):
    import torch
    import transformers as tf

    from llama_zh_nb.checkpoint.folder import load

    want = logits(tf.AutoModelForCausalLM.from_pretrained(tiny))
    model, tok = load(packed, 'cpu')
    got = logits(model)
    assert (
        got.dtype == torch.float32
        and (got - want).norm() < 0.3 * want.norm()
        and not torch.equal(got, want)
    )
    plain = tf.AutoModelForCausalLM.from_pretrained(
        packed, dtype=torch.float32
    )  # what any other program does
    assert torch.allclose(logits(plain), got, atol=1e-4)
    assert (
        tok.decode(tok.apply_chat_template(CHATS[0]['messages'], tokenize=True)['input_ids']).count(
            '法国'
        )
        == 2
    )


def test_reload_through_gptqmodel(packed):
    import torch

    from llama_zh_nb.checkpoint.folder import load_quantized, one_message

    with one_message('gptqmodel'):
        from gptqmodel import GPTQModel

        m = GPTQModel.load(str(packed), device='cpu', dtype=torch.float32)
    assert torch.allclose(logits(m.model), logits(load_quantized(packed, 'cpu')), atol=1e-3)


def test_more_bits_are_nearer_and_tied_embeddings_stay_tied(tiny, packed, tmp_path):
    import torch
    import transformers as tf

    from llama_zh_nb.checkpoint.folder import load_quantized
    from llama_zh_nb.quantize import quantize

    torch.manual_seed(1)
    c = tf.AutoConfig.from_pretrained(tiny)
    c.tie_word_embeddings, c.num_hidden_layers = True, 1
    shutil.copytree(tiny, tmp_path / 'tied')
    m = tf.LlamaForCausalLM(c)
    m.save_pretrained(tmp_path / 'tied')
    far = {}
    for bits in (4, 8):
        quantize(
            tmp_path / 'tied',
            CHATS,
            tmp_path / 'out',
            QuantArgs(bits=bits, group_size=64, desc_act=True),
            device='cpu',
        )  # the second replaces the first
        q = load_quantized(tmp_path / 'out', 'cpu')
        far[bits] = (logits(q) - logits(m)).norm() / logits(m).norm()
    assert far[8] < 0.3 * far[4] < 0.1 and torch.equal(
        q.lm_head.weight, q.model.embed_tokens.weight
    )


def test_calibration(tiny):
    import transformers as tf

    from llama_zh_nb.quantize import calibration

    tok = tf.AutoTokenizer.from_pretrained(tiny)
    got = calibration(tok, CHATS, n=5, seed=1)
    assert len(got) == 5 and got == calibration(tok, CHATS, n=5, seed=1) != calibration(
        tok, CHATS, n=5, seed=2
    )
    assert all(i[0] == 1 and i[-1] == 2 and '[INST]' in tok.decode(i) for i in got)
    bad = [{'role': 'user', 'content': '写</s>和<s>'}, {'role': 'assistant', 'content': '</s>'}]
    (ids,) = calibration(tok, [bad])
    assert ids.count(1) == 1 and ids.count(2) == 1
    assert [len(i) for i in calibration(tok, ['法国的首都是巴黎。', '日本'], max_len=4)] == [
        4,
        3,
    ] or calibration(tok, ['法国'])[0][0] == 1
    for data, says in (([], 'no calibration text'), ([{'text': 'x'}], 'neither'), ([3], 'neither')):
        with pytest.raises(LlamaZhError, match=says):
            calibration(tok, data)


def test_shapes(tiny, packed, tmp_path):
    from llama_zh_nb.quantize import check_layers

    s = check_layers(tiny, 128)
    assert s.shapes == {(256, 128): 4, (128, 256): 2, (128, 128): 4, (64, 128): 4} and (
        s.group_size,
        s.left,
        s.note,
        len(s.kinds),
    ) == (128, [], '', 7)
    s = check_layers(tiny, 256)
    assert (s.group_size, s.left) == (128, []) and 'group size 128 in place of 256' in s.note
    for kw, says in (
        (dict(group_size=100), 'use one of 32, 64'),
        (dict(group_size=32, bits=5), 'bits=5'),
    ):
        with pytest.raises(LlamaZhError, match=says):
            check_layers(tiny, **kw)
    with pytest.raises(LlamaZhError, match='already quantized'):
        check_layers(packed, 32)


MLP = {'mlp.gate_proj', 'mlp.up_proj', 'mlp.down_proj'}


@pytest.fixture(scope='module')
def partly(shared, tmp_path_factory):
    "A model 172 wide in the middle, which no group size and no kernel takes; and what was printed"
    import contextlib
    import io

    from llama_zh_nb.quantize import quantize

    src, out, said = (
        shared / 'data' / 'models' / 'stories260K_hf',
        tmp_path_factory.mktemp('partly') / 'q',
        io.StringIO(),
    )
    with contextlib.redirect_stdout(said):
        quantize(
            src,
            ['once upon a time there was a little dog', 'the cat sat on the mat'] * 4,
            out,
            device='cpu',
        )
    return src, out, said.getvalue()


def test_what_does_not_fit_stays_in_16_bits(partly):
    import torch

    from llama_zh_nb.checkpoint.tensors import open_weights

    src, out, said = partly
    q = read_json(out / 'quantize.json')
    assert (
        set(q['left']) == MLP
        and q['group_size'] == 64
        and {line['module'].split('.')[-1] for line in q['layers']}
        == {'q_proj', 'k_proj', 'v_proj', 'o_proj'}
    )
    assert (
        said.count('\n') == 1
        and 'group size 64 in place of 128' in said
        and all(k in said for k in MLP)
        and '172' in said
    )
    a, b = open_weights(src), open_weights(out)
    left = [n for n in a if any(f'.{k}.' in n for k in MLP)]
    assert len(left) == 15 and all(
        b[n].spec(n)[0] == 'F16' and torch.equal(b[n].get(n), a[n].get(n).half()) for n in left
    )
    assert sum(n.endswith('.qweight') for n in b) == 20


def test_what_was_left_is_honoured_on_reload(partly):
    "The same logits through transformers, through gptqmodel, and by hand with the unpacked matrices put into the plain model"
    import torch
    import transformers as tf

    from llama_zh_nb.checkpoint.folder import load_quantized, one_message

    src, out, _ = partly
    plain, ours = (
        tf.AutoModelForCausalLM.from_pretrained(src, dtype=torch.float32),
        load_quantized(out, 'cpu'),
    )
    other = tf.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with one_message('gptqmodel'):
        from gptqmodel import GPTQModel

        direct = GPTQModel.load(str(out), device='cpu', dtype=torch.float32)
    before, got = logits(plain), logits(ours)
    assert 0 < (got - before).norm() < 0.15 * before.norm()
    assert torch.allclose(logits(other), got, atol=1e-4) and torch.allclose(
        logits(direct.model), got, atol=1e-3
    )
    with torch.inference_mode():
        for a, b in zip(plain.model.layers, ours.model.layers):
            assert (
                type(b.mlp.down_proj) is torch.nn.Linear
                and type(b.self_attn.q_proj) is not torch.nn.Linear
            )
            for n in 'qkvo':
                getattr(a.self_attn, n + '_proj').weight.copy_(
                    getattr(b.self_attn, n + '_proj')(torch.eye(64)).T
                )
        for p in plain.parameters():
            p.copy_(p.half().float())
    assert (logits(plain) - got).norm() < 0.005 * got.norm()


def test_a_model_of_which_nothing_fits(tmp_path):
    import transformers as tf

    from llama_zh_nb.quantize import quantize

    tf.LlamaForCausalLM(
        tf.LlamaConfig(
            hidden_size=48,
            intermediate_size=40,
            num_hidden_layers=1,
            num_attention_heads=4,
            vocab_size=64,
        )
    ).save_pretrained(tmp_path / 'm')
    with pytest.raises(
        LlamaZhError, match='no matrix of .* fits the GPTQ format.*divisible by 32.*in 16 bits'
    ):
        quantize(tmp_path / 'm', ['once upon a time'], tmp_path / 'q', QuantArgs(group_size=64))
    assert [p.name for p in tmp_path.iterdir()] == ['m']


def test_load_quantized_refuses(tiny, tmp_path):
    from llama_zh_nb.checkpoint.folder import load_quantized

    with pytest.raises(LlamaZhError, match='not quantized'):
        load_quantized(tiny, 'cpu')
    with pytest.raises(LlamaZhError, match='not a model'):
        load_quantized(tmp_path, 'cpu')


def test_a_failure_leaves_the_old_folder(tiny, tmp_path, monkeypatch):
    import gptqmodel

    from llama_zh_nb.quantize import quantize

    def broken(*a, **k):
        raise RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB')

    monkeypatch.setattr(gptqmodel.GPTQModel, 'load', broken)
    (tmp_path / 'q').mkdir()
    (tmp_path / 'q' / 'mine.txt').write_text('old')
    with pytest.raises(LlamaZhError, match='out of memory: use fewer or shorter'):
        quantize(tiny, CHATS, tmp_path / 'q', QuantArgs(group_size=32), device='cpu')
    assert [p.name for p in tmp_path.iterdir()] == ['q'] and (
        tmp_path / 'q' / 'mine.txt'
    ).read_text() == 'old'


def test_before_after(tiny, packed):
    from llama_zh_nb.evals.measure import measure_models

    qs = [
        dict(question=c['messages'][0]['content'], answer=c['messages'][1]['content'], kind='asked')
        for c in CHATS[:4]
    ]
    t = measure_models(
        {'before': tiny, 'after': packed},
        {'zh': ['法国的首都是巴黎。'], 'en': []},
        qs,
        device='cpu',
    )
    assert (
        t['after']['bytes'] < t['before']['bytes']
        and abs(t['after']['bpc_zh'] / t['before']['bpc_zh'] - 1) < 0.2
        and t['before']['accuracy']['asked']['n'] == 4
    )
    head, rule, *_ = t.table().markdown().splitlines()
    assert head.count('|') == rule.count('|')
