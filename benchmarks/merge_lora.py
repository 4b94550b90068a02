"""Merge an adapter into a base of a given shape: ours, `cp -r` of the base, and peft's merge_and_unload in memory.

    python benchmarks/merge_lora.py --shape 1b             # 2.6 GB; peft needs all of it in memory, and the adapter
    python benchmarks/merge_lora.py --shape 7b --no-memory # 13.5 GB, three times as much on disk
    python benchmarks/merge_lora.py --shape 7b --no-memory --cold --only 'cp -r' ours

Before each way the folder is read once, so that it lies in the page cache as far as it fits; with --cold it is put out of it.
"""

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from _child import SHAPES, child, config, show, timed


def adapter(folder, shape, r, rows=None, file='adapter_model.safetensors'):
    "LoRA on all seven projections in float32, as peft saves it; with `rows` both embeddings whole, in float16, as the earlier projects did"
    import torch

    from llama_zh_nb.checkpoint.meta import EMBED, HEAD, llama_shapes
    from llama_zh_nb.checkpoint.tensors import write_safetensors
    from llama_zh_nb.core.errors import write_json

    c, specs, some = config(shape), {}, torch.randn(1 << 20) / 200
    for k, s in llama_shapes(c).items():
        if k.endswith('_proj.weight'):
            specs |= {
                f'base_model.model.{k.removesuffix(".weight")}.lora_{x}.weight': (
                    'F32',
                    (r, s[1]) if x == 'A' else (s[0], r),
                )
                for x in 'AB'
            }
        if rows and k in (EMBED, HEAD):
            specs[f'base_model.model.{k}'] = ('F16', (rows, s[1]))

    def rand(k):
        n = torch.Size(specs[k][1]).numel()
        return (
            some.repeat(-(-n // len(some)))[:n]
            .view(specs[k][1])
            .to(dict(F32=torch.float32, F16=torch.float16)[specs[k][0]])
        )

    folder.mkdir()
    if file.endswith('.bin'):
        torch.save({k: rand(k).clone() for k in specs}, folder / file)
    else:
        write_safetensors(folder / file, specs, rand)
    targets = sorted({k.split('.')[-3] for k in specs if 'lora_A' in k})
    write_json(
        folder / 'adapter_config.json',
        dict(
            peft_type='LORA',
            task_type='CAUSAL_LM',
            r=r,
            lora_alpha=2 * r,
            lora_dropout=0.0,
            target_modules=targets,
            bias='none',
            base_model_name_or_path='m',
            modules_to_save=['embed_tokens', 'lm_head'] if rows else None,
        ),
    )
    if rows:
        shutil.copytree(folder.parent / 'big', folder, dirs_exist_ok=True)


def cache(folder, cold):
    "Bring a folder into the page cache, or put it out"
    subprocess.run(['sync'])
    for p in sorted(folder.rglob('*.*')):
        with p.open('rb') as f:
            if cold:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while f.read(1 << 24):
                    pass


PEFT = """from transformers import AutoModelForCausalLM
from peft import PeftModel
m = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("m", dtype="auto"), "a").merge_and_unload()
m.save_pretrained("out")"""


def main():
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument('--shape', choices=list(SHAPES), default='tiny')
    a.add_argument('--r', type=int, default=64)
    a.add_argument('--dir')
    a.add_argument('--json')
    a.add_argument('--no-memory', action='store_true', help="leave out peft's way")
    a.add_argument('--repeat', type=int, default=2)
    a.add_argument('--cold', action='store_true', help='with nothing in the page cache')
    a.add_argument('--only', nargs='+', help='names of ways')
    a = a.parse_args()
    d = Path(tempfile.mkdtemp(dir=a.dir))
    here = f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom merge_lora import *\nfrom resize import *\nd = Path({str(d)!r})\n'
    try:
        # in a process of its own, so that its memory is gone when we measure
        child(
            here
            + f'tokenizers(d); make(d/"m", {a.shape!r}); adapter(d/"a", {a.shape!r}, {a.r}); adapter(d/"old", {a.shape!r}, {a.r}, 55296, "adapter_model.bin")'
        )
        size, best = sum(p.stat().st_size for p in (d / 'm').glob('*.safetensors')), {}
        ways = {
            'cp -r': None,
            'ours': 'm.merge_lora("m", "a", "out")',
            "ours, Meta's layout": 'm.merge_lora("m", "a", "out", layout="meta")',
            'ours, old .bin, 55,296 rows': 'm.merge_lora("m", "old", "out")',
            'ours, QLoRA': 'm.merge_lora("m", "a", "out", in_4bit=True)',
        } | ({} if a.no_memory else {"peft's merge_and_unload": PEFT})
        if a.only:
            ways = {k: v for k, v in ways.items() if k in a.only}
        for n in range(a.repeat):
            for name, code in ways.items():
                if n and 'QLoRA' in name:
                    continue
                shutil.rmtree(d / 'out', ignore_errors=True)
                for f in ('m', 'a', 'old'):
                    cache(d / f, a.cold)
                t = time.time()
                if code is None:
                    subprocess.run(['cp', '-r', d / 'm', d / 'out'], check=True)
                    s, peak = time.time() - t, None
                else:
                    s, peak, _ = child(
                        f'import os; os.chdir({str(d)!r})\nimport torch, llama_zh_nb.checkpoint.merge as m\n'
                        + timed(code)
                    )
                if s < best.get(name, (1e9,))[0]:
                    best[name] = (s, peak)
        cp = best.get('cp -r', (float('nan'),))[0]
        show(
            f'Merge {a.shape}: {size / 1e9:.2f} GB bf16, LoRA r {a.r} on 7 projections; page cache {"cold" if a.cold else "warm"}; best of {a.repeat}',
            [
                dict(way=k, seconds=round(s, 2), times_cp=round(s / cp, 2), peak_MiB=p if p else '')
                for k, (s, p) in best.items()
            ],
            a.json,
            shape=a.shape,
            bytes=size,
            r=a.r,
            cold=a.cold,
            load=os.getloadavg()[0],
        )
    finally:
        shutil.rmtree(d)


if __name__ == '__main__':
    main()
