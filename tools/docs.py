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

import yaml
from notebooks import NBS, ROOT, all_notebooks, module_of

PROC, OUT = ROOT / '_proc', ROOT / '_docs'


def digest():
    "Of everything the site is made from"
    digest = hashlib.sha256()
    sources = [
        *all_notebooks(),
        *NBS.glob('*.ipynb'),
        *NBS.glob('*.css'),
        *(NBS / 'images').iterdir(),
        *(ROOT / 'llama_zh_nb').rglob('*.py'),
        *(ROOT / 'tools').glob('*.py'),
        ROOT / '_quarto.yml',
        ROOT / 'settings.ini',
    ]
    for path in sorted(set(sources)):
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def process(workers):
    "nbdev's step: nbs/ -> _proc/"
    from nbdev.serve import proc_nbs

    # tests/test_repo.py names such cells
    os.environ['PYTHONWARNINGS'] = 'ignore:Found cells containing imports'
    os.environ.setdefault('HF_HUB_OFFLINE', '1')
    shutil.rmtree(PROC, ignore_errors=True)  # pages of notebooks that are gone
    try:
        proc_nbs(force=True, n_workers=workers)
    except Exception as error:
        why = re.findall(r'^\w*(?:Error|Exception)\b.*', str(error.__cause__), re.M)[:1]
        sys.exit(
            f'error: {error}\n{"".join(why)}\n'
            'The site runs exported cells and every cell that holds an import, '
            'and nothing else: put imports into cells of their own.'
        )
    made, wanted = len(processed()), len(all_notebooks()) + 2  # the two home pages
    if made != wanted:
        sys.exit(f'error: nbdev made {made} pages, but there are {wanted} notebooks')


def processed():
    "The notebooks of _proc/, all folders"
    return sorted(PROC.rglob('*.ipynb'))


def front_matter(cells):
    "The fields that nbdev wrote into the first cell"
    first = ''.join(cells[0]['source']).strip() if cells and cells[0]['cell_type'] == 'raw' else ''
    return (yaml.safe_load(first.strip('-')) or {}) if first.startswith('---') else {}


def pages():
    "{notebook: (page, title, description)}, both names from the root of the site: `tokenizer/exact`"
    found = {}
    for path in processed():
        fields = front_matter(json.loads(path.read_text(encoding='utf-8'))['cells'])
        file = path.relative_to(PROC)
        page = file.with_name(fields.get('output-file') or file.name).with_suffix('')
        found[file.as_posix()] = (
            page.as_posix(),
            fields.get('title') or path.stem,
            fields.get('description') or '',
        )
    return found


BADGE = re.compile(
    r'\[(?:!\[Open in Colab\]\([^)]*\)|Open in Colab)\]\((https://colab\.research\.google\.com/[^)]*)\)'
)
# nbdev links a name in backticks even where it stands in a link already
LINK_IN_LINK = re.compile(r'\[\[(`[^`]+`)\]\([^)]*\)\](?=\()')
LINKED_NAME = re.compile(r'\[`([^`]+)`\]\(https?://[^)]*\)')


def as_lines(text):
    "A list of lines, as Jupyter and nbdev write texts: Quarto joins the lines of a cell that is one string"
    return ''.join(text).splitlines(keepends=True)


def tidy_signature(text):
    "What `show_doc` printed, without links inside code"
    text = re.sub(
        r'```python\n.*?```', lambda m: LINKED_NAME.sub(r'\1', m[0]), ''.join(text), flags=re.S
    )
    return text.replace('*Call self as a function.*', '')


def tidy(notebook):
    "Mend what nbdev leaves and neither builder should show; every source is a list of lines afterwards"
    for cell in notebook['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            # the badge is an image on Google's servers: a plain link does without
            source = BADGE.sub(r'[Open in Colab](\1){.colab}', source)
            source = LINK_IN_LINK.sub(r'[\1]', source)
        cell['source'] = as_lines(source)
        for output in cell.get('outputs', []):
            data = output.get('data', {})
            if 'text/markdown' not in data:
                continue
            if 'show_doc' in source:
                data['text/markdown'] = tidy_signature(data['text/markdown'])
            data['text/markdown'] = as_lines(data['text/markdown'])
    return notebook


def tidy_all():
    for path in processed():
        notebook = tidy(json.loads(path.read_text(encoding='utf-8')))
        path.write_text(json.dumps(notebook, ensure_ascii=False), encoding='utf-8')


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
    "One table a module: each name links to the notebook that builds it"
    out = [
        '---\ntitle: API reference\n'
        'description: Every exported name, by module; each links to the notebook that builds it\n---\n'
    ]
    for path in all_notebooks():
        file, module = path.relative_to(NBS).as_posix(), module_of(path)
        source = ROOT / 'llama_zh_nb' / f'{module.replace(".", "/")}.py' if module else None
        rows = exported(source) if source and source.exists() else []
        if not rows:
            continue
        out.append(f'\n## llama_zh_nb.{module}\n\n{pages[file][2]} ([notebook]({file}))\n')
        out.append('| name | what it does |\n|:--|:--|')
        for name, text in rows:
            text = text.replace('|', r'\|')
            out.append(f'| [`{name}`]({file}#{name.lower()}) | {text} |')
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
    tidy_all()
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
