"""Our server with its answers made together, against the same server making one at a time: same folder, same questions, round by round in one run.

    python benchmarks/serve.py --model runs/mini/chat --questions runs/mini/world/questions.jsonl [--clients 1 4 16] [--requests 8] [--rounds 3] [--batch 16] [--threads 1] [--json out.json]

Two server processes run side by side; only one is asked at a time, in an order that changes from round to round, so that other work on the machine burdens both alike.
Each client sends its requests one after the other, streamed and greedy, over HTTP. "tok/s" counts new tokens of all clients over the time until the last one is done,
"first" is the median time until the first text, "last" the time within which 95 % of the answers were complete. Both servers must give the same answers.
In bfloat16 two nearly equal tokens may change places in a batch: the answers that differ are counted and shown.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path


def questions(path, seed):
    rows = [
        json.loads(line)['question']
        for line in Path(path).read_text(encoding='utf-8-sig').splitlines()
        if line.strip()
    ]
    return random.Random(seed).sample(rows, len(rows))


def start(a, batch):
    "A server process; its address"
    kw = dict(
        port=0,
        name='m',
        preset='greedy',
        max_batch=batch,
        max_waiting=1000,
        device=a.device,
        dtype=a.dtype,
        template=a.template,
    )
    code = 'import sys, json; from llama_zh_nb.serve import serve; serve(sys.argv[1], **json.loads(sys.argv[2]))'
    p = subprocess.Popen(
        [sys.executable, '-c', code, a.model, json.dumps(kw)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS=str(a.threads)),
    )
    line = p.stdout.readline()
    if not line:
        raise SystemExit(f'the server did not start: llama-zh serve {a.model} says why')
    return p, line.split()[-1]


async def one(http, url, q, most):
    "An answer, its tokens, and the seconds until its first and its last text"
    t, first, text, tokens = time.perf_counter(), None, '', 0
    body = dict(
        model='m',
        messages=[dict(role='user', content=q)],
        max_tokens=most,
        stream=True,
        stream_options=dict(include_usage=True),
    )
    async with http.stream('POST', f'{url}/chat/completions', json=body) as r:
        if r.status_code != 200:
            raise SystemExit((await r.aread()).decode())
        async for line in r.aiter_lines():
            if not line.startswith('data: {'):
                continue
            x = json.loads(line[6:])
            if x.get('usage'):
                tokens = x['usage']['completion_tokens']
            elif new := x['choices'][0]['delta'].get('content'):
                text, first = text + new, first or time.perf_counter() - t
    return q, text, tokens, first or time.perf_counter() - t, time.perf_counter() - t


async def load(url, qs, clients, requests, most):
    "All answers, and the seconds they took together"
    import httpx

    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=clients)) as http:

        async def client(k):
            return [
                await one(http, url, qs[(k * requests + i) % len(qs)], most)
                for i in range(requests)
            ]

        t = time.perf_counter()
        rows = sum(await asyncio.gather(*[client(k) for k in range(clients)]), [])
        return rows, time.perf_counter() - t


def row(rows, seconds):
    last = sorted(r[4] for r in rows)
    return dict(
        answers=len(rows),
        tokens=sum(r[2] for r in rows),
        seconds=seconds,
        tokens_per_second=sum(r[2] for r in rows) / seconds,
        first=statistics.median(r[3] for r in rows),
        last95=last[int(0.95 * (len(last) - 1))],
    )


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--model', required=True)
    p.add_argument('--questions', required=True)
    p.add_argument('--template')
    p.add_argument('--clients', type=int, nargs='+', default=[1, 4, 16])
    p.add_argument('--requests', type=int, default=8)
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--batch', type=int, default=16)
    p.add_argument('--max-new-tokens', type=int, default=64)
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--device', default='auto')
    p.add_argument('--dtype')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--json')
    a = p.parse_args()
    from llama_zh_nb.core.errors import write_json
    from llama_zh_nb.core.machine import versions

    qs, rng = questions(a.questions, a.seed), random.Random(a.seed)
    servers = {'together': start(a, a.batch), 'one at a time': start(a, 1)}
    try:
        for _, url in servers.values():
            asyncio.run(load(url, qs, 2, 2, 8))  # warm up
        got, texts = (
            {(n, k): ([], 0.0) for n in a.clients for k in servers},
            {k: {} for k in servers},
        )
        for n in a.clients:
            for _ in range(a.rounds):
                for k in rng.sample(list(servers), 2):
                    rows, s = asyncio.run(load(servers[k][1], qs, n, a.requests, a.max_new_tokens))
                    got[n, k] = (got[n, k][0] + rows, got[n, k][1] + s)
                    texts[k].update((r[0], r[1]) for r in rows)
    finally:
        for proc, _ in servers.values():
            proc.kill()
            proc.wait()
    table = {f'{n} clients, {k}': row(*v) for (n, k), v in got.items()}
    print(
        f'{a.model}, {a.threads} threads, at most {a.batch} together\n{"":32} {"tok/s":>8} {"first s":>8} {"last s":>8}'
    )
    for k, v in table.items():
        print(f'{k:32} {v["tokens_per_second"]:8.1f} {v["first"]:8.2f} {v["last95"]:8.2f}')
    for n in a.clients:
        print(
            f'{n} clients: {table[f"{n} clients, together"]["tokens_per_second"] / table[f"{n} clients, one at a time"]["tokens_per_second"]:.2f} times as many tokens a second together'
        )
    one_, two = texts.values()
    differ = [q for q in one_ if one_[q] != two[q]]
    print(
        f'{len(one_) - len(differ)} of {len(one_)} different questions got the same answer from both'
    )
    for q in differ[:3]:
        print(f'  {q!r}: {one_[q]!r} / {two[q]!r}')
    if a.json:
        write_json(
            a.json,
            dict(
                model=a.model,
                batch=a.batch,
                threads=a.threads,
                device=a.device,
                processor=platform.processor(),
                versions=versions(),
                same=len(one_) - len(differ),
                questions=len(one_),
                rows=table,
            ),
        )
    return 1 if differ and a.dtype in (None, 'float32') and a.device in ('auto', 'cpu') else 0


if __name__ == '__main__':
    raise SystemExit(main())
