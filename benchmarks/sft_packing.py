"""Answered tokens per second: packed rows against padding to the longest chat of a batch, same model, same chats, same number of chats a step, in one run.

    python benchmarks/sft_packing.py --model runs/mini/pretrained|tokenizer.model --chats FILES_OR_FOLDER [--block 512] [--steps 12] [--json out.json]

The padded way is what a plain `Trainer` does: chats in random order, right padding, an attention mask, logits of every position. The packed way is `llama_zh_nb.sft`'s:
best-fit rows, positions that restart, logits of the learnt positions alone. A third way pads too, but sorts by length first, as `group_by_length` does. All see the same chats;
the mean loss per answered token is compared too. Wall time and CPU time are both given: on a machine that does other work at the same time only the latter says something (with --threads 1).
"""

import argparse
import json
import platform
import time
from pathlib import Path


def batches(items, size):
    return [items[i : i + size] for i in range(0, len(items) - size + 1, size)]


def run(model, steps, loss_of):
    "Wall seconds and CPU seconds of a forward and backward pass over all `steps`; mean loss of the learnt tokens; their number."
    wall, cpu, total, n = time.perf_counter(), time.process_time(), 0.0, 0
    for s in steps:
        loss, k = loss_of(model, s)
        loss.backward()
        model.zero_grad(set_to_none=True)
        total += loss.item()
        n += k
    return time.perf_counter() - wall, time.process_time() - cpu, total / n, n


def small(path):
    "A random Llama of mini's shape (256 wide, 4 layers) for the vocabulary in `path`."
    import tempfile

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llama_zh_nb.checkpoint.folder import load_tokenizer
    from llama_zh_nb.tokenizer.exact import save_tokenizer

    tok = load_tokenizer(save_tokenizer(path, tempfile.mkdtemp()))
    torch.manual_seed(0)
    return tok, LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tok),
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=4096,
            use_cache=False,
        )
    )


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--model', required=True)
    p.add_argument('--chats', nargs='+', required=True)
    p.add_argument('--template', default='alpaca2')
    p.add_argument('--block', type=int, default=512)
    p.add_argument('--batch', type=int, default=8)
    p.add_argument('--steps', type=int, default=12)
    p.add_argument('--repeats', type=int, default=2)
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--device', default='cpu')
    p.add_argument('--json')
    a = p.parse_args()
    import random

    import torch
    from torch.nn.functional import cross_entropy, pad

    from llama_zh_nb.checkpoint.folder import load_tokenizer, pad_id
    from llama_zh_nb.core.settings import ComputeArgs
    from llama_zh_nb.sft import add_learn_argument
    from llama_zh_nb.text.chats import read_chats
    from llama_zh_nb.training.chat_rows import ChatCollate, Examples, Packed, examples
    from llama_zh_nb.training.lora import load_base

    torch.set_num_threads(a.threads)
    tok, model = (
        small(a.model)
        if a.model.endswith('.model')
        else (load_tokenizer(a.model), load_base(a.model, 'full', ComputeArgs(device=a.device)))
    )
    model.to(a.device)
    add_learn_argument(model)
    data = examples(read_chats(a.chats), tok, a.template, block=a.block)
    items = random.Random(0).sample(data.items, min(len(data.items), a.steps * a.batch))
    collate, dev = ChatCollate(pad_id(tok)), lambda b: {k: v.to(a.device) for k, v in b.items()}

    def padded(m, chats):
        b = dev(collate([dict(parts=[e], row=i) for i, e in enumerate(chats)]))
        mask = torch.tensor(
            [[1] * len(e.ids) + [0] * (b['input_ids'].shape[1] - len(e.ids)) for e in chats],
            device=a.device,
        )
        y = b['labels'][:, 1:]
        return cross_entropy(
            m(input_ids=b['input_ids'], attention_mask=mask).logits[:, :-1].flatten(0, 1).float(),
            y.flatten(),
            reduction='sum',
        ), int((y != -100).sum())

    def packed(m, rows):
        b = dev(collate(rows))
        y = b['labels'][:, 1:]
        learn = pad(y != -100, (0, 1))
        return cross_entropy(
            m(input_ids=b['input_ids'], position_ids=b['position_ids'], learn=learn).float(),
            y[learn[:, :-1]],
            reduction='sum',
        ), int(learn.sum())

    pk = Packed(Examples(items, {}), a.block)
    rows, per = [pk[i] for i in range(len(pk))], max(1, round(len(pk) / (len(items) / a.batch)))
    by_length = sorted(items, key=lambda e: len(e.ids))
    plans = {
        'padded to the longest': (batches(items, a.batch), padded),
        'padded, sorted by length': (batches(by_length, a.batch), padded),
        'packed': ([rows[i : i + per] for i in range(0, len(rows), per)], packed),
    }
    width = {
        n: sum(max(len(e.ids) for e in b) * len(b) for b in steps)
        if f is padded
        else len(rows) * a.block
        for n, (steps, f) in plans.items()
    }
    best = {}
    for _ in range(
        a.repeats
    ):  # in turn, so that whatever else the machine does falls on all of them
        for name, (steps, f) in plans.items():
            got = run(model, steps, f)
            best[name] = (
                got
                if name not in best
                else (min(best[name][0], got[0]), min(best[name][1], got[1]), *got[2:])
            )
    out = {
        name: dict(
            seconds=round(w, 3),
            cpu_seconds=round(c, 3),
            answered_tokens=n,
            answered_per_second=round(n / w, 1),
            answered_per_cpu_second=round(n / c, 1),
            positions=width[name],
            loss=round(loss, 5),
        )
        for name, (w, c, loss, n) in best.items()
    }
    base, ours = out['padded to the longest'], out['packed']
    ratio = {
        k: round(ours[k] / base[k], 2) for k in ('answered_per_second', 'answered_per_cpu_second')
    }
    for k in plans:
        print(f'{k:26}' + '  '.join(f'{n} {v:,}' for n, v in out[k].items()))
    print(
        f'packed against padded to the longest: {ratio["answered_per_second"]} times the answered tokens per second, {ratio["answered_per_cpu_second"]} per CPU second; loss differs by {abs(ours["loss"] - base["loss"]):.1e}'
    )
    out |= dict(
        ratio=ratio,
        chats=len(items),
        block=a.block,
        batch=a.batch,
        threads=a.threads,
        torch=torch.__version__,
        machine=platform.machine(),
    )
    if a.json:
        Path(a.json).write_text(json.dumps(out, indent=1))


if __name__ == '__main__':
    main()
