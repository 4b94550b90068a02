"""What the README and the site promise that a machine can check, and the rules every notebook keeps."""

import ast
import builtins
import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = sorted((ROOT / 'nbs').glob('[0-9]*.ipynb'))
BIN = Path(sys.executable).parent
READMES = ['README.md', 'README_ZH.md']


def read(name):
    return (ROOT / name).read_text(encoding='utf-8')


def cells(nb):
    return json.loads(nb.read_text(encoding='utf-8'))['cells']


def code(nb):
    return [''.join(c['source']) for c in cells(nb) if c['cell_type'] == 'code']


def sh_lines(text):
    return [
        l.strip()
        for block in re.findall(r'```sh\n(.*?)```', text, re.S)
        for l in block.splitlines()
    ]


@pytest.mark.parametrize('name', READMES)
def test_make_targets_exist(name):
    targets = set(re.findall(r'^([a-z-]+):', read('Makefile'), re.M))
    named = set(re.findall(r'(?:^|[`\n])make ([a-z-]+)', read(name)))
    assert {'tutorial', 'test', 'test-all', 'docs', 'lab', 'clean'} <= targets
    assert named and named <= targets


@pytest.mark.parametrize('name', READMES)
def test_cli_commands_exist(name):
    named = {
        m
        for l in [*sh_lines(read(name)), *re.findall(r'`([^`\n]+)`', read(name))]
        for m in re.findall(r'^llama-zh ([a-z][\w-]*)', l)
    }
    assert 'run' in named
    for cmd in named:
        assert (
            subprocess.run([BIN / 'llama-zh', cmd, '--help'], capture_output=True).returncode == 0
        ), cmd


@pytest.mark.parametrize('name', READMES)
def test_cli_flags_exist(name):
    for line in (l.split('#')[0] for l in sh_lines(read(name)) if l.startswith('llama-zh')):
        words = line.split()
        cmd = words[: next((i for i, w in enumerate(words) if w.startswith('-')), len(words))]
        shown = subprocess.run(
            [BIN / cmd[0], *cmd[1:], '--help'], capture_output=True, text=True
        ).stdout
        for flag in re.findall(r'\s(--[a-z][\w-]*)', line):
            assert flag in shown, f'{" ".join(cmd)} {flag}'


@pytest.mark.parametrize('name', READMES)
def test_recipes_exist(name):
    from llama_zh_nb.recipes import get_recipe

    named = set(re.findall(r'--recipe ([\w-]+)', read(name)))
    assert 'mini' in named
    for r in named:
        get_recipe(r)


@pytest.mark.parametrize('name', READMES)
def test_extras_exist(name):
    cfg = configparser.ConfigParser(interpolation=None)
    cfg.read(ROOT / 'settings.ini', encoding='utf-8')
    have = {
        k.removesuffix('_requirements') for k in cfg['DEFAULT'] if k.endswith('_requirements')
    } | {'all'}
    named = {
        e
        for m in re.findall(r"""['"`]\.\[([\w,]+)\]|only some of \[([\w,]+)\]""", read(name))
        for e in ''.join(m).split(',')
    }
    assert named and named <= have


@pytest.mark.parametrize('name', READMES)
def test_table_of_notebooks(name):
    "The README's table, nbs/ and the site's sidebar name the same notebooks."
    table = re.findall(r'^\| \**\[(\w+)\]\(nbs/(\w+)\.ipynb\)\** \|', read(name), re.M)
    assert all(a == b for a, b in table)
    names = [a for a, _ in table]
    assert len(names) == len(set(names))
    assert set(names) == {p.stem for p in NBS}
    assert names == [Path(f).stem for f in sidebar() if re.match(r'\d', f)], (
        'the table and the sidebar differ in order'
    )


def sidebar():
    for o in yaml.safe_load(read('_quarto.yml'))['website']['sidebar']['contents']:
        for e in o['contents'] if isinstance(o, dict) and 'section' in o else [o]:
            yield e if isinstance(e, str) else e['href']


def test_sidebar():
    have = {p.name for p in (ROOT / 'nbs').glob('*.ipynb')} | {
        'reference.qmd'
    }  # the page `make docs` writes
    assert sorted(sidebar()) == sorted(have)


@pytest.mark.parametrize('name', READMES)
def test_links_of_the_readme(name):
    links = [l for l in re.findall(r'\]\(([^)\s]+)\)', read(name)) if not re.match(r'[a-z]+:|#', l)]
    assert links and [l for l in links if not (ROOT / l.split('#')[0]).exists()] == []


def test_one_site_description():
    link = ROOT / 'nbs' / '_quarto.yml'
    assert link.is_symlink() and link.resolve() == ROOT / '_quarto.yml'


def leans(src):
    "Does a cell that is not exported hold an import, and beside it use names that the cell itself doesn't bring?"
    if re.search(r'^#\|\s*(export|eval:\s*false)', src, re.M):
        return False
    try:
        nodes = list(ast.walk(ast.parse(src)))
    except SyntaxError:
        return False  # a magic
    names = [n for n in nodes if isinstance(n, ast.Name)]
    brought = {
        (a.asname or a.name).split('.')[0]
        for n in nodes
        if isinstance(n, (ast.Import, ast.ImportFrom))
        for a in n.names
    }
    if not brought or '*' in brought:
        return False
    brought |= (
        {n.id for n in names if not isinstance(n.ctx, ast.Load)}
        | {n.arg for n in nodes if isinstance(n, ast.arg)}
        | set(dir(builtins))
    )
    brought |= {
        n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler))
    }
    return bool({n.id for n in names} - brought)


@pytest.mark.parametrize('nb', NBS, ids=lambda p: p.stem)
class TestNotebook:
    def test_opens_well(self, nb):
        first, text = (
            ''.join(cells(nb)[0]['source']),
            '\n'.join(''.join(c['source']) for c in cells(nb) if c['cell_type'] == 'markdown'),
        )
        assert re.match(r'# .+\n+> .+', first), 'the first cell is a title and a one-line summary'
        assert f'/blob/main/nbs/{nb.name})' in text, 'the link to Colab names this notebook'
        assert '## 中文导读' in text

    def test_imports_stand_alone(self, nb):
        "`make docs` runs the exported cells and every cell that holds an import, and no others: such a cell may lean on nothing else."
        assert [c for c in code(nb) if leans(c)] == [], 'put the imports into a cell of their own'

    def test_saved_with_outputs(self, nb):
        outs = [o for c in cells(nb) if c['cell_type'] == 'code' for o in c['outputs']]
        assert outs, 'never run?'
        assert [o for o in outs if o['output_type'] == 'error'] == []

    def test_names_no_machine(self, nb):
        "No output or text carries a path of the machine it was made on."
        text = nb.read_text(encoding='utf-8')
        assert [w for w in (f'{ROOT}/', f'{sys.prefix}/', f'{Path.home()}/') if w in text] == []

    def test_ids_are_stable(self, nb):
        ids = [c.get('id') for c in cells(nb)]
        assert all(ids) and len(ids) == len(set(ids))


def test_lock_covers_the_requirements():
    "Every requirement of settings.ini is in constraints.txt at a version that it allows."
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    cfg = configparser.ConfigParser(interpolation=None)
    cfg.read(ROOT / 'settings.ini', encoding='utf-8')
    lock = dict(
        l.split('==')
        for l in read('constraints.txt').splitlines()
        if '==' in l and not l.startswith('#')
    )
    lock = {canonicalize_name(k): v.split(';')[0].strip() for k, v in lock.items()}
    for key, val in cfg['DEFAULT'].items():
        if not key.endswith('requirements') or key.startswith('scale'):
            continue  # GPU programs: not installed here, so not in the lock
        for r in map(Requirement, val.split()):
            assert r.specifier.contains(lock.get(canonicalize_name(r.name), '0')), f'{key}: {r}'
