"""Do modules equal notebooks, and are the notebooks clean?

Exports and cleans a copy of the working tree and compares, so it changes nothing here and needs no git. Exit code 1 names what differs and what to type.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from notebooks import ROOT, all_notebooks

FOLDERS = ('nbs', 'llama_zh_nb', 'tools')


def made(root):
    "{path: bytes} of everything that `nbdev_export`, `nbdev_clean` and `tools/readme.py` may change"
    found = [
        *(root / 'nbs').rglob('*.ipynb'),
        *(root / 'llama_zh_nb').rglob('*.py'),
        *root.glob('README*.md'),
    ]
    return {p.relative_to(root): p.read_bytes() for p in found}


def regenerate(root):
    "Export, clean and make the READMEs in `root`"
    programs = Path(sys.executable).parent
    environment = {**os.environ, 'PYTHONPATH': str(root)}
    for command in (
        [programs / 'nbdev_export'],
        [programs / 'nbdev_clean'],
        [sys.executable, root / 'tools' / 'readme.py'],
    ):
        result = subprocess.run(
            list(map(str, command)), cwd=root, env=environment, capture_output=True, text=True
        )
        if result.returncode:
            sys.exit(f'{Path(command[-1]).name} failed:\n{result.stdout}{result.stderr}')


def copied(folder):
    "A copy of what matters, in `folder`"
    copy = folder / ROOT.name
    skip = shutil.ignore_patterns(
        '__pycache__', '.ipynb_checkpoints', 'runs', 'data', '*.partial-*'
    )
    for part in FOLDERS:
        shutil.copytree(ROOT / part, copy / part, symlinks=True, ignore=skip)
    for file in ('settings.ini', '_quarto.yml', *(p.name for p in ROOT.glob('README*.md'))):
        shutil.copy2(ROOT / file, copy / file)
    return copy


def main():
    with tempfile.TemporaryDirectory() as tmp:
        copy = copied(Path(tmp))
        before = made(copy)
        regenerate(copy)
        after = made(copy)
    notebooks = sum(p.suffix == '.ipynb' for p in before)
    wanted = len(all_notebooks()) + 2  # the two home pages
    if notebooks != wanted:
        sys.exit(f'error: {notebooks} notebooks were looked at, but there are {wanted}')
    changed = sorted(str(p) for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    if changed:
        sys.exit(
            'error: not what the notebooks give:\n  '
            + '\n  '.join(changed)
            + '\nType `.venv/bin/nbdev_export && .venv/bin/nbdev_clean && make readme`, '
            'look at the difference, and commit it.'
        )
    print(f'{len(before)} files, {notebooks} notebooks among them, are as the notebooks give them')


if __name__ == '__main__':
    main()
