"""Convert Meta's layout of a given shape: ours, and the usual way that loads everything.

python benchmarks/convert.py --shape 1b --shards 2
python benchmarks/convert.py --shape 7b --no-memory    # 13.5 GB, twice on disk
python benchmarks/convert.py --shape 70b-layer --shards 8    # one layer of 70B's width, and its embeddings
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from _child import SHAPES, child, config, show, timed
from resize import tokenizers


def make(folder, shape, shards):
    "consolidated.NN.pth of random bf16 numbers"
    import torch

    from llama_zh_nb.checkpoint.meta import llama_shapes, meta_names
    from llama_zh_nb.core.errors import write_json

    c, some = config(shape), torch.randn(1 << 20).bfloat16()
    folder.mkdir()
    for i in range(shards):
        state = {}
        for hf, s in llama_shapes(c).items():
            m, ax = meta_names(c['num_hidden_layers'])[hf]
            s = [n // shards if j == ax else n for j, n in enumerate(s)]
            n = torch.Size(s).numel()
            state[m] = (
                some[:n].view(s).clone()
                if n < len(some)
                else some.repeat(-(-n // len(some)))[:n].view(s)
            )
        torch.save(state, folder / f'consolidated.{i:02}.pth')
        del state
    write_json(
        folder / 'params.json',
        dict(
            dim=c['hidden_size'],
            n_layers=c['num_hidden_layers'],
            n_heads=c['num_attention_heads'],
            n_kv_heads=c['num_key_value_heads'],
            norm_eps=1e-5,
            vocab_size=-1,
        ),
    )
    shutil.copyfile(folder.parent / 'base.model', folder / 'tokenizer.model')


WHOLE = """import safetensors.torch, os
from llama_zh_nb.checkpoint.meta import meta_names, permute
import json, glob
p = json.load(open("m/params.json")); parts = [torch.load(f, weights_only=True) for f in sorted(glob.glob("m/*.pth"))]
out = {}
for hf, (m, ax) in meta_names(p["n_layers"]).items():
    t = parts[0][m] if ax is None else torch.cat([x[m] for x in parts], ax)
    n = {"q_proj": p["n_heads"], "k_proj": p["n_kv_heads"]}.get(hf.split(".")[-2])
    out[hf] = (permute(t, n) if n else t).contiguous()
os.mkdir("out"); safetensors.torch.save_file(out, "out/model.safetensors")"""


def main():
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument('--shape', choices=list(SHAPES), default='tiny')
    a.add_argument('--shards', type=int, default=1)
    a.add_argument('--dir')
    a.add_argument('--json')
    a.add_argument(
        '--no-memory', action='store_true', help='leave out the way that loads everything'
    )
    a = a.parse_args()
    d = Path(tempfile.mkdtemp(dir=a.dir))
    try:
        tokenizers(d)
        # in a process of its own, so that its memory is gone when we measure
        child(
            f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom convert import make\nfrom pathlib import Path\nmake(Path({str(d)!r})/"m", {a.shape!r}, {a.shards})'
        )
        size, rows = sum(p.stat().st_size for p in (d / 'm').glob('*.pth')), []
        for name, code in {
            'ours': 'c.convert_meta("m", "out")',
            **({} if a.no_memory else {'all in memory': WHOLE}),
        }.items():
            shutil.rmtree(d / 'out', ignore_errors=True)
            subprocess.run(['sync'])
            s, peak, _ = child(
                f'import os; os.chdir({str(d)!r})\nimport torch, llama_zh_nb.checkpoint.meta as c\n'
                + timed(code)
            )
            rows.append(dict(way=name, seconds=round(s, 2), peak_MiB=peak))
        show(
            f'Convert {a.shape}, {a.shards} shard(s): {size / 1e9:.2f} GB',
            rows,
            a.json,
            shape=a.shape,
            shards=a.shards,
            bytes=size,
        )
    finally:
        shutil.rmtree(d)


if __name__ == '__main__':
    main()
