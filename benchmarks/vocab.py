"""Our vocabulary beside the published merge rule and a published vocabulary of the same size: tokens, dead pieces, exactness, time, memory.

    python benchmarks/vocab.py --base llama2/tokenizer.model --published other/tokenizer.model --corpus zh/*.txt --heldout more/*.txt --json out.json

Without --heldout every fifth file of the corpus is left out and measured on."""
import argparse, json, tempfile, time
from pathlib import Path
from llama_zh_nb.audit import audit, fertility
from llama_zh_nb.core import peak_rss
from llama_zh_nb.vocab import merge, read_model

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--base', required=True); p.add_argument('--published', required=True); p.add_argument('--corpus', nargs='+', required=True)
    p.add_argument('--heldout', nargs='+'); p.add_argument('--add', nargs='*', default=[]); p.add_argument('--size', type=int); p.add_argument('--json')
    a = p.parse_args()
    files = sorted(map(Path, a.corpus))
    held = [Path(f) for f in a.heldout] if a.heldout else files[2::5]
    train = [f for f in files if f not in held]
    size, tmp = a.size or len(read_model(a.published).pieces), Path(tempfile.mkdtemp())
    t = time.time()
    ours = merge(a.base, a.add, tmp/'ours', size=size, corpus=train)
    seconds, peak = time.time() - t, peak_rss()
    out = {}
    for name, path in dict(published=a.published, ours=ours.path).items():
        r = audit(path, base=a.base, texts=held)
        out[name] = dict(pieces=r.size, dead=len(r.dead), ties=r.ties, changed=len(r.changed), plain=r.plain, differ=len(r.differ), compared=r.compared, characters_per_token=r.after)
        print(f"{name:10} {r.size:,} pieces, {len(r.dead):,} dead; {len(r.changed):,} of {r.plain:,} lines without Chinese changed; tokenizer.json differs on {len(r.differ):,} of {r.compared:,} lines")
    pub, our = out['published']['characters_per_token'], out['ours']['characters_per_token']
    for k in our: print(f'{k:32}{pub[k]:8.3f}{our[k]:8.3f}   x {our[k]/pub[k]:.3f}')
    ratio = [our[k]/pub[k] for k in our]
    print(f'{"worst, mean":32}{min(ratio):27.3f}, {sum(ratio)/len(ratio):.3f}\n{seconds:.0f} s, peak {peak/2**20:,.0f} MiB, {sum(f.stat().st_size for f in train)/1e6:.0f} MB of text')
    if a.json: Path(a.json).write_text(json.dumps(out | dict(seconds=seconds, peak=peak, worst=min(ratio), mean=sum(ratio)/len(ratio)), ensure_ascii=False, indent=1))

if __name__ == '__main__': main()
