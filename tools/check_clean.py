"""Do modules equal notebooks, and are the notebooks clean?

Exports and cleans a copy of the working tree and compares, so it changes nothing here and needs no git. Exit code 1 names what differs and what to type.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def files(root):
    "Everything that `nbdev_export`, `nbdev_clean` and `tools/readme.py` may change."
    found = [
        *(root / 'nbs').glob('*.ipynb'),
        *(root / 'llama_zh_nb').glob('*.py'),
        *root.glob('README*.md'),
    ]
    return {p.relative_to(root): p.read_bytes() for p in found}


def regenerate(root):
    "Export, clean and make the READMEs in `root`."
    bin, env = Path(sys.executable).parent, {**os.environ, 'PYTHONPATH': str(root)}
    for cmd in (
        [bin / 'nbdev_export'],
        [bin / 'nbdev_clean'],
        [sys.executable, root / 'tools' / 'readme.py'],
    ):
        res = subprocess.run(list(map(str, cmd)), cwd=root, env=env, capture_output=True, text=True)
        if res.returncode:
            sys.exit(f'{Path(cmd[-1]).name} failed:\n{res.stdout}{res.stderr}')


def main():
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp) / ROOT.name
        skip = shutil.ignore_patterns(
            '__pycache__', '.ipynb_checkpoints', 'runs', 'data', '*.partial-*'
        )
        for d in ('nbs', 'llama_zh_nb', 'tools'):
            shutil.copytree(ROOT / d, copy / d, symlinks=True, ignore=skip)
        for f in ('settings.ini', '_quarto.yml', *(p.name for p in ROOT.glob('README*.md'))):
            shutil.copy2(ROOT / f, copy / f)
        before = files(copy)
        regenerate(copy)
        after = files(copy)
    changed = sorted(str(p) for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    if changed:
        sys.exit(
            'error: not what the notebooks give:\n  '
            + '\n  '.join(changed)
            + '\nType `.venv/bin/nbdev_export && .venv/bin/nbdev_clean && make readme`, look at the difference, and commit it.'
        )
    print(f'{len(before)} files are as the notebooks give them')


if __name__ == '__main__':
    main()
