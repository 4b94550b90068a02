"""The site without Quarto: Sphinx and myst-nb render what nbdev wrote to _proc/, in the order and under the names that _quarto.yml gives.

A pre-pass turns Quarto's dialect into MyST's: front matter, callouts, `#|` directives, header ids, `output: asis`, links between notebooks.
Links between pages are written as links to the site's public address and made relative in the finished pages; then all are checked.
"""

import json
import posixpath
import re
import shutil
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from docutils.nodes import make_id

FENCE = re.compile(r'^\s*(```+|~~~+)')
CALLOUT = re.compile(r'^(:{3,})\s*\{\s*\.callout-(\w+)([^}]*)\}\s*$')
DIRECTIVE = re.compile(r'^#\|\s*(.*)$')
HEADER_ID = re.compile(r'^(#+\s.*?)\s*\{\s*#([\w-]+)[^}]*\}\s*$')
LINK = re.compile(r'(?<=\]\()([^)\s]+)(\))(\{[^}\n]*\})?')
SHOW_DOC = re.compile(r'^---\s*\n+(?:\[source\]\(([^)]*)\)\{[^}]*\}\s*\n+)?### ([^\n]+)\n')


class Site:
    "What _quarto.yml says, and where each notebook's page lies."

    def __init__(self, proc, names):
        self.yml = yaml.safe_load((proc / '_quarto.yml').read_text(encoding='utf-8'))
        web = self.yml['website']
        self.title, self.url, self.repo = (
            web['title'],
            web['site-url'].rstrip('/') + '/',
            web['repo-url'],
        )
        self.branch, self.names, self.symbols = web.get('repo-branch', 'main'), names, set()
        there = {v[0] for v in names.values()} | {p.stem for p in proc.glob('*.qmd')}
        self.sections = self._sections(web['sidebar']['contents'], there)

    def page(self, file):
        "Page name of a notebook or text file of the sidebar."
        return self.names[file][0] if file in self.names else str(Path(file).with_suffix(''))

    def _sections(self, contents, there):
        "`(caption or None, [(page, text or None)])` in the sidebar's order; an entry is `index.ipynb`, `{href, text}` or `{section, contents}`."
        res = [(None, [])]
        for o in contents:
            section = isinstance(o, dict) and 'section' in o
            if section:
                res.append((o['section'], []))
            for e in o['contents'] if section else [o]:
                page, text = (
                    (self.page(e), None)
                    if isinstance(e, str)
                    else (self.page(e['href']), e.get('text'))
                )
                if page in there:
                    res[-1 if section else 0][1].append((page, text))
                else:
                    print(
                        f'warning: _quarto.yml lists {page}, which is not in nbs/', file=sys.stderr
                    )
        return res


def link(url, site, here):
    "Where a link of the page `here` goes on the site"
    if re.match(r'[a-z]+:', url) and not url.startswith(site.url):
        return url
    path, _, frag = url.removeprefix(site.url).partition('#')
    if path and not url.startswith(site.url):  # as seen from the notebook's folder
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
    if path.startswith('../'):  # outside nbs/: a file of the repository
        return f'{site.repo}/blob/{site.branch}/{path[3:]}'
    if not path:
        page = here
    elif path.endswith(('.ipynb', '.qmd')):
        page = site.page(path)
    elif path.endswith('.html'):
        page = path.removesuffix('.html')
    else:
        return url
    if f'{page}.html#{frag.lower()}' in site.symbols:
        frag = f'#api-{frag.lower()}'
    elif url.startswith(site.url):
        frag = ''  # nbdev links names that have no entry of their own, too: the page will do
    elif frag:
        frag = f'#{make_id(frag)}'
    return f'{site.url}{page}.html{frag}'


def attrs(link, brace):
    "Of attributes only classes are kept: `{.colab}`."
    classes = re.findall(r'\.[\w-]+', brace or '')
    return link + (f'{{{" ".join(classes)}}}' if classes and 'target' not in brace else '')


def to_myst(text, site, here):
    "Quarto's Markdown -> MyST's."
    lines, out, fence, title_due = text.split('\n'), [], None, None
    for line in lines:
        f = FENCE.match(line)
        if fence or f:
            if fence is None:
                fence = f[1]
            elif f and f[1].startswith(fence):
                fence = None
            out.append(line)
            continue
        if title_due is not None:  # the first heading inside a callout is its title
            if not line.strip():
                continue
            m = re.match(r'#+\s+(.*)', line)
            out[title_due] += m[1] if m else out[title_due + 1].split()[-1].capitalize()
            out.append('')
            title_due = None
            if m:
                continue
        c = CALLOUT.match(line)
        if c:
            title = re.search(r'title="([^"]*)"', c[3])
            out += [f'{c[1]}{{admonition}} {title[1] if title else ""}', f':class: {c[2]}']
            title_due = None if title else len(out) - 2
            continue
        h = HEADER_ID.match(line)
        if h:
            out.append(f'({h[2]})=')
            line = h[1]
        out.append(LINK.sub(lambda m: attrs(link(m[1], site, here) + m[2], m[3]), line))
    return '\n'.join(out)


def show_doc(text, page, site):
    "nbdev's Markdown for one symbol: an anchor of its own, a heading, a quiet link to the source."
    m = SHOW_DOC.match(text)
    if not m:
        return text
    src = f'<a class="api-source" href="{m[1]}">source</a>' if m[1] else ''
    site.symbols.add(f'{page}.html#{m[2].lower()}')
    return (
        f'<div class="api" id="api-{m[2].lower()}">{src}</div>\n\n### {m[2]}\n\n{text[m.end() :]}'
    )


def code_cell(cell, page, site):
    "Take Quarto's `#|` lines out of a code cell and do what they say; `None` for a cell that is not shown."
    direc, src = {}, []
    for line in ''.join(cell['source']).split('\n'):
        m = DIRECTIVE.match(line)
        if m and not any(s.strip() for s in src):
            k, _, v = m[1].partition(':')
            direc[k.strip()] = v.strip()
        else:
            src.append(line)
    if direc.get('include') == 'false' or 'hide' in direc:
        return None
    outs = [
        ''.join(o.get('data', {}).get('text/markdown', o.get('text', ''))) for o in cell['outputs']
    ]
    if direc.get('output') == 'asis':
        return {
            'cell_type': 'markdown',
            'metadata': {},
            'source': show_doc('\n\n'.join(outs), page, site),
        }
    tags = ['remove-input'] * (direc.get('echo') == 'false') + ['remove-output'] * (
        direc.get('output') == 'false'
    )
    return {**cell, 'source': '\n'.join(src).strip('\n'), 'metadata': {'tags': tags}}


def split_front_matter(text):
    m = re.match(r'---\n(.*?)\n---\s*', text, re.S)
    return (yaml.safe_load(m[1]) or {}, text[m.end() :]) if m else ({}, text)


def opening(fm):
    return f'# {fm["title"]}\n\n' + (
        f'{{.lead}}\n{fm["description"]}\n' if fm.get('description') else ''
    )


def first_pass(nb, page, site):
    "Cells as myst-nb wants them; collects the page's symbols."
    cells = []
    for c in nb['cells']:
        c = {**c, 'source': ''.join(c['source'])}
        if c['cell_type'] == 'raw':
            fm, _ = split_front_matter(c['source'].strip() + '\n')
            if fm.get('title'):
                cells.append({'cell_type': 'markdown', 'metadata': {}, 'source': opening(fm)})
        elif c['cell_type'] == 'code':
            cells.append(code_cell(c, page, site))
        elif 'THIS FILE WAS AUTOGENERATED' not in c['source']:
            cells.append(c)
    nb['cells'] = [{**c, 'id': f'c{i}'} for i, c in enumerate(filter(None, cells))]
    nb['metadata'] = {
        'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}
    }
    return nb


def toctrees(site):
    "The sidebar, as Sphinx wants it: hidden trees on the home page."

    def tree(caption, entries):
        rows = [f'{text} <{page}>' if text else page for page, text in entries if page != 'index']
        return (
            '```{toctree}\n:hidden:\n'
            + (f':caption: {caption}\n' if caption else '')
            + '\n'
            + '\n'.join(rows)
            + '\n```'
        )

    return '\n\n'.join(tree(c, e) for c, e in site.sections if any(p != 'index' for p, _ in e))


def write_sources(proc, src, site):
    "All pages of the sidebar, in MyST's dialect, into `src`."
    nbs = {}
    for _, entries in site.sections:
        for page, _ in entries:
            file = next((n for n, v in site.names.items() if v[0] == page), None)
            if file:
                nbs[page] = first_pass(
                    json.loads((proc / file).read_text(encoding='utf-8')), page, site
                )
    for (
        page,
        nb,
    ) in nbs.items():  # a second pass: now all symbols are known, and links to them can be made
        for c in nb['cells']:
            if c['cell_type'] == 'markdown':
                c['source'] = to_myst(c['source'], site, page)
        if page == 'index':
            nb['cells'].append(
                {'cell_type': 'markdown', 'id': 'toc', 'metadata': {}, 'source': toctrees(site)}
            )
        (src / page).parent.mkdir(parents=True, exist_ok=True)
        (src / f'{page}.ipynb').write_text(json.dumps(nb, ensure_ascii=False), encoding='utf-8')
    for p in proc.glob('*.qmd'):
        fm, body = split_front_matter(p.read_text(encoding='utf-8'))
        (src / f'{p.stem}.md').write_text(
            opening(fm) + '\n' + to_myst(body, site, p.stem), encoding='utf-8'
        )
    if (proc / 'images').is_dir():
        shutil.copytree(proc / 'images', src / 'images')
    (src / '_static').mkdir()
    shutil.copy2(proc / 'styles.css', src / '_static')


# Sphinx cuts Chinese text into words, but takes a typed query whole: cut it by the words of the index, longest first.
SPLIT_QUERY = r"""
function splitQuery(query) {
  const known = (typeof Search !== "undefined" && Search._index) ? Search._index.terms : {};
  const titles = (typeof Search !== "undefined" && Search._index) ? Search._index.titleterms : {};
  const words = [];
  for (const part of query.split(/[^\p{Letter}\p{Number}_\p{Emoji_Presentation}]+/gu).filter((w) => w))
    for (const run of part.match(/\p{Script=Han}+|[^\p{Script=Han}]+/gu)) {
      if (!/\p{Script=Han}/u.test(run)) { words.push(run); continue; }
      for (let i = 0; i < run.length; ) {
        let n = Math.min(6, run.length - i);
        while (n > 2 && !known.hasOwnProperty(run.substr(i, n)) && !titles.hasOwnProperty(run.substr(i, n))) n--;
        if (n > 1 || run.length === 1) words.push(run.substr(i, n));
        i += n;
      }
    }
  return words;
}
"""


def setup(app):
    "As a Sphinx extension: a search that finds Chinese and English words."
    import jieba
    import snowballstemmer

    jieba.setLogLevel(30)
    from sphinx.search.zh import SearchChinese

    class Search(SearchChinese):
        js_splitter_code = SPLIT_QUERY

        def init(self, options):
            super().init(options)
            self.stemmer = snowballstemmer.stemmer('porter')  # as the page's script does

    app.add_search_language(Search)
    return {'parallel_read_safe': True}


def config(site, src):
    math = (
        ['sphinx-mathjax-offline']
        if any('$' in p.read_text(encoding='utf-8') for p in src.glob('*.ipynb'))
        else []
    )
    return dict(
        project=site.title,
        author='llama_zh_nb contributors',
        copyright='2026, llama_zh_nb contributors',
        root_doc='index',
        language='en',
        extensions=['myst_nb', 'sphinx_copybutton', 'sphinx_site', *math],
        nb_execution_mode='off',
        nb_ipywidgets_js={},
        nb_render_markdown_format='gfm',
        nb_mime_priority_overrides=[
            ('html', 'text/html', 10),
            ('html', 'image/svg+xml', 20),
            ('html', 'image/png', 30),
            ('html', 'text/markdown', 40),
        ],
        myst_enable_extensions=[
            'colon_fence',
            'attrs_inline',
            'attrs_block',
            'dollarmath',
            'strikethrough',
        ],
        myst_heading_anchors=4,
        suppress_warnings=[
            'myst.header',
            'mystnb.unknown_mime_type',
            'mystnb.lexer',
            'misc.highlighting_failure',
            'config.cache',
            'myst.strikethrough',
        ],
        html_theme='sphinx_book_theme',
        html_title=site.title,
        html_static_path=['_static'],
        html_css_files=['styles.css'],
        html_favicon='images/favicon.svg',
        html_context={'default_mode': 'auto'},
        html_search_language='zh',
        html_show_sourcelink=False,
        html_copy_source=False,
        html_theme_options=dict(
            repository_url=site.repo,
            repository_branch=site.branch,
            use_repository_button=True,
            use_issues_button=True,
            use_download_button=False,
            show_toc_level=2,
            home_page_in_toc=True,
            logo={'text': site.title},
        ),
    )


def relative_links(out, site):
    "Links to the site's public address become links inside this folder"
    public = re.escape(site.url)
    for path in html_pages(out):
        up = '../' * (len(path.relative_to(out).parts) - 1)
        html = re.sub(
            rf'class="([\w ]*)\breference external\b([\w ]*)" href="{public}',
            rf'class="\1reference internal\2" href="{up}',
            path.read_text(encoding='utf-8'),
        )
        path.write_text(html.replace(f'href="{site.url}', f'href="{up}'), encoding='utf-8')


class _Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.ids, self.refs = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for k, v in attrs:
            if k in ('id', 'name') and v:
                self.ids.add(v)
            if k in ('href', 'src') and v:
                self.refs.append(v)


def html_pages(out):
    "The pages of the site; the theme keeps templates of its own among its static files"
    return [p for p in out.rglob('*.html') if p.relative_to(out).parts[0] != '_static']


def leads_somewhere(page, ref, pages, out):
    "Is there a file, and on it the anchor, that the link `ref` on `page` names?"
    url = urlsplit(ref)
    if url.scheme or url.netloc:
        return True
    path = page
    if url.path:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), unquote(url.path)))
    if not (out / path).exists():
        return False
    return not url.fragment or path not in pages or unquote(url.fragment) in pages[path].ids


def dead_links(out):
    "`[(page, link)]` of links inside the site that lead nowhere"
    pages = {
        p.relative_to(out).as_posix(): _Page(p.read_text(encoding='utf-8')) for p in html_pages(out)
    }
    dead = {
        (page, ref)
        for page, parsed in pages.items()
        for ref in parsed.refs
        if not leads_somewhere(page, ref, pages, out)
    }
    return sorted(dead)


def build(proc, out, names):
    "Render `_proc` into `out`, whole or not at all."
    from sphinx.application import Sphinx

    sys.path.insert(0, str(Path(__file__).parent))
    site = Site(proc, names)
    with tempfile.TemporaryDirectory() as tmp:
        src, html = Path(tmp) / 'src', Path(tmp) / 'html'
        src.mkdir()
        write_sources(proc, src, site)
        app = Sphinx(
            str(src),
            None,
            str(html),
            str(Path(tmp) / 'doctrees'),
            'html',
            config(site, src),
            status=None,
            warning=sys.stderr,
            freshenv=True,
        )
        app.build(force_all=True)
        if app.statuscode:
            sys.exit('error: Sphinx could not build the site; see above')
        shutil.rmtree(html / '_sources', ignore_errors=True)
        relative_links(html, site)
        dead = dead_links(html)
        for page, ref in dead:
            print(f'dead link on {page}: {ref}', file=sys.stderr)
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(html, out)
    if dead:
        sys.exit(f'error: {len(dead)} dead links; the site lies in {out} as it is')
