"""Build the site into _docs/: with Quarto where it is installed, else with Sphinx. Both read _quarto.yml; neither needs the network.

1. nbdev turns nbs/ into _proc/: exported cells become signatures with their docments, imports are run, names become links.
2. A page `api` lists every exported name.
3. Quarto or Sphinx (`sphinx_site.py`) renders _proc/.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
PROC, OUT = ROOT / '_proc', ROOT / '_docs'


def digest():
    "Of everything the site is made from."
    h = hashlib.sha256()
    kinds = (
        'nbs/*.ipynb',
        'nbs/*.css',
        'nbs/images/*',
        'llama_zh_nb/*.py',
        'tools/*.py',
        '_quarto.yml',
        'settings.ini',
    )
    for p in sorted(p for k in kinds for p in ROOT.glob(k)):
        h.update(p.name.encode())
        h.update(p.read_bytes())
    return h.hexdigest()


def process(workers):
    "nbdev's step: nbs/ -> _proc/."
    from nbdev.serve import proc_nbs

    os.environ['PYTHONWARNINGS'] = (
        'ignore:Found cells containing imports'  # tests/test_repo.py names such cells
    )
    os.environ.setdefault('HF_HUB_OFFLINE', '1')
    try:
        proc_nbs(force=True, n_workers=workers)
    except Exception as e:
        why = re.findall(r'^\w*(?:Error|Exception)\b.*', str(e.__cause__), re.M)[:1]
        sys.exit(
            f'error: {e}\n{"".join(why)}\nThe site runs exported cells and every cell that holds an import, and nothing else: put imports into cells of their own.'
        )


def pages():
    "Notebook file name -> (page name, title, description), from the front matter that nbdev wrote."
    res = {}
    for p in sorted(PROC.glob('*.ipynb')):
        cells = json.loads(p.read_text(encoding='utf-8'))['cells']
        raw = ''.join(cells[0]['source']) if cells and cells[0]['cell_type'] == 'raw' else ''
        fm = yaml.safe_load(raw.strip().strip('-')) or {} if raw.strip().startswith('---') else {}
        res[p.name] = (
            Path(fm.get('output-file') or p.name).stem,
            fm.get('title') or p.stem,
            fm.get('description') or '',
        )
    return res


def tidy():
    "What nbdev leaves that neither builder should show."
    badge = re.compile(
        r'\[(?:!\[Open in Colab\]\([^)]*\)|Open in Colab)\]\((https://colab\.research\.google\.com/[^)]*)\)'
    )
    linked = re.compile(r'\[`([^`]+)`\]\(https?://[^)]*\)')
    for p in PROC.glob('*.ipynb'):
        nb = json.loads(p.read_text(encoding='utf-8'))
        for c in nb['cells']:
            # the badge is an image on Google's servers: a plain link does without
            if c['cell_type'] == 'markdown':
                c['source'] = badge.sub(r'[Open in Colab](\1){.colab}', ''.join(c['source']))
            for o in c.get('outputs', []):
                if 'show_doc' not in ''.join(c['source']) or 'text/markdown' not in o.get(
                    'data', {}
                ):
                    continue
                text = re.sub(
                    r'```python\n.*?```',
                    lambda m: linked.sub(r'\1', m[0]),
                    ''.join(o['data']['text/markdown']),
                    flags=re.S,
                )  # no links inside code
                o['data']['text/markdown'] = text.replace('*Call self as a function.*', '')
        p.write_text(json.dumps(nb, ensure_ascii=False), encoding='utf-8')


def exported(py):
    "`(name, first line of the docstring)` of what a module's `__all__` names, without importing it."
    tree = ast.parse(py.read_text(encoding='utf-8'))
    docs = {
        o.name: (ast.get_docstring(o) or '').split('\n')[0]
        for o in tree.body
        if isinstance(o, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))
    }
    for o in tree.body:
        if isinstance(o, ast.Assign) and getattr(o.targets[0], 'id', '') == '__all__':
            return [(n, docs[n]) for n in ast.literal_eval(o.value) if n in docs]
    return []


def api_page(pages):
    "One table a module: each name links to the page that builds it."
    out = [
        '---\ntitle: API reference\ndescription: Every exported name, by module; each links to the notebook that builds it\n---\n'
    ]
    by_page = {page: (nb, desc) for nb, (page, _, desc) in pages.items()}
    default = re.compile(r'^#\|\s*default_exp\s+(\S+)', re.M)
    for nb in sorted((ROOT / 'nbs').glob('[0-9]*.ipynb')):
        m = default.search(
            '\n'.join(
                ''.join(c['source'])
                for c in json.loads(nb.read_text(encoding='utf-8'))['cells']
                if c['cell_type'] == 'code'
            )
        )
        py = ROOT / 'llama_zh_nb' / f'{m[1]}.py' if m else None
        rows = exported(py) if py and py.exists() else []
        if not rows:
            continue
        out.append(
            f'\n## llama_zh_nb.{m[1]}\n\n{pages[nb.name][2]} ([notebook]({nb.name}))\n\n| name | what it does |\n|:--|:--|'
        )
        out += [
            f'| [`{n}`]({nb.name}#{n.lower()}) | {d.replace("|", chr(92) + "|")} |' for n, d in rows
        ]
    (PROC / 'reference.qmd').write_text('\n'.join(out) + '\n', encoding='utf-8')


def with_quarto():
    subprocess.run(['quarto', 'render', '--no-cache'], cwd=PROC, check=True)
    shutil.rmtree(OUT, ignore_errors=True)
    shutil.move(PROC / '_docs', OUT)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        '--sphinx', action='store_true', help='use Sphinx even where Quarto is installed'
    )
    p.add_argument(
        '--if-stale',
        action='store_true',
        help='do nothing if _docs/ was made from what is here now',
    )
    p.add_argument('--workers', type=int, default=2, help='processes of the nbdev step')
    a = p.parse_args()
    os.chdir(ROOT)
    quarto = bool(shutil.which('quarto')) and not a.sphinx
    stamp, now = OUT / '.made-from', f'{"quarto" if quarto else "sphinx"} {digest()}'
    if a.if_stale and stamp.exists() and stamp.read_text() == now:
        return print('the site is fresh: _docs/index.html')
    print('== nbdev: nbs/ -> _proc/', flush=True)
    process(a.workers)
    tidy()
    names = pages()
    api_page(names)
    print(f'== {"Quarto" if quarto else "Sphinx"}: _proc/ -> _docs/', flush=True)
    if quarto:
        with_quarto()
    else:
        from sphinx_site import build

        build(PROC, OUT, names)
    stamp.write_text(now)
    print('the site is made: _docs/index.html')
    return None


if __name__ == '__main__':
    main()
