"""Tiny models, texts and chats that the tests of training share, and settings from flat names."""

import json
import random
from dataclasses import fields
from pathlib import Path

from helpers.pieces import train_bpe

from llama_zh_nb.checkpoint.tensors import open_weights
from llama_zh_nb.core.machine import quiet
from llama_zh_nb.core.settings import ChatArgs, ComputeArgs, LoraArgs, SftArgs, TrainArgs

OLD = 60  # rows that count as old in the tiny folder


def texts(n, seed=0, zh=True):
    r = random.Random(seed)
    who, does = (
        (
            ['春天', '河水', '山里', '孩子', '老人', '小猫', '茶叶', '米饭'],
            ['喜欢', '看见', '想起', '走过', '带来'],
        )
        if zh
        else (
            ['the river', 'a child', 'old tea', 'the hill', 'a cat'],
            [' likes ', ' sees ', ' finds '],
        )
    )
    return [
        ('' if zh else ' ').join(
            r.choice(who) + r.choice(does) + r.choice(who) + ('。' if zh else '.')
            for _ in range(r.randint(2, 9))
        )
        for _ in range(n)
    ]


def make(out, tied=False, rows=None, seed=0):
    "A Hugging Face folder: two thin random layers, a small BPE tokenizer"
    import torch
    from tokenizers import Tokenizer, decoders, models, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    t = Tokenizer(models.BPE(unk_token='<unk>'))
    t.train_from_iterator(
        texts(200) + texts(200, zh=False),
        trainers.BpeTrainer(
            vocab_size=150, special_tokens=['<unk>', '<s>', '</s>'], show_progress=False
        ),
    )
    t.decoder = decoders.Fuse()
    tok = PreTrainedTokenizerFast(
        tokenizer_object=t, bos_token='<s>', eos_token='</s>', unk_token='<unk>'
    )
    torch.manual_seed(seed)
    c = LlamaConfig(
        vocab_size=rows or -(-len(tok) // 8) * 8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
    )
    with quiet():
        LlamaForCausalLM(c).save_pretrained(out)
        tok.save_pretrained(out)
    (Path(out) / 'resize.json').write_text(json.dumps(dict(old_rows=OLD)))
    return Path(out)


ZH, EN = texts(120, 1), texts(60, 2, False)
HELD = dict(zh=texts(6, 3), en=texts(6, 4, False))


def grouped(cls, flat):
    "Arguments of `pretrain` or `finetune` from flat names, as on a command line; no measuring, no saving and no accumulation unless it is named"
    flat = dict(accum=1, eval_every=None, save_every=None) | flat

    def take(cls, prefix=''):
        names = [f.name for f in fields(cls) if prefix + f.name in flat]
        return cls(**{name: flat.pop(prefix + name) for name in names})

    made = dict(args=take(cls), lora=take(LoraArgs, 'lora_'), compute=take(ComputeArgs))
    if cls is SftArgs:
        made['chat'] = take(ChatArgs)
    return made | flat


SMALL = dict(
    replay_corpus=EN,
    lora_r=4,
    lora_alpha=8,
    lora_dropout=0.1,
    block=64,
    batch=4,
    lr=5e-3,
    max_steps=12,
    eval_every=4,
    save_every=4,
    log_every=2,
    heldout=HELD,
    device='cpu',
)


def small(**changes):
    "Arguments of a small pretraining, with `changes` under flat names"
    return grouped(TrainArgs, SMALL | changes)


def tensors(folder):
    return {k: f.get(k) for k, f in open_weights(folder).items()}


def tiny(d):
    "A tiny untied Llama with random weights and a tokenizer of its own in `d`/hf; its last 20 rows count as new."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llama_zh_nb.tokenizer.exact import save_tokenizer

    text = (
        'The river is long.\n[INST] Where is the sea? [/INST] It is far.\n长江很长。黄河在哪里？\n'
        * 20
    )
    train_bpe(d / 'm', text.splitlines(), 330, pad_id=3, hard_vocab_limit=False)
    save_tokenizer(d / 'm.model', d / 'hf')
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=330,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
            tie_word_embeddings=False,
        )
    ).save_pretrained(d / 'hf')
    (d / 'hf/resize.json').write_text('{"old_rows": 310}')
    return d / 'hf'


def talk(*texts):
    return [dict(role=('user', 'assistant')[i % 2], content=t) for i, t in enumerate(texts)]


CHATS = [
    dict(messages=talk(f'Where is {i}?', f'It is {i * 7}.', '长江?', '长江很长。'))
    for i in range(40)
]


def small_sft(**changes):
    "Arguments of a small fine-tuning, with `changes` under flat names"
    flat = dict(
        train='lora+new',
        lora_r=4,
        lora_alpha=8,
        lora_dropout=0.0,
        block=128,
        batch=2,
        lr=1e-2,
        max_steps=6,
        log_every=1,
        text_share=None,
        device='cpu',
    )
    return grouped(SftArgs, flat | changes)
