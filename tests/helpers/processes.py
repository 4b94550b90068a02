"""Runs in several processes: their environment, and a fine-tuning on chats of very different lengths."""

import os
from pathlib import Path

from helpers.tiny import grouped, talk

from llama_zh_nb.core.settings import SftArgs

TESTS = Path(__file__).resolve().parent.parent

CHAT_KW = dict(
    lora_r=4,
    lora_alpha=8,
    lora_dropout=0.0,
    block=128,
    batch=2,
    global_batch=4,
    lr=1e-2,
    max_steps=6,
    eval_every=3,
    save_every=3,
    log_every=1,
    text_share=0.2,
    device='cpu',
)


def chat_run(base, out, die=0, **kw):
    "Fine-tune on chats of very different lengths, so that processes have different numbers of answered tokens; `die` at that batch"
    import llama_zh_nb.sft as s

    chats = [
        dict(messages=talk(f'Where is {i}?', 'It is far. ' * (1 + i * i % 9))) for i in range(60)
    ]

    class Dies(s.ChatCollate):
        n = 0

        def __call__(self, rows):
            Dies.n += 1
            if Dies.n == die:
                os._exit(9)
            return super().__call__(rows)

    was, s.ChatCollate = s.ChatCollate, Dies
    try:
        return s.finetune(
            base,
            chats,
            out,
            extra_texts=['The river is long. ' * 5] * 9,
            heldout=dict(zh=['长江很长。'] * 3),
            questions=[dict(question=f'Where is {i}?', answer='It is far.') for i in range(3)],
            **grouped(SftArgs, CHAT_KW | kw),
        )
    finally:
        s.ChatCollate = was


def env(**kw):
    return (
        os.environ
        | dict(
            OMP_NUM_THREADS='1',
            HF_HUB_OFFLINE='1',
            LLAMA_ZH_PROGRESS='0',
            DS_ACCELERATOR='cpu',
            PYTHONPATH=os.pathsep.join([str(TESTS.parent), os.environ.get('PYTHONPATH', '')]),
        )
        | kw
    )
