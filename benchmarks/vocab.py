"""Our vocabulary beside the published merge rule and a published vocabulary of the same size: tokens, dead pieces, exactness, time, memory.

    python benchmarks/vocab.py --base llama2/tokenizer.model --published other/tokenizer.model --corpus zh/*.txt --heldout more/*.txt --json out.json

Without --heldout every fifth file of the corpus is left out and measured on. With --folds N the files are dealt into N parts in turn, and each part is measured
with a vocabulary that was chosen without it; files whose names begin with one of --together (books by one author) are one source and stay together."""
import argparse, json, tempfile, time
from pathlib import Path
from llama_zh_nb.audit import audit, fertility
from llama_zh_nb.core import peak_rss
from llama_zh_nb.choose import _strings
from llama_zh_nb.vocab import merge, read_model, text_stream

def by_genre(files): return {f.stem: list(text_stream(f)) or list(_strings(f)) for f in files}      # a JSON file of unknown fields is read as it stands

def folds(a, files, size, tmp):
    "Ratio of characters per token to the published vocabulary's, file by file, each chosen without its source"
    source = lambda f: next((t for t in a.together if f.stem.startswith(t)), f.stem)
    sources, ratio = sorted({source(f) for f in files}), {}
    for i in range(a.folds):
        out = {s for j, s in enumerate(sources) if j % a.folds == i}
        held = [f for f in files if source(f) in out]
        ours = merge(a.base, a.add, tmp/f'fold{i}', size=size, corpus=[f for f in files if f not in held])
        texts = by_genre(held)
        pub, our = fertility(a.published, texts), fertility(ours.path, texts)
        for k in our: ratio[k] = our[k]/pub[k]; print(f'without {k:32}{pub[k]:8.3f}{our[k]:8.3f}   x {ratio[k]:.3f}', flush=True)
    print(f'{"worst, mean":32}{min(ratio.values()):27.3f}, {sum(ratio.values())/len(ratio):.3f}')
    return ratio

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--base', required=True); p.add_argument('--published', required=True); p.add_argument('--corpus', nargs='+', required=True)
    p.add_argument('--heldout', nargs='+'); p.add_argument('--add', nargs='*', default=[]); p.add_argument('--size', type=int); p.add_argument('--json')
    p.add_argument('--folds', type=int, default=0); p.add_argument('--together', nargs='*', default=[])
    a = p.parse_args()
    files = sorted(map(Path, a.corpus))
    size, tmp = a.size or len(read_model(a.published).pieces), Path(tempfile.mkdtemp())
    if a.folds:
        ratio = folds(a, files, size, tmp)
        if a.json: Path(a.json).write_text(json.dumps(dict(ratio=ratio, worst=min(ratio.values()), mean=sum(ratio.values())/len(ratio)), ensure_ascii=False, indent=1))
        return
    held = [Path(f) for f in a.heldout] if a.heldout else files[2::5]
    train = [f for f in files if f not in held]
    t = time.time()
    ours = merge(a.base, a.add, tmp/'ours', size=size, corpus=train)
    seconds, peak = time.time() - t, peak_rss()
    out = {}
    for name, path in dict(published=a.published, ours=ours.path).items():
        r = audit(path, base=a.base, texts=by_genre(held))
        out[name] = dict(pieces=r.size, dead=len(r.dead), ties=r.ties, changed=len(r.changed), plain=r.plain, differ=len(r.differ), compared=r.compared, characters_per_token=r.after)
        print(f"{name:10} {r.size:,} pieces, {len(r.dead):,} dead; {len(r.changed):,} of {r.plain:,} lines without Chinese changed; tokenizer.json differs on {len(r.differ):,} of {r.compared:,} lines")
    pub, our = out['published']['characters_per_token'], out['ours']['characters_per_token']
    for k in our: print(f'{k:32}{pub[k]:8.3f}{our[k]:8.3f}   x {our[k]/pub[k]:.3f}')
    ratio = [our[k]/pub[k] for k in our]
    print(f'{"worst, mean":32}{min(ratio):27.3f}, {sum(ratio)/len(ratio):.3f}\n{seconds:.0f} s, peak {peak/2**20:,.0f} MiB, {sum(f.stat().st_size for f in train)/1e6:.0f} MB of text')
    if a.json: Path(a.json).write_text(json.dumps(out | dict(seconds=seconds, peak=peak, worst=min(ratio), mean=sum(ratio)/len(ratio)), ensure_ascii=False, indent=1))

if __name__ == '__main__': main()
