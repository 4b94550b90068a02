"""A chat folder in every GGUF type: size, bits per character, right answers; and how long writing takes beside llama.cpp's own converter.

python benchmarks/gguf_types.py runs/mini/chat                                   # our types, unpacked and computed by transformers
PYTHONPATH=FOLDER_WITH_LLAMA_CPP python benchmarks/gguf_types.py runs/mini/chat  # q4_K_M and others too, computed by llama.cpp
python benchmarks/gguf_types.py --write 1b --converter llama.cpp/convert_hf_to_gguf.py   # writing only: seconds and memory, ours and theirs
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _child import SHAPES, child, show, timed


def measure(a):
    "One row for each type"
    from llama_zh_nb.export import gguf as gf
    from llama_zh_nb.export import gguf_reader as gr
    from llama_zh_nb.recipes import get_recipe, heldout, questions

    r = get_recipe()
    texts = {k: v[: a.texts] for k, v in heldout(r).items()}
    qs = [q for q in questions(r) if q['kind'] == 'asked'][:: a.every]
    there = importlib.util.find_spec('llama_cpp') is not None
    types, rows = (
        a.types or [*gf.TYPES, *(['q6_K', 'q5_K_M', 'q4_K_M', 'q3_K_M', 'q2_K'] if there else [])],
        [],
    )
    with tempfile.TemporaryDirectory(dir=a.dir) as d:
        for t in types:
            started = time.time()
            g = gf.to_gguf(a.folder, Path(d) / f'{t}.gguf', t)
            wrote = time.time() - started
            row = gr.gguf_rows({t: g.path}, texts, qs, r.chat.template).rows[0]
            n = row['accuracy'].get('asked', {})
            rows.append(
                {
                    'type': t,
                    'MB': round(g.bytes / 1e6, 2),
                    'bits a weight': round(g.bits, 2),
                    'bits/char zh': row.get('bpc_zh'),
                    'bits/byte en': row.get('bpb_en'),
                    'right': f'{n.get("right")}/{n.get("n")} ({n.get("lo", 0):.0%} to {n.get("hi", 1):.0%})',
                    'written in s': round(wrote, 2),
                    'computed by': row['engine'],
                    'held in': ', '.join(
                        f'{k} {x / g.params:.0%}'
                        for k, x in sorted(g.kinds().items(), key=lambda x: -x[1])
                        if x / g.params > 0.005
                    ),
                }
            )
            g.path.unlink()
    show(
        f'{Path(a.folder).name}: {len(texts.get("zh", []))} Chinese and {len(texts.get("en", []))} English texts, {len(qs)} questions',
        rows,
        a.json,
    )


def write(a):
    "Seconds and peak memory of writing a random model of a given shape, best of some"
    d = Path(tempfile.mkdtemp(dir=a.dir))
    here = f'import sys; sys.path.append({str(Path(__file__).parent)!r})\nfrom pathlib import Path\nfrom resize import *\nd = Path({str(d)!r})\n'
    try:
        child(here + f'tokenizers(d); make(d/"m", {a.write!r})')
        size, best = sum(f.stat().st_size for f in (d / 'm').glob('*.safetensors')), {}
        for _ in range(a.repeat):
            for t in a.types or ['f16', 'q8_0']:
                code = 'import torch, gguf, llama_zh_nb.gguf_file as g\n' + timed(
                    f'g.to_gguf({str(d / "m")!r}, {str(d / "ours.gguf")!r}, {t!r}, overwrite=True)'
                )
                s, peak, _ = child(code)
                best[f'ours {t}'] = min(best.get(f'ours {t}', (1e9, 0)), (s, peak))
                if not a.converter or t not in ('f32', 'f16', 'q8_0'):
                    continue
                cmd, started = (
                    [
                        sys.executable,
                        a.converter,
                        str(d / 'm'),
                        '--outtype',
                        t,
                        '--outfile',
                        str(d / 'theirs.gguf'),
                    ],
                    time.time(),
                )
                p = subprocess.Popen(
                    cmd,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=os.environ | {'PYTHONPATH': str(Path(a.converter).parent / 'gguf-py')},
                )
                _, status, use = os.wait4(p.pid, 0)
                if status:
                    raise SystemExit(f'{a.converter} failed with {status}')
                best[f"llama.cpp's converter {t} (with its start)"] = min(
                    best.get(f"llama.cpp's converter {t} (with its start)", (1e9, 0)),
                    (time.time() - started, use.ru_maxrss // 1024),
                )
        show(
            f'a random Llama of shape {a.write}, {size / 1e9:.2f} GB',
            [{'way': k, 's': round(s, 1), 'peak MiB': p} for k, (s, p) in best.items()],
            a.json,
        )
    finally:
        shutil.rmtree(d, ignore_errors=True)


def main():
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument('folder', nargs='?', help='chat folder')
    a.add_argument('--types', nargs='+')
    a.add_argument('--texts', type=int, default=200)
    a.add_argument('--every', type=int, default=1, help='ask every n-th question')
    a.add_argument('--write', choices=list(SHAPES), help='measure writing instead')
    a.add_argument('--converter', help="llama.cpp's convert_hf_to_gguf.py")
    a.add_argument('--repeat', type=int, default=2)
    a.add_argument('--dir', help='where temporary files go')
    a.add_argument('--json')
    a = a.parse_args()
    if a.write:
        write(a)
    elif a.folder:
        measure(a)
    else:
        raise SystemExit('name a chat folder, or --write a shape')


if __name__ == '__main__':
    main()
