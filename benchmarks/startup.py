"""How long one waits before anything happens: importing the package, help, a wrong option; each in a process of its own.

    python benchmarks/startup.py
    python benchmarks/startup.py --times 9 --json benchmarks/results/startup.json

Medians of wall time, the bare interpreter beside them. Nothing is computed, so this is the price of imports alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

_MAIN = 'from llama_zh_nb.app.cli import main; main({})'
WAYS = {
    'python': 'pass',
    'import llama_zh_nb': 'import llama_zh_nb',
    'from llama_zh_nb import get_recipe': 'from llama_zh_nb import get_recipe; get_recipe()',
    'llama-zh --help': _MAIN.format(['--help']),
    'llama-zh run --help': _MAIN.format(['run', '--help']),
    'llama-zh run --lr fast': _MAIN.format(['run', '--lr', 'fast']),
    'llama-zh sft --help': _MAIN.format(['sft', '--help']),
    'llama-zh corpus --help': _MAIN.format(['corpus', '--help']),
}


def seconds(code):
    "Wall time of one process that runs `code`"
    began = time.perf_counter()
    subprocess.run([sys.executable, '-c', code], capture_output=True, check=True)
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--times', type=int, default=5, help='processes of each kind')
    parser.add_argument('--json', type=Path, help='file for the figures')
    a = parser.parse_args()
    rounds = [{name: seconds(code) for name, code in WAYS.items()} for _ in range(a.times)]
    out = {name: round(statistics.median(r[name] for r in rounds), 3) for name in WAYS}
    for name, s in out.items():
        print(f'{name:36} {s:6.2f} s')
    if a.json:
        a.json.write_text(json.dumps(dict(times=a.times, seconds=out), indent=1) + '\n')


if __name__ == '__main__':
    main()
