"""README.md and README_ZH.md from nbs/index.ipynb and nbs/index_zh.ipynb, the home pages of the site. Always the same text, with or without Quarto."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = {'index.ipynb': 'README.md', 'index_zh.ipynb': 'README_ZH.md'}
NOTE = '<!-- Made from nbs/{} by `make readme`: edit that. -->\n'


def from_root(m):
    "A link as seen from nbs/ -> as seen from the repository's root."
    url = m[2]
    if re.match(r'[a-z]+:|#', url):
        return m[0]
    home, _, frag = url.partition('#')
    if home in PAGES:
        url = PAGES[home] + (f'#{frag}' if frag else '')
    else:
        url = url[3:] if url.startswith('../') else f'nbs/{url}'
    return f'{m[1]}({url})'


def text_of(cell):
    "Markdown of one cell: its text, or its code and what it printed."
    src = re.sub(r'^#\|.*\n?', '', ''.join(cell['source']), flags=re.M).strip()
    if cell['cell_type'] == 'markdown':
        return re.sub(r'(\])\(([^)\s]+)\)', from_root, src)
    if cell['cell_type'] != 'code' or not src:
        return ''
    out = ''.join(
        ''.join(o.get('text') or o.get('data', {}).get('text/plain', '')) for o in cell['outputs']
    ).strip()
    return f'```python\n{src}\n```' + (f'\n\n```\n{out}\n```' if out else '')


def readme(nb):
    cells = json.loads((ROOT / 'nbs' / nb).read_text(encoding='utf-8'))['cells']
    return NOTE.format(nb) + '\n' + '\n\n'.join(filter(None, map(text_of, cells))) + '\n'


if __name__ == '__main__':
    for nb, md in PAGES.items():
        if (ROOT / 'nbs' / nb).exists():
            (ROOT / md).write_text(readme(nb), encoding='utf-8')
