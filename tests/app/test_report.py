"report: one self-contained page from whatever a run knows, with nothing unescaped in it"

import re
from html.parser import HTMLParser

import pytest

from llama_zh_nb.app.report import PARTS, Story, report
from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.core.run_log import record, update_run
from llama_zh_nb.evals.measure import wilson

EVIL = '<script>alert(1)</script>"\'&'


def count(k, n):
    lo, hi = wilson(k, n)
    return dict(right=k, n=n, share=k / n, lo=lo, hi=hi, value=k)


def whole(folder):
    "A run that knows everything; its figures mean nothing"
    rows = [
        dict(step=i, loss=3 - i / 100, zh_bpc=9 - i / 50, en_bpb=1.0) for i in range(0, 200, 20)
    ]
    said = [dict(q='问' + EVIL, a=EVIL, expected='茶。', kind='unseen', sources=[EVIL])]
    m = dict(
        weights=dict(
            params=10**6, vocab=2048, bytes=4 * 10**6, bpc_zh=9.0, bpb_en=1.0, samples=said
        ),
        corpus=dict(documents=10, dropped={EVIL: 3}),
        vocab=dict(
            pieces=3000,
            added=951,
            dead=0,
            zh_before=0.5,
            zh_after=1.5,
            en_before=3.0,
            en_after=3.0,
            example=dict(text='茶山' + EVIL, before=['<0xE8>', EVIL], after=['茶', '山', EVIL]),
        ),
        embeddings=dict(vocab=3008, bpc_zh=8.0, bpb_en=1.0),
        pretrain=dict(history=rows, steps=180, tokens=9000, bpc_zh=2.0, bpb_en=1.05, samples=said),
        control=dict(history=rows, bpc_zh=4.0, bpb_en=1.1),
        sft=dict(
            chats=20,
            history=rows,
            bpc_zh=2.2,
            bpb_en=1.2,
            accuracy={'asked': count(9, 10), 'unseen': count(0, 10)},
            samples=said,
        ),
        quantize=dict(
            bytes_before=4 * 10**6,
            bytes_after=10**6,
            bpc_zh=2.3,
            accuracy={'asked': count(9, 10), 'unseen': count(0, 10)},
            by_relation={'山' + EVIL: count(1, 2), '水': count(0, 2)},
            samples=said,
            right=[],
            failures=said,
        ),
        rag=dict(
            chunks=9,
            recall={'1': 0.9, '5': 1.0, '10': 1.0},
            accuracy={'unseen': count(7, 10)},
            samples=said,
            right=said,
            failures=said,
        ),
    )
    update_run(
        folder,
        dict(
            name='try' + EVIL,
            recipe=dict(base=EVIL, bits=4),
            stages={
                k: dict(seconds=3.0, peak_mib=100, outputs={EVIL: '1:2'}, metrics=v)
                for k, v in m.items()
            },
        ),
    )
    return folder


class Balanced(HTMLParser):
    "Every element is closed in its place, none reaches outside"

    VOID = {'meta', 'br', 'img', 'hr', 'circle', 'line', 'path', 'polyline'}

    def __init__(self):
        super().__init__()
        self.open, self.words = [], set()

    def handle_starttag(self, tag, attrs):
        self.words.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for k, v in attrs:
            assert k != 'src' and not k.startswith('on'), (tag, k, v)
            if k == 'href':  # links, which load nothing: within the page, or to a notebook
                assert tag == 'a' and v.startswith(('#', 'https://github.com/llama-zh-nb/')), v
            assert 'url(' not in (v or '')

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open and self.open.pop() == tag, tag


def check(page):
    text = page.read_text(encoding='utf-8')
    p = Balanced()
    p.feed(text)
    assert (
        not p.open and 'script' not in p.words and 'link' not in p.words and '@import' not in text
    )
    return text


def test_whole_run(tmp_path):
    text = check(report(whole(tmp_path)))
    for word in (
        'The path',
        'Characters per token',
        'How well it reads',
        'Learning',
        'One question, every stage',
        'Answers right',
        'What fails beside what works',
        'Time, memory, size',
        'Fine print',
    ):
        assert f'<h2>{word}</h2>' in text
    assert (
        '0.50 → 1.50' in text
        and '9.00 → 2.00' in text
        and '&lt;script&gt;' in text
        and 'prefers-color-scheme:dark' in text
        and '@media print' in text
    )


@pytest.mark.parametrize(
    'gone',
    ['weights', 'corpus', 'vocab', 'embeddings', 'pretrain', 'control', 'sft', 'quantize', 'rag'],
)
def test_any_stage_may_be_missing(tmp_path, gone):
    update_run(whole(tmp_path), {}, drop=[gone])
    check(report(tmp_path))


def test_nearly_nothing(tmp_path):
    record(tmp_path, 'weights', params=3)
    check(report(tmp_path, out=tmp_path / 'x' / 'y.html'))
    assert all(not part(Story({})) for part in PARTS)


def test_no_run(tmp_path):
    with pytest.raises(LlamaZhError, match='no run.json'):
        report(tmp_path)


def test_it_looks_right_in_a_browser(tmp_path):
    "No console error, nothing fetched, no sideways scrolling on a desk, a phone and paper"
    pw, chrome = (
        pytest.importorskip('playwright.sync_api'),
        next(
            (
                c
                for c in map(
                    __import__('shutil').which, ('chromium', 'chromium-browser', 'google-chrome')
                )
                if c
            ),
            None,
        ),
    )
    if not chrome:
        pytest.skip('no Chromium on this machine: apt-get install chromium')
    page = report(whole(tmp_path))
    with pw.sync_playwright() as p:
        b = p.chromium.launch(executable_path=chrome, args=['--no-sandbox'])
        for w, scheme in ((1200, 'light'), (1200, 'dark'), (390, 'light'), (320, 'dark')):
            c = b.new_context(viewport=dict(width=w, height=800), color_scheme=scheme)
            pg, bad = c.new_page(), []
            pg.on('console', lambda m, bad=bad: bad.append(m.text))
            pg.on(
                'request',
                lambda r, bad=bad: bad.append(r.url) if not r.url.startswith('file:') else None,
            )
            pg.goto(page.as_uri())
            assert pg.evaluate('document.documentElement.scrollWidth') <= w and not bad, (w, bad)
            assert pg.locator('svg').first.is_visible() or pg.locator('svg').nth(1).is_visible()
            dark = pg.evaluate('getComputedStyle(document.body).backgroundColor')
            assert (sum(map(int, re.findall(r'\d+', dark)[:3])) < 200) == (scheme == 'dark')
        b.close()
