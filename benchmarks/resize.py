"""Resize a folder of a given shape: ours, `cp -r` of the same folder, and transformers in memory.

python benchmarks/resize.py --shape 1b            # 2.6 GB, needs three times as much disk
python benchmarks/resize.py --shape 7b            # 13.5 GB; transformers' way is left out, and that is said, where less memory is free than it needs
"""

import argparse
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from _child import SHAPES, child, config, show, timed


def tokenizers(folder):
    "A base of 32,000 pieces and one that extends it to 55,296: mini's own, filled up"
    from llama_zh_nb.checkpoint.meta import packaged
    from llama_zh_nb.tokenizer.exact import read_model, save_tokenizer

    m = read_model(packaged('mini') / 'tokenizer.model')
    low = min(p.score for p in m.pieces) - 1
    chars = [chr(i) for i in range(0x4E00, 0x9FA0)]
    han = iter(chars + [a + b for a in chars[:3000] for b in chars[5:7]])
    for name, n in (('base', 32000), ('big', 55296)):
        have = {p.piece for p in m.pieces}
        while len(m.pieces) < n:
            p = next(han) if name == 'big' else f'x{len(m.pieces)}'
            if p not in have:
                m.pieces.add(piece=p, score=low - len(m.pieces), type=1)
        (folder / f'{name}.model').write_bytes(m.SerializeToString())
        save_tokenizer(folder / f'{name}.model', folder / name)


def make(folder, shape):
    "A model folder of random bf16 numbers, written tensor by tensor"
    import torch

    from llama_zh_nb.checkpoint.meta import llama_shapes
    from llama_zh_nb.checkpoint.tensors import nbytes, write_shards
    from llama_zh_nb.core.errors import write_json
    from llama_zh_nb.tokenizer.exact import copy_tokenizer

    c = config(shape)
    specs = {k: ('BF16', s) for k, s in llama_shapes(c).items()}
    some = torch.randn(1 << 20).bfloat16()
    folder.mkdir()

    def rand(k):
        s = specs[k][1]
        n = nbytes(*specs[k]) // 2
        return some.repeat(-(-n // len(some)))[:n].view(s)

    write_shards(
        folder, specs, rand, sum(nbytes(*s) for s in specs.values()) // SHAPES[shape][-1] + 1
    )
    write_json(folder / 'config.json', c)
    copy_tokenizer(folder.parent / 'base', folder)


def available():
    "Bytes of memory that can be had now; None where the system does not say"
    try:
        return int(re.search(r'MemAvailable:\s+(\d+)', Path('/proc/meminfo').read_text())[1]) * 1024
    except (OSError, TypeError):
        return None


def main():
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument('--shape', choices=list(SHAPES), default='tiny')
    a.add_argument('--dir')
    a.add_argument('--json')
    a.add_argument('--no-memory', action='store_true', help="leave out transformers' way")
    a.add_argument('--repeat', type=int, default=2)
    a = a.parse_args()
    d = Path(tempfile.mkdtemp(dir=a.dir))
    try:
        tokenizers(d)
        make(d / 'm', a.shape)
        size, best = sum(p.stat().st_size for p in (d / 'm').glob('*.safetensors')), {}
        ways = {
            'cp -r': None,
            'ours': 'e.resize("m", "big", "out")',
            'ours, link': 'e.resize("m", "big", "out", link=True)',
        }
        if not a.no_memory and (have := available()) and have < 1.3 * size:
            a.no_memory = (
                print(
                    f"transformers' resize left out: {have / 1e9:.1f} GB of memory are available, it needs about {1.3 * size / 1e9:.1f}"
                )
                or True
            )
        if not a.no_memory:
            ways["transformers' resize"] = """from transformers import AutoModelForCausalLM
m = AutoModelForCausalLM.from_pretrained("m", dtype="auto"); m.resize_token_embeddings(55296); m.save_pretrained("out")"""
        for _ in range(a.repeat):
            for name, code in ways.items():
                shutil.rmtree(d / 'out', ignore_errors=True)
                subprocess.run(['sync'])
                t = time.time()
                if code is None:
                    subprocess.run(['cp', '-r', d / 'm', d / 'out'], check=True)
                    s, peak = time.time() - t, None
                else:
                    s, peak, _ = child(
                        f'import os; os.chdir({str(d)!r})\nimport torch, llama_zh_nb.embeddings as e\n'
                        + timed(code)
                    )
                if s < best.get(name, (1e9,))[0]:
                    best[name] = (s, peak)
        cp = best['cp -r'][0]
        show(
            f'Resize {a.shape}: {size / 1e9:.2f} GB bf16, 32,000 -> 55,296 rows; best of {a.repeat}',
            [
                dict(way=k, seconds=round(s, 2), times_cp=round(s / cp, 2), peak_MiB=p if p else '')
                for k, (s, p) in best.items()
            ],
            a.json,
            shape=a.shape,
            bytes=size,
        )
    finally:
        shutil.rmtree(d)


if __name__ == '__main__':
    main()
