"""Pretraining speed at a 7B shape: ours (LoRA and the new rows) beside plain transformers + peft (LoRA and whole embeddings), each in a process of its own.

    python benchmarks/train_gpu.py                                   # Llama-2-7B's shape, 55,296 rows, bfloat16, blocks of 1,024 and 4,096
    python benchmarks/train_gpu.py --lengths 1024 --batch 8 --json benchmarks/results/train_gpu_a100.json
    python benchmarks/train_gpu.py --shape tiny --device cpu         # a small shape, on a CPU too: that the script runs

Random weights, random tokens with a new document every 400 or so. Tokens per second from the steps after the first three; model FLOPs by `train_flops` (forward and backward, nothing for what checkpointing
repeats); utilisation against the dense bfloat16 peak of the card; peak memory as torch allocated it. `ours` keeps documents apart, `ours, mixed` runs them together as `plain` does. Where a way does not fit into memory
it is tried again with gradient checkpointing, and the table says so.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPES = dict(
    full=dict(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=55296,
        max_position_embeddings=4096,
    ),
    tiny=dict(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=576,
        max_position_embeddings=256,
    ),
)
PEAK = {
    'H200': 989e12,
    'H100': 989e12,
    'H800': 989e12,
    'A100': 312e12,
    'A800': 312e12,
    'L40S': 362e12,
    'L4': 121e12,
    '4090': 165e12,
    '3090': 71e12,
    'A10': 125e12,
}  # dense bfloat16
WAYS = ('plain', 'ours', 'ours, mixed')


def model_of(c):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    dev = 'cuda' if c['cuda'] else 'cpu'
    conf = LlamaConfig(**SHAPES[c['shape']], use_cache=False, attn_implementation=c['attn'])
    torch.manual_seed(0)
    with torch.device(dev), no_init_weights():
        m = LlamaForCausalLM(conf)
    m.to(torch.bfloat16 if c['cuda'] else torch.float32)
    with torch.no_grad():
        for p in m.parameters():
            p.fill_(1.0) if p.ndim == 1 else p.normal_(0, 0.02)
    return m


def rows_of(c):
    import numpy as np

    rng = np.random.default_rng(0)
    x = rng.integers(
        3, SHAPES[c['shape']]['vocab_size'], (c['batch'] * c['accum'] * c['steps'], c['length'])
    )
    x[rng.random(x.shape) < 1 / 400] = 1
    x[:, 0] = 1
    return x


def checkpointing(m):
    m.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    m.enable_input_require_grads()


def child(c):
    import numpy as np
    import torch
    import transformers
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from llama_zh_nb.core.machine import peak_rss, quiet
    from llama_zh_nb.core.settings import ComputeArgs, TrainArgs
    from llama_zh_nb.training.lora import prepare, trainable
    from llama_zh_nb.training.packing import BlockCollate, BlockRows
    from llama_zh_nb.training.trainer import make_trainer, train_flops

    m, data, old, dev = model_of(c), rows_of(c), c['old'], 'cuda' if c['cuda'] else 'cpu'
    rows, marks = BlockRows([data], np.arange(len(data))), []

    class Mark(TrainerCallback):
        def on_step_end(self, *a, **k):
            if c['cuda']:
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    if c['checkpointing']:
        checkpointing(m)
    with tempfile.TemporaryDirectory() as d, quiet():
        if c['way'] == 'plain':
            from peft import LoraConfig, get_peft_model

            m = get_peft_model(
                m,
                LoraConfig(
                    r=c['r'],
                    lora_alpha=2 * c['r'],
                    lora_dropout=0.05,
                    task_type='CAUSAL_LM',
                    target_modules=[
                        'q_proj',
                        'k_proj',
                        'v_proj',
                        'o_proj',
                        'gate_proj',
                        'up_proj',
                        'down_proj',
                    ],
                    modules_to_save=['embed_tokens', 'lm_head'],
                ),
            )
            for p in m.parameters():
                if p.requires_grad:
                    p.data = p.data.float()

            def collate(rs):
                x = torch.from_numpy(np.stack([r['input_ids'] for r in rs])).long()
                return dict(input_ids=x, labels=x.clone())

            t = Trainer(
                m,
                TrainingArguments(
                    d,
                    per_device_train_batch_size=c['batch'],
                    gradient_accumulation_steps=c['accum'],
                    max_steps=c['steps'],
                    learning_rate=2e-4,
                    lr_scheduler_type='cosine',
                    bf16=c['cuda'],
                    use_cpu=not c['cuda'],
                    report_to='none',
                    disable_tqdm=True,
                    save_strategy='no',
                    logging_steps=1,
                    remove_unused_columns=False,
                ),
                train_dataset=rows,
                data_collator=collate,
            )
        else:
            m = prepare(
                m, 'lora+new', (old, SHAPES[c['shape']]['vocab_size']), c['r'], 2 * c['r'], 0.05
            )
            mixed = c['way'].endswith('mixed')
            flat = c['attn'] == 'flash_attention_2' and not mixed
            args = TrainArgs(
                batch=c['batch'],
                accum=c['accum'],
                max_steps=c['steps'],
                lr=2e-4,
                log_every=1,
                save_every=None,
            )
            compute = ComputeArgs(device=dev, report_to='none')
            t = make_trainer(m, rows, BlockCollate(1, mixed, flat), d, args, compute)
        for cb in (transformers.PrinterCallback,):
            t.remove_callback(cb)
        t.add_callback(Mark())
        t.train()
    steps = np.diff(marks)[2:]
    out = dict(
        tokens_per_second=c['batch'] * c['accum'] * c['length'] / statistics.median(steps),
        flops_per_token=train_flops(m, c['length']),
        trained=trainable(m)[0],
        parameters=trainable(m)[1],
        loss=[round(r['loss'], 4) for r in t.state.log_history if 'loss' in r],
        step_ms=[round(s * 1e3, 2) for s in steps],
        peak_bytes=torch.cuda.max_memory_allocated() if c['cuda'] else peak_rss(),
    )
    print('RESULT ' + json.dumps(out))


def run(c):
    "The child's result; with gradient checkpointing if it does not fit without"
    for again in (False, True):
        c = c | dict(checkpointing=c['checkpointing'] or again)
        p = subprocess.run(
            [sys.executable, __file__, '--child', json.dumps(c)],
            capture_output=True,
            text=True,
            env=os.environ | {'HF_HUB_OFFLINE': '1', 'LLAMA_ZH_PROGRESS': '0'},
        )
        for line in p.stdout.splitlines():
            if line.startswith('RESULT '):
                return dict(json.loads(line[7:]), checkpointing=c['checkpointing'])
        if 'out of memory' not in p.stderr.lower():
            raise SystemExit(p.stderr[-3000:])
    return None  # does not fit at all


def main():
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument('--lengths', type=int, nargs='+')
    a.add_argument(
        '--tokens', type=int, default=8192, help='in a forward pass: batch = tokens / length'
    )
    a.add_argument('--batch', type=int)
    a.add_argument('--accum', type=int, default=1)
    a.add_argument('--steps', type=int, default=15)
    a.add_argument('--r', type=int, default=64)
    a.add_argument('--checkpointing', action='store_true')
    a.add_argument(
        '--attn', help="'sdpa' or 'flash_attention_2'; default: the latter where it is installed"
    )
    a.add_argument('--ways', nargs='+', default=WAYS, choices=WAYS)
    a.add_argument('--shape', choices=('7b', 'tiny'), default='7b')
    a.add_argument('--tiny', action='store_true', help='as --shape tiny')
    a.add_argument('--device', choices=('auto', 'cpu', 'cuda'), default='auto')
    a.add_argument(
        '--peak',
        type=float,
        help='dense bfloat16 peak of the card in TFLOP/s, where the script does not know it',
    )
    a.add_argument(
        '--json', help='default: benchmarks/results/train_gpu_DEVICE.json; none with --tiny'
    )
    a.add_argument('--child', help=argparse.SUPPRESS)
    a = a.parse_args()
    if a.child:
        return child(json.loads(a.child))
    a.tiny = a.tiny or a.shape == 'tiny'
    if (
        min(a.steps, a.tokens, a.r, a.accum, 1 if a.batch is None else a.batch, *(a.lengths or [1]))
        < 1
    ):
        raise SystemExit('lengths, tokens, batch, accum, steps and r are whole numbers above 0')
    if a.steps < 5:
        raise SystemExit('--steps: at least 5, the first three are not measured')
    if max(a.lengths or [1]) > SHAPES['tiny' if a.tiny else 'full']['max_position_embeddings']:
        raise SystemExit('--lengths: longer than the shape has positions')
    import importlib.util

    import peft
    import torch
    import transformers

    if a.device == 'cuda' and not torch.cuda.is_available():
        raise SystemExit('--device cuda: torch sees no CUDA GPU here')
    cuda = torch.cuda.is_available() and a.device != 'cpu'
    if not cuda and not a.tiny:
        raise SystemExit(
            'this needs a CUDA GPU with 40 GB or more; --shape tiny runs a small shape on a CPU'
        )
    name = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    peak = (
        a.peak * 1e12
        if a.peak
        else next((v for k, v in PEAK.items() if k in name), None)
        if cuda
        else None
    )
    attn = a.attn or (
        'flash_attention_2' if cuda and importlib.util.find_spec('flash_attn') else 'sdpa'
    )
    shape, lengths = (
        'tiny' if a.tiny else 'full',
        a.lengths or ([64, 128] if a.tiny else [1024, 4096]),
    )
    c = dict(
        shape=shape,
        cuda=cuda,
        attn=attn,
        accum=a.accum,
        steps=a.steps if not a.tiny else min(a.steps, 8),
        r=a.r if not a.tiny else 8,
        old=32000 if not a.tiny else 320,
        checkpointing=a.checkpointing,
    )
    rows = []
    print(
        f'{name}, torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, {attn}\n{"length":>7} {"way":12} {"tokens/s":>10} {"MFU":>6} {"peak GiB":>9} {"trained":>12} {"over plain":>11}'
    )
    for n in lengths:
        base = None
        for way in a.ways:
            r = run(
                c
                | dict(
                    way=way,
                    length=n,
                    batch=a.batch or max(1, (a.tokens if not a.tiny else 256) // n),
                )
            )
            if r is None:
                print(f'{n:7,} {way:12} does not fit')
                rows.append(dict(length=n, way=way, fits=False))
                continue
            base = r['tokens_per_second'] if way == 'plain' else base
            r['mfu'] = r['tokens_per_second'] * r['flops_per_token'] / peak if peak else None
            r['over_plain'] = r['tokens_per_second'] / base if base else None
            rows.append(dict(length=n, way=way, **r))
            print(
                f'{n:7,} {way:12} {r["tokens_per_second"]:10,.0f} {"" if r["mfu"] is None else format(r["mfu"], ".1%"):>6} {r["peak_bytes"] / 2**30:9.1f} {r["trained"]:12,} {"" if not base else format(r["over_plain"], ".2f"):>11}'
                + (' (gradient checkpointing)' if r['checkpointing'] else ''),
                flush=True,
            )
    path = a.json or (
        None
        if a.tiny
        else str(Path(__file__).parent / 'results' / f'train_gpu_{name.replace(" ", "_")}.json')
    )
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(
            json.dumps(
                dict(
                    device=name,
                    peak_flops=peak,
                    settings=c,
                    versions=dict(
                        torch=torch.__version__,
                        transformers=transformers.__version__,
                        peft=peft.__version__,
                        python=platform.python_version(),
                    ),
                    rows=rows,
                ),
                indent=1,
            )
            + '\n'
        )
    return None


if __name__ == '__main__':
    main()
