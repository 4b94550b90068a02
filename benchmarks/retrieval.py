"""How often the right paragraph is found: character-bigram BM25 beside our lexical, dense and hybrid search, with the questions in their own script and in the other one.

    python benchmarks/retrieval.py cmrc2018/cmrc2018_trial.json drcd/DRCD_dev.json --json out.json
    python benchmarks/retrieval.py FILES --embedding bge-small-zh --rerank bge-reranker-base      # models on this disk, or Hub ids
    python benchmarks/retrieval.py --documents 10000 --workers 2 [--embedding none]               # time and memory of indexing generated files

Files are in SQuAD's form. Every paragraph of a file is a document; the question's own paragraph is the right one. Intervals are 95 %: Wilson's for shares, of 1,000 resamples
for the mean reciprocal rank. The bigram BM25 is Lucene's formula with its parameters (k1 1.2, b .75) on pairs of neighbouring characters as they stand."""

import argparse
import itertools
import json
import math
import os
import random
import resource
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault('LLAMA_ZH_PROGRESS', '0')
import numpy as np
from langchain_core.documents import Document

from llama_zh_nb.core.machine import peak_rss
from llama_zh_nb.core.settings import RagArgs
from llama_zh_nb.documents.index import build_index, open_index
from llama_zh_nb.documents.recall import Retrieval, eval_retrieval, pick_threshold


class Bigrams:
    "BM25 of character bigrams, in Lucene's form, with the retriever's `find`"

    def __init__(self, docs, k1=1.2, b=0.75):
        self.docs, self.terms = docs, {}
        counts = [Counter(self.pairs(d.page_content)) for d in docs]
        lens = np.array([sum(c.values()) for c in counts])
        for i, c in enumerate(counts):
            for w, n in c.items():
                self.terms.setdefault(w, []).append(
                    (i, n * (k1 + 1) / (n + k1 * (1 - b + b * lens[i] / lens.mean())))
                )

    def pairs(self, t):
        return [t[i : i + 2] for i in range(len(t) - 1)]

    def find(self, question, k):
        s, n = np.zeros(len(self.docs)), len(self.docs)
        for w in self.pairs(question):
            if rows := self.terms.get(w):
                idf = math.log(1 + (n - len(rows) + 0.5) / (len(rows) + 0.5))
                for i, x in rows:
                    s[i] += idf * x
        return [self.docs[i] for i in np.argsort(-s, kind='stable')[:k] if s[i] > 0]


def squad(path):
    "(documents, questions) of a file"
    paras = [
        p
        for x in json.loads(Path(path).read_text(encoding='utf-8'))['data']
        for p in x['paragraphs']
    ]
    docs = [
        Document(p['context'], metadata={'source': f'p{i}', 'chunk': f'p{i}'})
        for i, p in enumerate(paras)
    ]
    return docs, [
        {'question': q['question'], 'source': f'p{i}'}
        for i, p in enumerate(paras)
        for q in p['qas']
    ]


def other_script(questions):
    "The questions in the other script, and its name"
    import opencc

    simple = opencc.OpenCC('t2s').convert
    moved = [simple(q['question']) for q in questions]
    how = (
        't2s'
        if sum(a != q['question'] for a, q in zip(moved, questions)) > len(questions) / 2
        else 's2t'
    )
    return {'t2s': 'simplified', 's2t': 'traditional'}[how], [
        {**q, 'question': opencc.OpenCC(how).convert(q['question'])} for q in questions
    ]


def measure(path, a, tmp):
    docs, qs = squad(path)
    name, other = other_script(qs)
    print(f'\n{Path(path).name}: {len(docs):,} paragraphs, {len(qs):,} questions')
    t = time.time()
    build_index(
        docs,
        tmp / Path(path).stem,
        args=RagArgs(chunk_tokens=a.chunk_tokens, embedding=a.embedding),
    )
    print(f'indexed in {time.time() - t:.1f} s')
    systems = {'bigram BM25': Bigrams(docs)} | {
        s: open_index(tmp / Path(path).stem, search=s) for s in ('lexical', 'dense', 'hybrid')
    }
    if a.rerank:
        systems['hybrid, reranked'] = open_index(
            tmp / Path(path).stem, search='hybrid', rerank=a.rerank
        )
    rows = {}
    for label, index in systems.items():
        for script, asked in (('own', qs[:: a.every]), (name, other[:: a.every])):
            t = time.time()
            e: Retrieval = eval_retrieval(index, asked)
            ci = e.intervals()
            rows[f'{label}, {script}'] = {
                **e.to_dict(),
                'intervals': ci,
                'ms': round((time.time() - t) / len(asked) * 1000, 1),
            }
            show = '  '.join(
                f'{v:.3f} ({ci[k][0]:.3f}-{ci[k][1]:.3f})'
                for k, v in [*((f'r@{k}', e.recall(k)) for k in (1, 5, 10)), ('mrr', e.mrr)]
            )
            print(f'{label:18}{script:12}{show}', flush=True)
    rows['thresholds'] = {
        s: pick_threshold(systems[s], qs[:: a.every], save=False)._asdict()
        for s in ('lexical', 'dense', 'hybrid')
    }
    for s, x in rows['thresholds'].items():
        print(
            f'threshold {s:10}{x["value"]:.3f}: answers {x["answered"]:.1%}, refuses {x["refused"]:.1%} with the passage hidden'
        )
    return rows


def many(a, tmp):
    "Index generated files, then again, then with one in a hundred changed"
    rng, chars = (
        random.Random(0),
        [
            bytes([x, y]).decode('gb2312', 'ignore')
            for x in range(0xB0, 0xD7)
            for y in range(0xA1, 0xFA)
        ],
    )
    weights = list(itertools.accumulate(1 / (i + 3) for i in range(len(chars))))

    def text():
        return ''.join(
            ''.join(rng.choices(chars, cum_weights=weights, k=rng.randint(8, 30))) + '。'
            for _ in range(40)
        )

    (tmp / 'docs').mkdir()
    for i in range(a.documents):
        (tmp / 'docs' / f'{i}.txt').write_text(f'第{i}号文件。\n{text()}', encoding='utf-8')
    out = {}

    def step(name):
        t = time.time()
        ix = build_index(
            tmp / 'docs',
            tmp / 'ix',
            workers=a.workers,
            args=RagArgs(embedding=a.embedding, chunk_tokens=a.chunk_tokens),
        )
        mib = max(peak_rss(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10) / 2**20
        out[name] = dict(
            seconds=round(time.time() - t, 1),
            chunks=len(ix),
            largest_process_mib=round(mib),
            **({} if name == 'nothing changed' else ix.info['update']),
        )
        print(f'{name:24}', out[name], flush=True)

    step('all')
    step('nothing changed')
    for i in range(0, a.documents, 100):
        (tmp / 'docs' / f'{i}.txt').write_text(f'第{i}号文件，新稿。\n{text()}', encoding='utf-8')
    step('1 in 100 changed')
    t = time.time()
    ix = open_index(tmp / 'ix')
    opened = time.time() - t
    t = time.time()
    found = [
        ix.find(f'第{i}号文件', k=1)[0].metadata['source'] == f'{i}.txt' for i in range(1, 200)
    ]
    out['search'] = dict(
        open_seconds=round(opened, 2),
        ms=round((time.time() - t) / len(found) * 1000, 1),
        right=sum(found),
        of=len(found),
        index_mib=round(
            sum(f.stat().st_size for f in (tmp / 'ix').rglob('*') if f.is_file()) / 2**20
        ),
    )
    print(f'{"search":24}', out['search'])
    return out


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('files', nargs='*')
    p.add_argument('--documents', type=int)
    p.add_argument('--workers', type=int)
    p.add_argument('--json')
    p.add_argument('--embedding', default='lexical')
    p.add_argument('--rerank')
    p.add_argument('--chunk-tokens', type=int, default=256)
    p.add_argument('--every', type=int, default=1, help='only every n-th question')
    a = p.parse_args()
    if a.documents:
        with tempfile.TemporaryDirectory() as tmp:
            out = many(a, Path(tmp))
        if a.json:
            Path(a.json).write_text(json.dumps(out, indent=1))
        return
    if not a.files:
        p.error("name files in SQuAD's form, or --documents N")
    print(f'{"":30}R@1{"":18}R@5{"":18}R@10{"":17}MRR')
    with tempfile.TemporaryDirectory() as tmp:
        rows = {Path(f).stem: measure(f, a, Path(tmp)) for f in a.files}
    print(f'\npeak memory {peak_rss() / 2**20:,.0f} MiB')
    if a.json:
        Path(a.json).write_text(
            json.dumps(dict(embedding=a.embedding, **rows), ensure_ascii=False, indent=1)
        )


if __name__ == '__main__':
    main()
