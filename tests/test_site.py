"""The site: it builds without network and Quarto, every page of the sidebar opens, nothing is dead, and the search finds Chinese and English."""

import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from notebooks import all_notebooks, module_of, sidebar
from sphinx_site import dead_links, html_pages

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def site():
    "The built site; built now if it is not what the sources give."
    res = subprocess.run(
        [sys.executable, ROOT / 'tools' / 'docs.py', '--sphinx', '--if-stale'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert res.returncode == 0, res.stdout + res.stderr
    return ROOT / '_docs'


@pytest.fixture(scope='module')
def url(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *a):
            pass

    server = http.server.ThreadingHTTPServer(
        ('127.0.0.1', 0), functools.partial(Quiet, directory=str(site))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


@pytest.fixture(scope='module')
def browser():
    exe = next(
        (p for b in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(b))),
        None,
    )
    if not exe:
        pytest.skip(
            'no Chromium on this machine: install it (Debian: apt-get install chromium) to test the site in a browser'
        )
    playwright = pytest.importorskip('playwright.sync_api')
    with playwright.sync_playwright() as p:
        b = p.chromium.launch(executable_path=exe, args=['--no-sandbox'])
        yield b
        b.close()


@pytest.fixture
def watched(browser, url):
    "A page, and the list of everything that went wrong on it."
    page, wrong = browser.new_page(), []
    page.on(
        'console', lambda m: wrong.append(f'{page.url}: {m.text}') if m.type == 'error' else None
    )
    page.on('pageerror', lambda e: wrong.append(f'{page.url}: {e}'))
    page.on(
        'request',
        lambda r: (
            None
            if r.url.startswith((url, 'data:', 'blob:'))
            else wrong.append(f'{page.url} asks for {r.url}')
        ),
    )
    page.on('response', lambda r: wrong.append(f'{r.url}: {r.status}') if r.status >= 400 else None)
    yield page, wrong
    page.close()


def sources(notebook):
    "Every text of a notebook that Quarto reads as Markdown or shows as code"
    for cell in notebook['cells']:
        yield cell['source']
        for output in cell.get('outputs', []):
            if 'text/markdown' in output.get('data', {}):
                yield output['data']['text/markdown']


def test_texts_are_lists_of_lines():
    "Quarto joins the lines of a cell that is one string: callouts, lists and tables would be lost."
    from docs import tidy

    text = '::: {.callout-note}\n- a\n- b\n:::\n\n| a | b |\n|---|---|\n| 1 | 2 |'
    output = dict(output_type='display_data', data={'text/markdown': text}, metadata={})
    notebook = dict(
        cells=[
            dict(cell_type='markdown', source=text),
            dict(cell_type='code', source='show_doc(f)', outputs=[output]),
            dict(cell_type='code', source=['a\n', 'b'], outputs=[output]),
        ]
    )
    for source in sources(tidy(notebook)):
        assert isinstance(source, list)
        assert all(line.endswith('\n') for line in source[:-1])
        assert not any('\n' in line[:-1] for line in source)
    assert ''.join(notebook['cells'][0]['source']) == text


def test_a_link_in_a_link_is_one_link():
    from docs import tidy

    text = 'see [[`fill_blocks`](https://x.io/packing.html)](training/packing.ipynb)'
    cell = dict(cell_type='markdown', source=text)
    assert tidy(dict(cells=[cell]))['cells'][0]['source'] == [
        'see [`fill_blocks`](training/packing.ipynb)'
    ]


def test_everything_handed_to_quarto_is_lines(site):
    "The site's sources, as the build left them in _proc/."
    made = sorted((ROOT / '_proc').rglob('*.ipynb'))
    assert len(made) == len(all_notebooks()) + 2
    for path in made:
        for source in sources(json.loads(path.read_text(encoding='utf-8'))):
            assert isinstance(source, list), path


def test_no_dead_links(site):
    assert dead_links(site) == []


def test_nothing_from_elsewhere(site):
    "No script, style, font or picture of a page comes from another server."
    import re

    loads = re.compile(
        r'<(?:script|img|iframe|link rel="(?:stylesheet|preload)")[^>]*?(?:src|href)="((?:https?:)?//[^"]+)"'
    )
    assert {
        p.name: m for p in html_pages(site) if (m := loads.findall(p.read_text(encoding='utf-8')))
    } == {}


@pytest.mark.parametrize('width,height', [(1280, 900), (390, 844)], ids=['desktop', 'phone'])
def test_every_page_opens(watched, url, width, height):
    page, wrong = watched
    page.set_viewport_size({'width': width, 'height': height})
    page.goto(f'{url}/index.html')
    pages = list(
        dict.fromkeys(
            page.eval_on_selector_all(
                '.bd-sidebar-primary nav a.reference.internal',
                'a => a.map(o => o.href.split("#")[0])',
            )
        )
    )
    assert len(pages) == sum(len(files) for _, files in sidebar())
    wide = []
    for p in pages:
        page.goto(p)
        assert page.inner_text('article h1').strip(), p
        if page.evaluate('document.documentElement.scrollWidth') > width:
            wide.append(p)
    assert wrong == []
    assert wide == [], 'wider than the screen'


@pytest.mark.parametrize('query', ['词表', '扩充词表', '量化', 'tokenizer', 'embeddings'])
def test_search(watched, url, query):
    page, wrong = watched
    page.goto(f'{url}/search.html?q={query}')
    page.wait_for_selector('#search-results ul.search li a')
    hit = page.get_attribute('#search-results ul.search li a', 'href')
    page.goto(f'{url}/{hit}')
    assert page.inner_text('article h1').strip()
    assert wrong == []


def test_api_lists_every_module(site):
    html = (site / 'reference.html').read_text(encoding='utf-8')
    # the face of a package and the map of a sub-package export no names of their own
    modules = [m for m in map(module_of, all_notebooks()) if m and not m.endswith('__init__')]
    assert len(modules) > 60
    assert [m for m in modules if f'llama_zh_nb.{m}' not in html] == []
