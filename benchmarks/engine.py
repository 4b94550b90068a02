"""Our engine against transformers' continuous batching: same model, same questions, same number of callers, round by round in one run.

    python benchmarks/engine.py --model runs/mini/chat --questions runs/mini/world/questions.jsonl [--callers 16] [--n 64] [--rounds 3] [--threads 1] [--json out.json]

Each caller is a thread that asks its questions one after the other, greedily. "tok/s" counts the new tokens of all over the time until the last is done; "same" are the answers that `generate` gives
to a question alone. Then what a server needs beside speed: does a seed decide a sampled answer whoever shares the batch, and is a repetition penalty the one of `generate`?
"""

import argparse
import json
import random
import threading
import time
from pathlib import Path


def questions(path, n, seed):
    lines = Path(path).read_text(encoding='utf-8-sig').splitlines()
    rows = [json.loads(line)['question'] for line in lines if line.strip()]
    return random.Random(seed).sample(rows, min(n, len(rows)))


def in_threads(callers, answer, prompts):
    "Answers by number, and the seconds until the last one is there; `answer` is called by `callers` threads"
    answers = {}

    def call(first):
        for i in range(first, len(prompts), callers):
            answers[i] = answer(prompts[i])

    threads = [threading.Thread(target=call, args=(k,)) for k in range(callers)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[i] for i in range(len(prompts))], time.perf_counter() - started


class Ours:
    def __init__(self, folder, a):
        from llama_zh_nb.serving.engine import Engine

        self.engine = Engine(
            folder,
            max_batch=a.callers,
            max_waiting=a.n,
            max_new_tokens=a.max_new_tokens,
            template=a.template,
            device=a.device,
            dtype=a.dtype,
        )
        self.most = a.max_new_tokens

    def answer(self, ids, **settings):
        job = self.engine.submit(ids, settings or None, self.most)
        job.wait()
        return job.new

    def sampled(self, prompts, seed):
        hot = dict(temperature=1.8, top_k=0, top_p=1.0)
        jobs = [self.engine.submit(p, hot, self.most, seed=seed) for p in prompts]
        return [job.new for job in jobs if job.wait()]

    def penalized(self, ids, penalty):
        return self.answer(ids, repetition_penalty=penalty)

    def close(self):
        self.engine.close()


class Theirs:
    def __init__(self, folder, a):
        import transformers as tf

        from llama_zh_nb.checkpoint.folder import load

        self.tf, self.most = tf, a.max_new_tokens
        self.model, self.tok = load(folder, a.device, a.dtype)
        self.size = dict(
            num_blocks=4 * a.callers,
            page_size=64,
            max_batch_tokens=1024,
            max_requests_per_batch=a.callers,
        )
        self.manager = self.model.init_continuous_batching(
            generation_config=self.settings(do_sample=False),
            continuous_batching_config=tf.ContinuousBatchingConfig(**self.size),
        )
        self.manager.start()

    def settings(self, **more):
        eos = self.tok.eos_token_id
        return self.tf.GenerationConfig(
            max_new_tokens=self.most, eos_token_id=eos, pad_token_id=0, **more
        )

    def answer(self, ids):
        name = self.manager.add_request(ids)
        while True:
            got = self.manager.get_result(request_id=name, timeout=1)
            if got is not None and got.is_finished():
                return got.generated_tokens

    def batch(self, prompts, seed=None, **settings):
        out = self.model.generate_batch(
            prompts,
            generation_config=self.settings(**settings),
            continuous_batching_config=self.tf.ContinuousBatchingConfig(**self.size, seed=seed),
        )
        return [out[k].generated_tokens for k in sorted(out, key=lambda k: int(k.split('_')[-1]))]

    def sampled(self, prompts, seed):
        return self.batch(prompts, seed, do_sample=True, temperature=1.8, top_k=0)

    def penalized(self, ids, penalty):
        return self.batch([ids], do_sample=False, repetition_penalty=penalty)[0]

    def close(self):
        self.manager.stop(block=True)


def alone(model, tok, ids, most, **settings):
    "What `generate` answers"
    import torch

    x = torch.tensor([ids], device=model.device)
    out = model.generate(
        input_ids=x,
        attention_mask=torch.ones_like(x),
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=tok.eos_token_id,
        pad_token_id=0,
        **settings,
    )
    return out[0, len(ids) :].tolist()


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--model', required=True)
    p.add_argument('--questions', required=True)
    p.add_argument('--template')
    p.add_argument('--callers', type=int, default=16)
    p.add_argument('--n', type=int, default=64)
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--max-new-tokens', type=int, default=64)
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--device', default='auto')
    p.add_argument('--dtype')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--json')
    a = p.parse_args()
    import torch

    from llama_zh_nb.checkpoint.folder import load
    from llama_zh_nb.core.errors import write_json
    from llama_zh_nb.core.machine import versions
    from llama_zh_nb.text.templates import find_template, get_template

    torch.set_num_threads(a.threads)
    model, tok = load(a.model, a.device, a.dtype)
    template = get_template(a.template or find_template(tok) or 'alpaca2')
    asked = questions(a.questions, a.n, a.seed)
    prompts = [template.encode(tok, [dict(role='user', content=q)], True).ids for q in asked]
    want = [alone(model, tok, ids, a.max_new_tokens) for ids in prompts]

    def text_ids(ids):  # with the end mark or without
        return [i for i in ids if i != tok.eos_token_id]

    ways = dict(ours=Ours(a.model, a), transformers=Theirs(a.model, a))
    seconds, same = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0)
    rng = random.Random(a.seed)
    for way in ways.values():
        way.answer(prompts[0])  # warm up
    for _ in range(a.rounds):
        for name in rng.sample(list(ways), 2):
            got, took = in_threads(a.callers, ways[name].answer, prompts)
            seconds[name] += took
            same[name] += sum(text_ids(x) == text_ids(y) for x, y in zip(got, want))
    for way in ways.values():
        way.close()

    ways = dict(ours=Ours(a.model, a), transformers=Theirs(a.model, a))
    ways['transformers'].close()  # `generate_batch` has a manager of its own
    few, penalty = prompts[:3], 2.5
    penalized = alone(model, tok, few[0], a.max_new_tokens, repetition_penalty=penalty)
    tokens, rows = a.rounds * sum(map(len, want)), {}
    for name, way in ways.items():
        by_itself = [way.sampled([ids], seed=7)[0] for ids in few]
        together = way.sampled(few, seed=7)
        rows[name] = dict(
            tokens_per_second=tokens / seconds[name],
            same=same[name],
            answers=a.rounds * len(prompts),
            same_when_sampled_beside_others=sum(x == y for x, y in zip(by_itself, together)),
            penalty_as_generate=way.penalized(few[0], penalty) == penalized,
        )
    ways['ours'].close()
    print(f'{a.model}, {a.callers} callers, {a.threads} threads, {model.device}')
    for name, row in rows.items():
        print(
            f'{name:13} {row["tokens_per_second"]:7.1f} tok/s  same {row["same"]}/{row["answers"]}  '
            f'sampled beside others: {row["same_when_sampled_beside_others"]} of {len(few)} as alone  '
            f'repetition penalty as generate: {row["penalty_as_generate"]}'
        )
    if a.json:
        out = dict(model=a.model, callers=a.callers, threads=a.threads, versions=versions())
        write_json(a.json, dict(out, device=str(model.device), ways=rows))
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
