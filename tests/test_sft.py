"Fine-tuning that learns answers only, packs without leaks, resumes and can be loaded."

import json

import pytest
from helpers.files import write
from helpers.tiny import CHATS, small_sft, talk, tiny

from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.text.chats import read_chats


def test_hostile_injection_ids(shared, tok):
    from llama_zh_nb.text.templates import encode_chats, get_template

    chats = read_chats(shared / 'data/hostile/sft/injection_sft.json')
    for name, per in (('alpaca2', 1), ('llama2-chat', 1), ('atom', 2)):
        for e in encode_chats(get_template(name), tok, [c['messages'] for c in chats]):
            assert e.ids.count(1) == e.ids.count(2) == per


# ---- training, on a tiny random Llama


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp('model'))


@pytest.fixture(scope='module')
def tok(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def load(d):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(d).eval()


def _grads(folder, tok, batches, trl, accum, **kw):
    "Gradients of the first step for the same examples in other batches."
    import torch

    from llama_zh_nb.core.settings import ComputeArgs, SftArgs
    from llama_zh_nb.sft import chat_trainer
    from llama_zh_nb.training.chat_rows import ChatCollate
    from llama_zh_nb.training.lora import load_base, prepare
    from llama_zh_nb.training.trainer import make_trainer

    cpu = ComputeArgs(device='cpu', report_to='none')
    model = prepare(load_base(folder, 'lora+new', cpu), 'lora+new', (310, 330), 4, 8, 0.0, 0)
    torch.manual_seed(1)
    for n, p in model.named_parameters():
        if 'lora_B' in n:
            torch.nn.init.normal_(p, std=0.05)
    if trl:
        from trl import SFTConfig

        kw |= dict(
            config_class=SFTConfig,
            dataset_kwargs=dict(skip_prepare_dataset=True),
            max_length=None,
            bf16=False,
            gradient_checkpointing=False,
        )
    weight = kw.pop('prompt_weight', 0.0)
    size = dict(batch=len(batches) // accum, accum=accum, max_steps=1)
    args = SftArgs(**size, lr=0.0, clip=0.0, warmup=0.05, weight_decay=0.01, save_every=None)
    t = make_trainer(
        model,
        batches,
        ChatCollate(3, weight),
        folder / 'x',
        args,
        cpu,
        trainer_class=chat_trainer(tok, trl=trl),
        **kw,
    )
    got = {}
    step = t.training_step

    def after(*a, **k):
        out = step(*a, **k)
        got.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return out

    t.training_step = after
    t.train()
    return got


def test_gradients_do_not_depend_on_trainer_or_accumulation(folder, tok):
    "trl's trainer, the plain one, accumulated or in one batch, packed or not: the same gradient, the new rows of lm_head among it."
    import torch

    from llama_zh_nb.training.chat_rows import examples

    items = examples(
        [
            CHATS[0],
            dict(messages=talk('a', 'It is far, the river is long, the sea is far.')),
            CHATS[1],
            dict(messages=talk('q', 'x')),
        ],
        tok,
    ).items
    single, packed = (
        [dict(parts=[e], row=i) for i, e in enumerate(items)],
        [dict(parts=items[:2], row=0), dict(parts=items[2:], row=1)],
    )
    want = _grads(folder, tok, single, False, 1)
    assert any(
        'lm_head' in n and 'trainable_tokens_delta' in n and g.abs().sum() > 0
        for n, g in want.items()
    )
    for rows, trl, accum in ((single, True, 4), (packed, True, 1), (packed, False, 2)):
        got = _grads(folder, tok, rows, trl, accum)
        assert got.keys() == want.keys()
        for n in want:
            torch.testing.assert_close(got[n], want[n], atol=1e-6, rtol=1e-4, msg=n)
    a, b = (
        _grads(folder, tok, rows, True, k, prompt_weight=0.1)
        for rows, k in ((single, 4), (packed, 1))
    )
    for n in a:
        torch.testing.assert_close(a[n], b[n], atol=1e-6, rtol=1e-4, msg=n)
    assert any((a[n] - want[n]).abs().max() > 1e-4 for n in a)


def test_finetune_leaves_a_plain_folder(folder, tok, tmp_path):
    import torch
    from transformers import AutoTokenizer

    from llama_zh_nb.sft import finetune
    from llama_zh_nb.text.templates import get_template

    out, texts = tmp_path / 'chat', write(tmp_path, 'plain.txt', 'The river is long. ' * 5)
    h = finetune(
        folder,
        CHATS,
        out,
        extra_texts=texts,
        heldout=dict(zh=['长江很长。']),
        questions=[dict(question='长江?', answer='长江很长。')],
        **small_sft(template='atom', text_share=0.2),
    )
    assert (
        h.last('loss') < h.first('loss')
        and h.last('zh_bpc')
        and h.last('right') is not None
        and not (out / 'checkpoints').exists()
    )
    assert h.info['data']['chats'] == 40 and h.info['data']['text_tokens'] > 0
    ct, m, old = AutoTokenizer.from_pretrained(out), load(out), load(folder)
    msgs = talk('长江?')
    assert (
        ct.apply_chat_template(msgs, add_generation_prompt=True)['input_ids']
        == get_template('atom').encode(tok, msgs, True).ids
    )
    assert (
        ct.pad_token_id == 3
        and ct.eos_token_id == 2
        and (out / 'adapter/adapter_model.safetensors').exists()
        and (out / 'tokenizer.model').exists()
    )
    for name in ('embed_tokens', 'lm_head'):
        a, b = (
            (
                x.get_input_embeddings() if name == 'embed_tokens' else x.get_output_embeddings()
            ).weight
            for x in (old, m)
        )
        assert torch.equal(a[:310], b[:310]) and not torch.equal(a[310:], b[310:])


def test_resume_is_exact(folder, tmp_path, monkeypatch):
    import torch

    from llama_zh_nb import sft

    kw = small_sft(lora_dropout=0.1, save_every=3)
    sft.finetune(folder, CHATS, tmp_path / 'a', **kw)

    class Stop(Exception):
        pass

    n, plain = [0], sft.ChatCollate.__call__

    def dies(self, rows):
        n[0] += 1
        if n[0] > 5:
            raise Stop
        return plain(self, rows)

    monkeypatch.setattr(sft.ChatCollate, '__call__', dies)
    with pytest.raises(Stop):
        sft.finetune(folder, CHATS, tmp_path / 'b', **kw)
    assert not (tmp_path / 'b/config.json').exists()
    monkeypatch.setattr(sft.ChatCollate, '__call__', plain)
    sft.finetune(folder, CHATS, tmp_path / 'b', **kw)
    a, b = load(tmp_path / 'a').state_dict(), load(tmp_path / 'b').state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('train', ['full', 'lora+embed'])
def test_other_trained_parts(folder, tmp_path, train):
    import torch

    from llama_zh_nb.sft import finetune

    finetune(
        folder, CHATS, tmp_path / 'c', **small_sft(train=train, max_steps=2, trl=train == 'full')
    )
    assert not torch.equal(
        load(folder).lm_head.weight[:310], load(tmp_path / 'c').lm_head.weight[:310]
    )


def test_folder_that_pads_with_its_end_mark(folder, tmp_path, capsys):
    "Such folders are common: the trained one pads otherwise, and its end mark is learnt."
    import shutil

    from transformers import AutoTokenizer

    from llama_zh_nb.sft import finetune

    d = tmp_path / 'm'
    shutil.copytree(folder, d)
    for f in ('tokenizer_config.json', 'special_tokens_map.json'):
        (d / f).write_text(json.dumps(json.loads((d / f).read_text()) | dict(pad_token='</s>')))
    (d / 'config.json').write_text(
        json.dumps(json.loads((d / 'config.json').read_text()) | dict(pad_token_id=2))
    )
    finetune(d, CHATS, tmp_path / 'out', **small_sft(max_steps=2))
    assert 'pads with its end mark' in capsys.readouterr().out
    t = AutoTokenizer.from_pretrained(tmp_path / 'out')
    assert (
        t.pad_token_id == 0
        and t.eos_token_id == 2
        and load(tmp_path / 'out').config.pad_token_id == 0
    )


def test_a_plain_base_learns_without_new_rows(folder, tmp_path, capsys):
    "Fine-tuning of a Llama as it came, no new vocabulary: LoRA alone, no row of the embeddings moves, the end mark is learnt."
    import shutil

    import torch

    from llama_zh_nb.sft import finetune

    d = tmp_path / 'plain'
    shutil.copytree(folder, d, ignore=shutil.ignore_patterns('resize.json'))
    h = finetune(d, CHATS, tmp_path / 'chat', **small_sft(max_steps=12))
    assert (
        'no new rows: training LoRA alone' in capsys.readouterr().out and h.info['train'] == 'lora'
    )
    old, new = load(d).state_dict(), load(tmp_path / 'chat').state_dict()
    for k in old:
        assert torch.equal(old[k], new[k]) == (not k.endswith('proj.weight')), k
    assert h.last('loss') < h.first('loss')


def test_packaged_mini_learns_as_it_is(tmp_path, root):
    "The same with the packaged base and its vocabulary, from files in two languages."
    from llama_zh_nb.sft import finetune
    from llama_zh_nb.weights import acquire

    base = acquire('mini', tmp_path / 'base')
    zh = write(
        tmp_path,
        'zh.json',
        json.dumps(
            [dict(instruction=f'{i}加{i}?', output=f'等于{2 * i}。') for i in range(30)],
            ensure_ascii=False,
        ),
    )
    en = write(
        tmp_path,
        'en.csv',
        'instruction,output\n'
        + ''.join(f'What is {i} and {i}?,It is {2 * i}.\n' for i in range(30)),
    )
    h = finetune(base, [zh, en], tmp_path / 'chat', **small_sft(max_steps=2, en_share=0.3))
    assert h.info['chats']['languages'] == dict(zh=30, en=30) and h.last('loss') < h.first('loss')
    assert (
        abs(h.info['mix']['en'] / sum(h.info['mix'].values()) - 0.3) < 0.1
        and (tmp_path / 'chat/chat_template.jinja').exists()
    )


@pytest.mark.parametrize(
    'kw,says',
    [
        (dict(batch=0), 'batch is 0'),
        (dict(max_steps=0), 'max_steps is 0'),
        (dict(max_steps=-1), 'max_steps is -1'),
        (dict(max_steps=None, epochs=0), 'epochs is 0'),
        (dict(accum=-2), 'accum is -2'),
        (dict(lr=-1.0), 'lr is -1'),
        (dict(prompt_weight=2), 'prompt_weight is 2'),
        (dict(train='lorra'), "'lorra': expected one of lora"),
        (dict(too_long='x'), "'x': expected one of turns"),
        (dict(attn='x'), "'x': expected one of sdpa"),
        (dict(block=10**6), 'positions of hf end'),
        (dict(template='chatml'), 'unknown chat template'),
        (dict(questions='nofile'), 'no such file of questions'),
        (dict(questions=[dict(q='x')]), 'question 1 has no'),
        (dict(en_share=0.5, chats=[dict(messages=talk('q', 'it is a'))]), 'all English'),
    ],
)
def test_wrong_values_are_refused_first(folder, tmp_path, kw, says):
    from llama_zh_nb.sft import finetune

    with pytest.raises(LlamaZhError, match=says):
        finetune(folder, kw.pop('chats', CHATS), tmp_path / 'o', **small_sft(**kw))
    assert not (tmp_path / 'o').exists()


def test_the_model_itself_is_never_overwritten(folder):
    from llama_zh_nb.sft import finetune

    with pytest.raises(LlamaZhError, match='is the model itself'):
        finetune(folder, CHATS, folder / '..' / folder.name, **small_sft())


def test_a_share_of_nothing_is_said(folder, tmp_path, capsys):
    from llama_zh_nb.sft import finetune

    h = finetune(folder, CHATS, tmp_path / 'o', **small_sft(max_steps=1, text_share=0.2))
    assert 'text_share is 0.2, but no extra_texts' in capsys.readouterr().out
    assert h.info['text_share'] is None


def test_one_step_learns_something(folder, tmp_path):
    from llama_zh_nb.sft import finetune

    finetune(folder, CHATS, tmp_path / 'o', **small_sft(max_steps=1))


def test_what_was_read_is_said_and_kept(folder, tmp_path, capsys):
    from llama_zh_nb.sft import finetune

    f = write(
        tmp_path,
        'a.jsonl',
        '{"prompt": "q", "response": "a"}\n{broken\n{"prompt": "q", "response": ""}\n'
        + json.dumps(dict(prompt='q', response='far ' * 300)),
    )
    h = finetune(folder, f, tmp_path / 'o', **small_sft(max_steps=1))
    said = capsys.readouterr().out
    assert (
        'a.jsonl, line 2: not valid JSON' in said
        and 'line 3: nothing to learn' in said
        and '1 chats are left out (a.jsonl:4' in said
    )
    assert [
        b[1] for b in json.loads((tmp_path / 'o/history.json').read_text())['info']['chats']['bad']
    ] == [2, 3] and h.info['data']['left_out_rows'][0].startswith('a.jsonl:4')
