"""Speculative decoding against plain greedy decoding: same model, same prompts, prompt by prompt in one run.

    python benchmarks/speculative.py --model runs/mini/chat --draft runs/mini/draft --questions runs/mini/world/questions.jsonl [--n 100] [--tokens 4 8] [--threads 2] [--json out.json]

Ways: transformers' plain `generate`; a draft that writes a fixed number of tokens ahead; the same, adaptive; the prompt's own words (no draft). Each prompt is answered by every
way in turn, in an order that changes, so that other work on the machine burdens all alike. "same" counts answers that equal the plain ones, token for token; it must be all of them.
Without --draft only the prompt's words are tried. --context puts a JSON field of each question in front of it, to be read from.
"""

import argparse
import json
import platform
import random
from pathlib import Path


def questions(path, n, seed, context):
    lines = Path(path).read_text(encoding='utf-8-sig').splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    rows = random.Random(seed).sample(rows, min(n, len(rows)))
    return [f'{r[context]}\n{r["question"]}' if context else r['question'] for r in rows]


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--model', required=True)
    p.add_argument('--draft')
    p.add_argument('--questions', required=True)
    p.add_argument('--context')
    p.add_argument('--template')
    p.add_argument('--n', type=int, default=100)
    p.add_argument('--tokens', type=int, nargs='+', default=[4, 8])
    p.add_argument('--max-new-tokens', type=int, default=64)
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--device', default='auto')
    p.add_argument('--dtype')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--json')
    a = p.parse_args()
    import torch

    from llama_zh_nb.checkpoint.folder import load
    from llama_zh_nb.core.errors import write_json
    from llama_zh_nb.core.machine import versions
    from llama_zh_nb.generation.decoding import Decoded, Race, decode, load_draft
    from llama_zh_nb.text.templates import find_template, get_template

    torch.set_num_threads(a.threads)
    model, tok = load(a.model, a.device, a.dtype)
    t = get_template(a.template or find_template(tok) or 'alpaca2')
    prompts = [
        t.encode(tok, [dict(role='user', content=q)], True).ids
        for q in questions(a.questions, a.n, a.seed, a.context)
    ]
    ways = {'plain': {}}
    for n in a.tokens:
        if a.draft:
            ways |= {
                f'draft, {n}': dict(assistant_model=load_draft(a.draft, model, tok, n, False)),
                f'adaptive from {n}': dict(
                    assistant_model=load_draft(a.draft, model, tok, n, True)
                ),
            }
        ways[f'lookup, {n}'] = dict(prompt_lookup_num_tokens=n)
    done, rng = {k: Decoded() for k in ways}, random.Random(a.seed)
    for kw in ways.values():
        decode(model, tok, prompts[0], 4, **kw)  # warm up
    for ids in prompts:
        for k in rng.sample(list(ways), len(ways)):
            decode(model, tok, ids, a.max_new_tokens, done[k], **ways[k])
    race = Race(done)
    print(
        f'{a.model}, {len(prompts)} prompts, {a.threads} threads, {model.device}, {next(model.parameters()).dtype}\n{race}'
    )
    wrong = [k for k in done if race.same(k) < len(prompts)]
    if wrong:
        print('answers differ from the plain ones:', ', '.join(wrong))
    if a.json:
        write_json(
            a.json,
            dict(
                model=a.model,
                draft=a.draft,
                prompts=len(prompts),
                threads=a.threads,
                device=str(model.device),
                processor=platform.processor(),
                versions=versions(),
                ways=race.to_dict(),
            ),
        )
    return 1 if wrong else 0


if __name__ == '__main__':
    raise SystemExit(main())
