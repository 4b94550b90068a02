"""Where the notebooks are: the fourteen stages at the top of nbs/, then a folder for each sub-package. Every tool and test that goes over notebooks asks here, so that none overlooks a folder."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / 'nbs'
# later stages take a letter (06a), so that nothing is renumbered
STAGE = re.compile(r'\d\d[a-z]?_\w+')
DEFAULT_EXP = re.compile(r'^#\|\s*default_exp\s+(\S+)', re.M)


def name(path):
    "A notebook's name as we say it: `06_pretrain`, `documents/split`"
    return path.relative_to(NBS).with_suffix('').as_posix()


def stages():
    "The notebooks of the pipeline, in the order in which it runs"
    found = sorted(p for p in NBS.glob('*.ipynb') if STAGE.fullmatch(p.stem))
    if len(found) < 14:
        sys.exit(f'error: {len(found)} stage notebooks in {NBS}, there should be 14 at least')
    return found


def sidebar():
    "`[(section or None, [file])]` of the site, as _quarto.yml lists them"
    import yaml

    text = (ROOT / '_quarto.yml').read_text(encoding='utf-8')
    sections = [(None, [])]
    for entry in yaml.safe_load(text)['website']['sidebar']['contents']:
        if isinstance(entry, dict) and 'section' in entry:
            files = [e if isinstance(e, str) else e['href'] for e in entry['contents']]
            sections.append((entry['section'], files))
        else:
            sections[0][1].append(entry if isinstance(entry, str) else entry['href'])
    return sections


def sub_package_notebooks():
    "The other notebooks, folder by folder in the order of the sidebar"
    listed = [NBS / f for _, section in sidebar() for f in section if '/' in f]
    there = {p for p in NBS.glob('*/*.ipynb') if not p.parent.name.startswith(('.', '_'))}
    # tests/test_repo.py sees to it that the sidebar lists all of them
    return [p for p in listed if p in there] + sorted(there - set(listed))


def all_notebooks():
    "Stages and sub-packages; the two home pages (index, index_zh) are no part of it"
    return [*stages(), *sub_package_notebooks()]


def code_cells(path):
    "Sources of the code cells of a notebook"
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [''.join(c['source']) for c in cells if c['cell_type'] == 'code']


def module_of(path):
    "`tokenizer.exact` for the notebook that exports it, None where nothing is exported"
    found = DEFAULT_EXP.search('\n'.join(code_cells(path)))
    return found[1] if found else None
