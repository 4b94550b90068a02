"""Run a piece of Python in a process of its own and see its time and peak memory; print results as a table and JSON."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

SHAPES = {  # layers, hidden, feed-forward, heads, kv heads, files
    'tiny': (2, 256, 768, 4, 4, 2),
    '1b': (22, 2048, 5632, 16, 16, 3),
    '7b': (32, 4096, 11008, 32, 32, 3),
    '7b-half': (16, 4096, 11008, 32, 32, 3),
    '70b-layer': (1, 8192, 28672, 64, 8, 2),
}


def config(shape, rows=32000):
    n, d, f, h, kv, _ = SHAPES[shape]
    return dict(
        architectures=['LlamaForCausalLM'],
        model_type='llama',
        hidden_size=d,
        intermediate_size=f,
        num_hidden_layers=n,
        num_attention_heads=h,
        num_key_value_heads=kv,
        head_dim=d // h,
        vocab_size=rows,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        hidden_act='silu',
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        torch_dtype='bfloat16',
    )


def child(code, **env):
    "(seconds, peak MiB, printed) of `code`; seconds without imports when it prints `seconds=`"
    code += "\nimport re; print('peak=' + re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    t = time.time()
    p = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        env=os.environ | env | {'HF_HUB_OFFLINE': '1'},
    )
    if p.returncode:
        raise SystemExit(f'{code}\n{p.stderr[-2000:]}')
    s = re.search(r'seconds=([\d.]+)', p.stdout)
    return (
        float(s[1]) if s else time.time() - t,
        int(re.search(r'peak=(\d+)', p.stdout)[1]) // 1024,
        p.stdout,
    )


def timed(seconds_of):
    return f'import time; started = time.time()\n{seconds_of}\nprint(f"seconds={{time.time()-started:.2f}}")'


def show(title, rows, path=None, **more):
    cols = list(rows[0])
    text = [[str(r.get(c, '')) for c in cols] for r in rows]
    width = [max(len(c), *(len(t[i]) for t in text)) for i, c in enumerate(cols)]
    print(title)
    for t in [cols, *text]:
        print('  '.join(x.ljust(w) for x, w in zip(t, width)))
    if path:
        with Path(path).open('w') as f:
            json.dump(dict(title=title, rows=rows, **more), f, indent=1)
