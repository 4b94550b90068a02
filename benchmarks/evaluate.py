"""Multiple choice: ours (shared beginnings read once, batches by length) against one prompt at a time, the same questions and the same scores.

python benchmarks/evaluate.py runs/mini/chat                       # our own questions
python benchmarks/evaluate.py MODEL --tasks C-EVAL-FOLDER --limit 20 --json benchmarks/results/evaluate.json
"""

import argparse
import time
from pathlib import Path

from _child import show


def one_at_a_time(model, tok, task, shots, by, limit, max_len):
    "Scores by plain forwards: one for each question (letters), one for each option (texts)"
    import torch

    from llama_zh_nb.evals.choice import _prompts, common, letter_ids

    out = {}
    with torch.inference_mode():
        for qs in task.subjects.values():
            qs = qs[:limit]
            for q, ids in zip(
                qs, _prompts(tok, task, qs, shots, by, 'base', None, None, max_len)[0]
            ):
                if by == 'letter':
                    lp = (
                        model(input_ids=torch.tensor([ids], device=model.device), logits_to_keep=1)
                        .logits[0, -1]
                        .float()
                        .log_softmax(-1)
                    )
                    out[q.id] = (
                        torch.stack([lp[r] for r in letter_ids(tok, len(q.options))])
                        .logsumexp(0)
                        .tolist()
                    )
                else:
                    start = min(common(ids), min(map(len, ids)) - 1)
                    out[q.id] = []
                    for x, o in zip(ids, q.options):
                        lp = (
                            model(input_ids=torch.tensor([x], device=model.device))
                            .logits[0, start - 1 : -1]
                            .float()
                            .log_softmax(-1)
                        )
                        out[q.id].append(
                            lp.gather(-1, torch.tensor(x[start:], device=model.device)[:, None])
                            .sum()
                            .item()
                            / len(o)
                        )
    return out


def main():
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument('model', nargs='?', default='runs/mini/chat')
    a.add_argument('--tasks', nargs='+', default=['world-zh'])
    a.add_argument('--split')
    a.add_argument('--limit', type=int, default=20)
    a.add_argument('--device', default='auto')
    a.add_argument('--repeat', type=int, default=2)
    a.add_argument('--json')
    a = a.parse_args()
    import torch

    from llama_zh_nb.checkpoint.folder import load
    from llama_zh_nb.evals.choice import evaluate
    from llama_zh_nb.evals.tasks import read_task

    model, tok = load(a.model, a.device)
    max_len, rows, sync = (
        min(model.config.max_position_embeddings, 4096),
        [],
        (lambda: torch.cuda.synchronize() if model.device.type == 'cuda' else None),
    )
    for name in a.tasks:
        task = read_task(name, a.split)
        for by, shots in (('letter', 0), ('letter', 5), ('text', 0), ('text', 5)):
            if shots and any(len(task.shots.get(s, [])) < shots for s in task.subjects):
                continue
            ways = {
                'ours': lambda: {
                    x['id']: x['scores']
                    for x in evaluate((model, tok), task, shots, by=by, limit=a.limit).rows
                },
                'one at a time': lambda: one_at_a_time(
                    model, tok, task, shots, by, a.limit, max_len
                ),
            }
            best, got = {}, {}
            for _ in range(a.repeat):
                for way, f in ways.items():
                    sync()
                    t, c = time.perf_counter(), time.process_time()
                    got[way] = f()
                    sync()
                    best[way] = min(
                        best.get(way, (1e9, 1e9)),
                        (time.perf_counter() - t, time.process_time() - c),
                    )
            gap = max(
                abs(x - y)
                for i in got['ours']
                for x, y in zip(got['ours'][i], got['one at a time'][i])
            )
            best_of = lambda s: max(range(len(s)), key=s.__getitem__)
            same = sum(
                best_of(got['ours'][i]) == best_of(s) for i, s in got['one at a time'].items()
            )
            rows.append(
                dict(
                    task=task.name,
                    by=by,
                    shots=shots,
                    questions=len(got['ours']),
                    ours_s=round(best['ours'][0], 2),
                    one_at_a_time_s=round(best['one at a time'][0], 2),
                    times=round(best['one at a time'][0] / best['ours'][0], 1),
                    cpu_times=round(best['one at a time'][1] / best['ours'][1], 1),
                    same_choice=f'{same}/{len(got["ours"])}',
                    largest_difference=f'{gap:.1e}',
                )
            )
    show(
        f'Multiple choice on {Path(a.model).name}, {model.device.type}, {torch.get_num_threads()} threads, best of {a.repeat}',
        rows,
        a.json,
        parameters=sum(p.numel() for p in model.parameters()),
    )


if __name__ == '__main__':
    main()
