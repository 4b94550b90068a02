"""What the README and the site promise that a machine can check, and the rules every notebook keeps."""

import ast
import builtins
import configparser
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from notebooks import all_notebooks, module_of, name, sidebar, stages, sub_package_notebooks

ROOT = Path(__file__).resolve().parent.parent

NBS = all_notebooks()
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
        line.strip()
        for block in re.findall(r'```sh\n(.*?)```', text, re.S)
        for line in block.splitlines()
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
        for line in [*sh_lines(read(name)), *re.findall(r'`([^`\n]+)`', read(name))]
        for m in re.findall(r'^llama-zh ([a-z][\w-]*)', line)
    }
    assert 'run' in named
    for cmd in named:
        assert (
            subprocess.run([BIN / 'llama-zh', cmd, '--help'], capture_output=True).returncode == 0
        ), cmd


@pytest.mark.parametrize('name', READMES)
def test_cli_flags_exist(name):
    commands = [c.split('#')[0] for c in sh_lines(read(name)) if c.startswith('llama-zh')]
    for line in commands:
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


def test_no_notebook_is_overlooked():
    "What the tools go over is what lies in nbs/ and its folders, and what the site's sidebar lists."
    there = {p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts}
    home = {ROOT / 'nbs' / f'{page}.ipynb' for page in ('index', 'index_zh')}
    assert set(NBS) == there - home
    assert len(stages()) >= 14 and len(sub_package_notebooks()) >= 60
    listed = [f for _, files in sidebar() for f in files]
    # reference.qmd is the page that `make docs` writes
    wanted = {p.relative_to(ROOT / 'nbs').as_posix() for p in there} | {'reference.qmd'}
    assert sorted(listed) == sorted(wanted)


def test_a_module_stands_where_its_notebook_does():
    "nbs/tokenizer/exact.ipynb makes tokenizer.exact; the three stages that tell of deeper modules are named here."
    elsewhere = {
        '07_templates': 'text.templates',
        '14_run': 'app.run',
        'core/face': '__init__',
        'documents/overview': 'documents.__init__',
    }
    wrong = {}
    for nb in NBS:
        module = module_of(nb)
        own = re.sub(r'^\d\d[a-z]?_', '', name(nb)).replace('/', '.')
        if nb.parent.name == 'studies':
            own = None
        if module is not None or own is None:
            wanted = elsewhere.get(name(nb), own)
            if module != wanted:
                wrong[name(nb)] = module
    assert wrong == {}


def next_notebook(nb):
    "The notebook that the first link under 'Next' at the end of a notebook leads to"
    text = '\n'.join(''.join(c['source']) for c in cells(nb)[-5:] if c['cell_type'] == 'markdown')
    link = re.search(r'\*\*Next:\*\*[^(]*\(([^)#]+)\)', text)
    return (nb.parent / link[1]).resolve() if link else None


def test_each_notebook_leads_to_the_next():
    "From stage to stage; in a folder from its first notebook through all others and back to a stage."
    for a, b in itertools.pairwise(stages()):
        assert next_notebook(a) == b, name(a)
    folders = {}
    for nb in sub_package_notebooks():
        folders.setdefault(nb.parent.name, []).append(nb)
    for folder, notebooks in folders.items():
        passed, here = [], notebooks[0]
        while here.parent.name == folder and here not in passed:
            passed.append(here)
            here = next_notebook(here)
        assert sorted(passed) == sorted(notebooks), folder
        assert here in stages(), folder


@pytest.mark.parametrize('name', READMES)
def test_table_of_stages(name):
    "The README names the stages, and each folder, in the order of the site's sidebar."
    table = re.findall(r'^\| \[(\w+)\]\(nbs/(\w+)\.ipynb\) \|', read(name), re.M)
    assert [a for a, _ in table] == [b for _, b in table] == [p.stem for p in stages()]
    folders = re.findall(r'^\| \[(\w+)/\]\(nbs/(\w+)/\w+\.ipynb\) \|', read(name), re.M)
    in_order = list(dict.fromkeys(p.parent.name for p in sub_package_notebooks()))
    assert [a for a, _ in folders] == [b for _, b in folders] == in_order


@pytest.mark.parametrize('name', READMES)
def test_links_of_the_readme(name):
    links = re.findall(r'\]\(([^)\s]+)\)', read(name))
    links = [link for link in links if not re.match(r'[a-z]+:|#', link)]
    assert links and [link for link in links if not (ROOT / link.split('#')[0]).exists()] == []


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


@pytest.mark.parametrize('nb', NBS, ids=name)
class TestNotebook:
    def test_opens_well(self, nb):
        first, text = (
            ''.join(cells(nb)[0]['source']),
            '\n'.join(''.join(c['source']) for c in cells(nb) if c['cell_type'] == 'markdown'),
        )
        assert re.match(r'# .+\n+> .+', first), 'the first cell is a title and a one-line summary'
        assert f'/blob/main/nbs/{name(nb)}.ipynb)' in text, 'the link to Colab names this notebook'
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
        line.split('==')
        for line in read('constraints.txt').splitlines()
        if '==' in line and not line.startswith('#')
    )
    lock = {canonicalize_name(k): v.split(';')[0].strip() for k, v in lock.items()}
    for key, val in cfg['DEFAULT'].items():
        if not key.endswith('requirements') or key.startswith('scale'):
            continue  # GPU programs: not installed here, so not in the lock
        for r in map(Requirement, val.split()):
            assert r.specifier.contains(lock.get(canonicalize_name(r.name), '0')), f'{key}: {r}'
