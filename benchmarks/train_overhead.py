"""What our training loop costs over a bare one: the same LoRA model, batches and optimizer, in turns.

python benchmarks/train_overhead.py                  # mini's shape: hidden 256, 4 layers, 3,968 rows, 8 x 256 tokens
python benchmarks/train_overhead.py --hidden 512 --layers 8 --json out.json
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path


def main():
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for k, v in dict(
        hidden=256,
        layers=4,
        heads=4,
        rows=3968,
        old=2048,
        batch=8,
        block=256,
        steps=12,
        rounds=3,
        r=32,
    ).items():
        a.add_argument(f'--{k}', type=int, default=v)
    a.add_argument('--json')
    a.add_argument('--threads', type=int)
    a = a.parse_args()
    import numpy as np
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        get_cosine_schedule_with_warmup,
    )

    from llama_zh_nb.core.machine import quiet
    from llama_zh_nb.core.settings import ComputeArgs, TrainArgs
    from llama_zh_nb.training.lora import prepare
    from llama_zh_nb.training.packing import BlockCollate, BlockRows
    from llama_zh_nb.training.trainer import make_trainer

    if a.threads:
        torch.set_num_threads(a.threads)
    rng = np.random.default_rng(0)
    data = rng.integers(3, a.rows, (a.batch * a.steps, a.block))
    data[rng.random(data.shape) < 0.01] = 1  # a document every hundred tokens
    rows, clock = BlockRows([data], np.arange(len(data))), (time.perf_counter, time.process_time)

    def model():
        c = LlamaConfig(
            vocab_size=a.rows,
            hidden_size=a.hidden,
            intermediate_size=a.hidden * 5 // 2,
            num_hidden_layers=a.layers,
            num_attention_heads=a.heads,
            max_position_embeddings=a.block,
            use_cache=False,
        )
        return prepare(LlamaForCausalLM(c), 'lora+new', (a.old, a.rows), a.r, 2 * a.r)

    def bare():
        m, collate, marks = model().train(), BlockCollate(1), []
        ps = [p for p in m.parameters() if p.requires_grad]
        opt = torch.optim.AdamW(ps, 1e-3, fused=True)
        sched = get_cosine_schedule_with_warmup(opt, 1, a.steps)
        for i in range(a.steps):
            b = collate([rows[j] for j in range(i * a.batch, (i + 1) * a.batch)])
            b.pop('row')
            loss = m(**b).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(ps, 1.0)
            opt.step()
            sched.step()
            opt.zero_grad()
            loss.item()
            marks.append([c() for c in clock])
        return marks

    def timed(make):
        marks = []

        class Mark(TrainerCallback):
            def on_step_end(self, *args, **kw):
                marks.append([c() for c in clock])

        with tempfile.TemporaryDirectory() as d, quiet():
            t = make(d)
            t.add_callback(Mark())
            t.remove_callback(PrinterCallback)
            t.train()
        return marks

    def ours():
        args = TrainArgs(batch=a.batch, accum=1, max_steps=a.steps, lr=1e-3, save_every=None)
        compute = ComputeArgs(device='cpu', report_to='none')
        return timed(lambda d: make_trainer(model(), rows, BlockCollate(1), d, args, compute))

    def plain():
        def collate(rs):
            b = BlockCollate(1)(rs)
            b.pop('row')
            return b

        return timed(
            lambda d: Trainer(
                model(),
                TrainingArguments(
                    d,
                    per_device_train_batch_size=a.batch,
                    max_steps=a.steps,
                    learning_rate=1e-3,
                    lr_scheduler_type='cosine',
                    use_cpu=True,
                    report_to='none',
                    disable_tqdm=True,
                    save_strategy='no',
                    logging_steps=1,
                    remove_unused_columns=False,
                ),
                train_dataset=rows,
                data_collator=collate,
            )
        )

    ways, got = {'bare loop': bare, 'ours': ours, 'plain Trainer': plain}, {}
    for _ in range(a.rounds):
        for name, f in ways.items():
            got.setdefault(name, []).extend(np.diff(np.array(f()), axis=0)[1:])
    out = {
        k: dict(
            wall_ms=statistics.median(x[0] for x in v) * 1e3,
            cpu_ms=statistics.median(x[1] for x in v) * 1e3,
        )
        for k, v in got.items()
    }
    print(
        f'{"":14} {"wall ms/step":>13} {"CPU ms/step":>12} {"tokens/s":>9} {"over bare (CPU)":>16}'
    )
    for k, v in out.items():
        print(
            f'{k:14} {v["wall_ms"]:13.1f} {v["cpu_ms"]:12.1f} {a.batch * a.block / v["wall_ms"] * 1e3:9,.0f} {v["cpu_ms"] / out["bare loop"]["cpu_ms"] - 1:16.1%}'
        )
    if a.json:
        Path(a.json).write_text(
            json.dumps(
                dict(
                    args=vars(a),
                    threads=torch.get_num_threads(),
                    torch=torch.__version__,
                    results=out,
                ),
                indent=1,
            )
        )


if __name__ == '__main__':
    main()
