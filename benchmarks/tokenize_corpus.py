"""Text to packed blocks: ours beside the way of the earlier projects (a slow tokenizer through `datasets.map`, then `group_texts`), in turns.

    python benchmarks/tokenize_corpus.py --tokenizer runs/mini/tokenizer --corpus zh/*.txt
    python benchmarks/tokenize_corpus.py --tokenizer DIR --corpus zh/*.txt --workers 4 --json benchmarks/results/tokenize_corpus.json

One document a line. Both ways get the same number of processes. The slow tokenizer is transformers' SentencePieceBackend on the folder's tokenizer.model, as LlamaTokenizer was before transformers 5:
pieces by SentencePiece, then ids one by one, in Python. Both include reading the text and writing the blocks.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path


def slow(folder):
    from transformers import AddedToken
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    class Slow(SentencePieceBackend):
        model_input_names = ['input_ids', 'attention_mask']

        def build_inputs_with_special_tokens(self, a, b=None):
            return [1] + a

    return Slow(
        vocab_file=str(Path(folder) / 'tokenizer.model'),
        **{
            k: AddedToken(v, normalized=False, special=True)
            for k, v in dict(bos_token='<s>', eos_token='</s>', unk_token='<unk>').items()
        },
    )


def theirs(tokenizer, file, out, block, workers):
    "run_clm_pt_with_peft.py's steps: load_dataset('text'), tokenize in batches of 1,000, concatenate and cut in batches of 1,000"
    from itertools import chain

    import datasets

    datasets.disable_progress_bars()

    def group(ex):
        cat = {k: list(chain(*ex[k])) for k in ex}
        n = len(cat['input_ids']) // block * block
        r = {k: [t[i : i + block] for i in range(0, n, block)] for k, t in cat.items()}
        return r | dict(labels=[list(x) for x in r['input_ids']])

    ds = datasets.load_dataset(
        'text', data_files=[str(file)], cache_dir=str(out / 'cache'), split='train'
    )
    eos = tokenizer.eos_token_id

    def tokenize(ex):
        o = tokenizer(ex['text'])
        return dict(
            input_ids=[i + [eos] for i in o['input_ids']],
            attention_mask=[m + [1] for m in o['attention_mask']],
        )

    ds = ds.map(
        tokenize,
        batched=True,
        num_proc=workers if workers > 1 else None,
        remove_columns='text',
        load_from_cache_file=False,
    )
    ds = ds.map(
        group, batched=True, num_proc=workers if workers > 1 else None, load_from_cache_file=False
    )
    ds.save_to_disk(str(out / 'blocks'))
    return len(ds)


def main():
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument('--tokenizer', required=True)
    a.add_argument('--corpus', nargs='+', required=True)
    a.add_argument(
        '--megabytes', type=float, default=8, help='of text at most, after its lines are joined'
    )
    a.add_argument('--block', type=int, default=512)
    a.add_argument('--workers', type=int, default=1)
    a.add_argument('--rounds', type=int, default=3)
    a.add_argument('--json')
    a = a.parse_args()
    (
        os.environ['HF_HUB_OFFLINE'],
        os.environ['RAYON_NUM_THREADS'],
        os.environ['TOKENIZERS_PARALLELISM'],
    ) = '1', str(a.workers), 'true' if a.workers > 1 else 'false'
    import datasets
    import transformers

    from llama_zh_nb.checkpoint.folder import load_tokenizer
    from llama_zh_nb.training.packing import pack_blocks

    tmp = Path(tempfile.mkdtemp())
    docs, n = [], 0
    for f in sorted(a.corpus):
        for line in Path(f).read_text(encoding='utf-8', errors='ignore').splitlines():
            if line.strip() and n < a.megabytes * 1e6:
                docs.append(line.strip())
                n += len(line.encode()) + 1
    (tmp / 'c.txt').write_text('\n'.join(docs), encoding='utf-8')
    fast, old = load_tokenizer(a.tokenizer), slow(a.tokenizer)
    same = sum(
        old(d, add_special_tokens=False)['input_ids']
        == fast(d, add_special_tokens=False)['input_ids']
        for d in docs[:500]
    )
    chars, seconds, cpu, blocks = (
        sum(map(len, docs)),
        dict(theirs=[], ours=[]),
        dict(theirs=[], ours=[]),
        {},
    )

    def lines():
        with (tmp / 'c.txt').open(encoding='utf-8') as f:
            yield from (line.rstrip('\n') for line in f)

    ways = dict(
        theirs=lambda k: theirs(old, tmp / 'c.txt', tmp / f't{k}', a.block, a.workers),
        ours=lambda k: len(
            pack_blocks(
                lines(),
                fast,
                tmp / f'o{k}',
                a.block,
                workers=a.workers if a.workers > 1 else None,
                part_docs=max(1000, len(docs) // (4 * a.workers)),
            )
        ),
    )
    for k in range(a.rounds):
        for name, f in ways.items():
            t, c = time.perf_counter(), sum(os.times()[:4])
            blocks[name] = f(k)
            seconds[name].append(round(time.perf_counter() - t, 3))
            cpu[name].append(round(sum(os.times()[:4]) - c, 3))  # of the child processes too
    best, work = ({k: min(v) for k, v in d.items()} for d in (seconds, cpu))
    print(
        f'{len(docs):,} documents, {n / 1e6:.1f} MB, {chars:,} characters; {a.workers} processes; {same} of {min(500, len(docs))} documents have the same ids both ways'
    )
    for k, v in best.items():
        print(
            f'{k:8}{v:8.2f} s   {chars / v:12,.0f} characters/s   {n / 1e6 / v:6.2f} MB/s   {work[k]:8.2f} s of CPU   {blocks[k]:,} blocks'
        )
    print(
        f'ours is {best["theirs"] / best["ours"]:.1f} times as fast, and takes 1/{work["theirs"] / work["ours"]:.1f} of the CPU time (best of {a.rounds} rounds in turns)'
    )
    if a.json:
        Path(a.json).parent.mkdir(parents=True, exist_ok=True)
        Path(a.json).write_text(
            json.dumps(
                dict(
                    args=vars(a),
                    documents=len(docs),
                    bytes=n,
                    characters=chars,
                    same_ids=same,
                    blocks=blocks,
                    seconds=seconds,
                    cpu_seconds=cpu,
                    ratio=best['theirs'] / best['ours'],
                    cpu_ratio=work['theirs'] / work['ours'],
                    cpus=os.cpu_count(),
                    versions=dict(
                        transformers=transformers.__version__, datasets=datasets.__version__
                    ),
                ),
                indent=1,
            )
            + '\n'
        )


if __name__ == '__main__':
    main()
