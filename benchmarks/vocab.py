"""Our vocabulary beside the published merge rule and a published vocabulary of the same size: tokens, dead pieces, exactness, time, memory.

    python benchmarks/vocab.py --base llama2/tokenizer.model --published other/tokenizer.model --corpus zh/*.txt --heldout more/*.txt --json out.json

Without --heldout every fifth file of the corpus is left out and measured on. With --folds N the sources are dealt into N parts in turn, and each part is measured with
a vocabulary that was chosen without it, first from the corpus alone, then, where --add names models, with these. Each file is a source of its own, but files whose names begin with
one of --together are one source (books by one author: `author`; one text in two files: `one+other`) and are left out together.
With --thirds every file is cut into twelve, and every third part is held out: other text of the same sources. There the genre is what a file's name begins with (`news_a.txt`, `news_b.txt`).
Strings of a JSON file of unknown fields count where they hold Chinese: an id is no text."""

import argparse
import json
import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from llama_zh_nb.core.machine import peak_rss
from llama_zh_nb.text.files import json_strings
from llama_zh_nb.tokenizer.audit import audit, fertility
from llama_zh_nb.tokenizer.exact import read_model
from llama_zh_nb.tokenizer.pieces import HAN, text_stream
from llama_zh_nb.vocab import merge


def documents(f):
    return list(text_stream(f)) or [s for s in json_strings(f) if re.search(f'[{HAN}]', s)]


def by_genre(files):
    return {f.stem + ('.jsonl' if f.suffix == '.jsonl' else ''): documents(f) for f in files}


def one_fold(base, add, published, size, train, held, out):
    "Characters per token, published and ours, on texts that the choice of pieces never saw"
    ours = merge(base, add, out, size=size, corpus=train)
    texts = held if isinstance(held, dict) else by_genre(held)
    pub, our = fertility(published, texts), fertility(ours.path, texts)
    return {k: dict(published=pub[k], ours=our[k], ratio=our[k] / pub[k]) for k in our}


def summary(rows):
    ratio = [r['ratio'] for r in rows.values()]
    return dict(worst=min(ratio), mean=sum(ratio) / len(ratio))


def folds(a, files, size, tmp):
    "Every source left out once, without and with the models of --add"

    def source(f):
        for together in a.together:
            if any(f.stem.startswith(begin) for begin in together.split('+')):
                return together
        return f.stem

    sources, out = sorted({source(f) for f in files}), {}
    with ProcessPoolExecutor(a.jobs) as pool:
        for name, add in dict(alone=[], add=a.add).items():
            if name == 'add' and not a.add:
                continue
            jobs = []
            for i in range(a.folds):
                held = [f for f in files if source(f) in sources[i :: a.folds]]
                jobs.append(
                    pool.submit(
                        one_fold,
                        a.base,
                        add,
                        a.published,
                        size,
                        [f for f in files if f not in held],
                        held,
                        tmp / f'{name}{i}',
                    )
                )
            rows = {k: r for j in jobs for k, r in j.result().items()}
            out[name] = dict(files=dict(sorted(rows.items())), **summary(rows))
    for k in out['alone']['files']:
        print(
            f'without {k:32}'
            + ''.join(
                f'   {n}: {out[n]["files"][k]["published"]:.3f} -> {out[n]["files"][k]["ours"]:.3f} x {out[n]["files"][k]["ratio"]:.3f}'
                for n in out
            )
        )
    for n in out:
        print(f'{n}: worst {out[n]["worst"]:.3f}, mean {out[n]["mean"]:.3f}')
    return dict(
        folds=a.folds, together=a.together, added=[Path(m).name for m in a.add], size=size, **out
    )


def parts(f, folder):
    "A file's lines in twelve parts: two thirds go to a file in `folder`, one third is held out"
    lines = [s for d in documents(f) for s in d.split('\n') if s.strip()]
    n = max(1, len(lines) // 12)
    out = folder / f'{f.stem}.txt'
    train = [line for i, line in enumerate(lines) if i // n % 3 != 1]
    out.write_text('\n'.join(train), encoding='utf-8')
    return out, [line for i, line in enumerate(lines) if i // n % 3 == 1]


def thirds(a, files, size, tmp):
    "A third of every file held out, by genre: without and with the models of --add"
    (tmp / 'train').mkdir()
    cut = [
        parts(f, tmp / 'train')
        for f in files
        if not (f.suffix == '.jsonl' and f.with_suffix('.txt') in files)
    ]
    texts, ways = {}, dict(alone=[], **(dict(add=a.add) if a.add else {}))
    for f, held in cut:
        texts.setdefault(f.stem.split('_')[0], []).extend(held)
        texts[f.stem] = held
    with ProcessPoolExecutor(a.jobs) as pool:
        jobs = {
            n: pool.submit(
                one_fold, a.base, add, a.published, size, [f for f, _ in cut], texts, tmp / n
            )
            for n, add in ways.items()
        }
        rows = {n: j.result() for n, j in jobs.items()}
    genre = {n: {k: v for k, v in r.items() if '_' not in k} for n, r in rows.items()}
    for k in rows['alone']:
        print(
            f'{k:34}'
            + ''.join(
                f'   {n}: {r[k]["published"]:.3f} -> {r[k]["ours"]:.3f} x {r[k]["ratio"]:.3f}'
                for n, r in rows.items()
            )
        )
    for n in rows:
        print(
            f'{n}: by genre worst {summary(genre[n])["worst"]:.3f}, mean {summary(genre[n])["mean"]:.3f}'
        )
    return dict(
        thirds=True,
        added=[Path(m).name for m in a.add],
        size=size,
        **{n: dict(files=rows[n], **summary(genre[n])) for n in rows},
    )


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--base', required=True)
    p.add_argument('--published', required=True)
    p.add_argument('--corpus', nargs='+', required=True)
    p.add_argument('--heldout', nargs='+')
    p.add_argument('--add', nargs='*', default=[])
    p.add_argument('--size', type=int)
    p.add_argument('--json')
    p.add_argument('--folds', type=int, default=0)
    p.add_argument('--thirds', action='store_true')
    p.add_argument('--together', nargs='*', default=[])
    p.add_argument('--jobs', type=int, default=2)
    a = p.parse_args()
    files = sorted(map(Path, a.corpus))
    size, tmp = a.size or len(read_model(a.published).pieces), Path(tempfile.mkdtemp())
    if a.folds or a.thirds:
        out = (folds if a.folds else thirds)(a, files, size, tmp)
        if a.json:
            Path(a.json).write_text(
                json.dumps(out, ensure_ascii=False, indent=1) + '\n', encoding='utf-8'
            )
        return
    held = [Path(f) for f in a.heldout] if a.heldout else files[2::5]
    train = [f for f in files if f not in held]
    t = time.time()
    ours = merge(a.base, a.add, tmp / 'ours', size=size, corpus=train)
    seconds, peak = time.time() - t, peak_rss()
    out = {}
    for name, path in dict(published=a.published, ours=ours.path).items():
        r = audit(path, base=a.base, texts=by_genre(held))
        out[name] = dict(
            pieces=r.size,
            dead=len(r.dead),
            ties=r.ties,
            changed=len(r.changed),
            plain=r.plain,
            differ=len(r.differ),
            compared=r.compared,
            characters_per_token=r.after,
        )
        print(
            f'{name:10} {r.size:,} pieces, {len(r.dead):,} dead; {len(r.changed):,} of {r.plain:,} lines without Chinese changed; tokenizer.json differs on {len(r.differ):,} of {r.compared:,} lines'
        )
    pub, our = out['published']['characters_per_token'], out['ours']['characters_per_token']
    for k in our:
        print(f'{k:32}{pub[k]:8.3f}{our[k]:8.3f}   x {our[k] / pub[k]:.3f}')
    ratio = [our[k] / pub[k] for k in our]
    print(
        f'{"worst, mean":32}{min(ratio):27.3f}, {sum(ratio) / len(ratio):.3f}\n{seconds:.0f} s, peak {peak / 2**20:,.0f} MiB, {sum(f.stat().st_size for f in train) / 1e6:.0f} MB of text'
    )
    if a.json:
        Path(a.json).write_text(
            json.dumps(
                out
                | dict(seconds=seconds, peak=peak, worst=min(ratio), mean=sum(ratio) / len(ratio)),
                ensure_ascii=False,
                indent=1,
            )
            + '\n',
            encoding='utf-8',
        )


if __name__ == '__main__':
    main()
