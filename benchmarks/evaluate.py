"""Multiple choice: ours (shared beginnings read once, batches by length) against one prompt at a time, the same questions and the same scores.

python benchmarks/evaluate.py runs/mini/chat                       # our own questions
python benchmarks/evaluate.py MODEL --tasks C-EVAL-FOLDER --limit 20 --json benchmarks/results/evaluate.json
"""

import argparse
import time
from functools import partial
from pathlib import Path

import torch
from _child import show

from llama_zh_nb.checkpoint.folder import context_length, load
from llama_zh_nb.core.settings import EvalArgs
from llama_zh_nb.evals.choice import (
    PromptEncoder,
    build_prompts,
    letter_ids,
    measure_task,
    shared_length,
)
from llama_zh_nb.evals.tasks import read_task


def plain_forward(model, ids):
    "Log-probabilities of every position: (positions, vocab)"
    logits = model(input_ids=torch.tensor([ids], device=model.device)).logits
    return logits[0].float().log_softmax(-1)


def letter_scores(model, tok, q, ids):
    logp = plain_forward(model, ids)[-1]
    spellings = [logp[row] for row in letter_ids(tok, len(q.options))]
    return torch.stack(spellings).logsumexp(0).tolist()


def text_scores(model, q, rows):
    start = min(shared_length(rows), min(map(len, rows)) - 1)
    scores = []
    for ids, option in zip(rows, q.options):
        logp = plain_forward(model, ids)[start - 1 : -1]  # predict the tokens from `start` on
        tokens = torch.tensor(ids[start:], device=model.device)[:, None]
        scores.append(logp.gather(-1, tokens).sum().item() / len(option))
    return scores


def one_at_a_time(model, tok, task, args):
    "Scores by plain forwards: one for each question (letters), one for each option (texts)"
    encoder, longest, scores = PromptEncoder(tok), min(context_length(model), 4096), {}
    with torch.inference_mode():
        for questions in task.subjects.values():
            questions = questions[: args.limit]
            prompts = build_prompts(encoder, task, questions, args.shots, args.by, longest)
            for q, ids in zip(questions, prompts.ids):
                if args.by == 'letter':
                    scores[q.id] = letter_scores(model, tok, q, ids)
                else:
                    scores[q.id] = text_scores(model, q, ids)
    return scores


def ours(model, tok, task, args):
    return {row['id']: row['scores'] for row in measure_task((model, tok), task, args).rows}


def timed(f):
    "(result, seconds, CPU seconds)"
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    result = f()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def compare(model, tok, task, args, repeat):
    "A row of the table"
    ways = dict(ours=ours, plain=one_at_a_time)
    runs = {
        way: [timed(partial(f, model, tok, task, args)) for _ in range(repeat)]
        for way, f in ways.items()
    }
    (mine, wall, cpu), (theirs, plain_wall, plain_cpu) = (
        (r[-1][0], min(x[1] for x in r), min(x[2] for x in r)) for r in runs.values()
    )
    gap = max(abs(x - y) for i in mine for x, y in zip(mine[i], theirs[i]))
    same = sum(mine[i].index(max(mine[i])) == s.index(max(s)) for i, s in theirs.items())
    return dict(
        task=task.name,
        by=args.by,
        shots=args.shots,
        questions=len(mine),
        ours_s=round(wall, 2),
        one_at_a_time_s=round(plain_wall, 2),
        times=round(plain_wall / wall, 1),
        cpu_times=round(plain_cpu / cpu, 1),
        same_choice=f'{same}/{len(mine)}',
        largest_difference=f'{gap:.1e}',
    )


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('model', nargs='?', default='runs/mini/chat')
    p.add_argument('--tasks', nargs='+', default=['world-zh'])
    p.add_argument('--split')
    p.add_argument('--limit', type=int, default=20)
    p.add_argument('--device', default='auto')
    p.add_argument('--repeat', type=int, default=2)
    p.add_argument('--json')
    a = p.parse_args()
    model, tok = load(a.model, a.device)
    rows = []
    for name in a.tasks:
        task = read_task(name, a.split)
        for by in ('letter', 'text'):
            for shots in (0, 5):
                if all(len(task.shots.get(s, [])) >= shots for s in task.subjects):
                    args = EvalArgs(shots=shots, by=by, limit=a.limit)
                    rows.append(compare(model, tok, task, args, a.repeat))
    show(
        f'Multiple choice on {Path(a.model).name}, {model.device.type}, '
        f'{torch.get_num_threads()} threads, best of {a.repeat}',
        rows,
        a.json,
        parameters=sum(p.numel() for p in model.parameters()),
    )


if __name__ == '__main__':
    main()
