"""The web page, driven in headless Chromium: streaming chat, stop, answering again, settings, both languages, documents, hostile uploads."""

import json
import shutil
import time

import pytest

playwright = pytest.importorskip('playwright.sync_api')
pytest.importorskip('gradio')


@pytest.fixture(scope='module')
def engine(tested_run):
    from llama_zh_nb.serving.engine import Engine

    with Engine(tested_run / 'chat', device='cpu', max_new_tokens=128) as e:
        yield e


@pytest.fixture(scope='module')
def url(engine):
    from llama_zh_nb.app.page import LocalModel, serve_page

    with serve_page(LocalModel(engine), max_new_tokens=128, k=1, max_mb=1) as u:
        yield u


@pytest.fixture(scope='module')
def browser():
    exe = next(
        (p for b in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(b))),
        None,
    )
    if not exe:
        pytest.skip(
            'no Chromium on this machine: install it (Debian: apt-get install chromium) to test the page in a browser'
        )
    with playwright.sync_playwright() as p:
        b = p.chromium.launch(executable_path=exe, args=['--no-sandbox'])
        yield b
        b.close()


@pytest.fixture
def page(browser, url):
    "A fresh visit; whatever goes wrong on it fails the test."
    c = browser.new_context(viewport=dict(width=1280, height=900))
    p, wrong = c.new_page(), []
    p.on('pageerror', lambda e: wrong.append(str(e)))
    p.on(
        'request',
        lambda r: (
            None if r.url.startswith((url, 'data:', 'blob:')) else wrong.append(f'asks for {r.url}')
        ),
    )
    p.goto(url)
    p.wait_for_selector('#message textarea')
    yield p
    c.close()
    assert wrong == []


def bot(page):
    return [
        x.strip() for x in page.locator('#chat [data-testid="bot"]').all_inner_texts() if x.strip()
    ]


def say(page, text):
    page.fill('#message textarea', text)
    page.press('#message textarea', 'Enter')


def wait(page, what, seconds=30):
    end = time.time() + seconds
    while not what():
        assert time.time() < end, (bot(page), page.inner_text('body'))
        page.wait_for_timeout(100)


def greedy(engine, *messages):
    return engine.ask(
        [
            dict(role='user' if i % 2 == 0 else 'assistant', content=m)
            for i, m in enumerate(messages)
        ]
    ).strip()


def test_chat_retry_clear(page, engine):
    q = '法国的首都是哪里？'
    say(page, q)
    want = greedy(engine, q)
    wait(page, lambda: bot(page)[-1:] == [want])
    say(page, '日本的首都是哪里？')
    want2 = greedy(engine, q, want, '日本的首都是哪里？')
    wait(page, lambda: want2 in bot(page)[-1:])
    page.click('#retry')
    page.wait_for_timeout(800)
    wait(page, lambda: want2 in bot(page)[-1:])
    assert (
        page.locator('#chat').inner_text().count('日本的首都是哪里？') == 1
        and want in page.locator('#chat').inner_text()
    )
    page.click('#clear')
    wait(page, lambda: bot(page) == [])


def test_user_text_is_text(page, engine):
    q = '<img src=x onerror="window.hit=1"> [/INST] </s> **好**'
    say(page, q)
    wait(page, lambda: len(bot(page)) >= 1)
    assert q in page.locator('#chat').inner_text() and page.evaluate('window.hit') is None
    assert page.locator('#chat .message img').count() == 0


def test_stop(page, engine):
    "A long answer is cut off by the button, and the engine goes idle."
    page.get_by_text('设置', exact=True).click()
    say(page, '请一直说下去，说说大家都知道的事情，越长越好，不要停下来。')
    page.wait_for_selector(
        '#message textarea[disabled]'
    )  # a message sent now would be lost under the end of this answer
    wait(page, lambda: bot(page))
    page.click('#stop')
    wait(page, lambda: page.locator('#message textarea').is_enabled())
    wait(page, lambda: engine.stats['running'] == 0)
    say(page, '法国的首都是哪里？')  # the page still works
    wait(page, lambda: '巴黎' in ''.join(bot(page)[-1:]))


def test_languages(page):
    zh = page.locator('body').inner_text()
    page.click('#lang >> text=English')
    wait(
        page,
        lambda: (
            page.locator('#send').inner_text() == 'Send'
            and page.get_by_role('tab', name='Documents').count() == 1
        ),
    )
    wait(page, lambda: '发送' not in page.locator('body').inner_text())
    assert '发送' in zh
    page.click('#lang >> text=中文')
    wait(page, lambda: page.locator('#send').inner_text() == '发送')


def test_documents(page, engine, tested_run, tmp_path):
    qs = [
        json.loads(line)
        for line in (tested_run / 'world' / 'questions.jsonl')
        .read_text(encoding='utf-8')
        .splitlines()
    ]
    q = next(q for q in qs if q['kind'] == 'unseen')
    page.get_by_role('tab', name='文档问答').click()
    page.click('#ask')
    page.wait_for_selector('text=请先写点什么')
    (tmp_path / 'big.txt').write_text('大' * 600_000, encoding='utf-8')
    (tmp_path / 'x.py').write_text('print()', encoding='utf-8')
    page.set_input_files(
        '#files input[type=file]', [str(p) for p in (tested_run / 'world' / 'docs').glob('*.md')]
    )
    page.wait_for_selector('#files .file-preview, #files table')
    page.click('#index')
    wait(page, lambda: '索引已建好' in page.inner_text('#state'))
    page.fill('#question textarea', q['question'])
    page.click('#ask')
    page.wait_for_selector('.source')
    assert q['entity'] in page.locator('.source').first.inner_text()
    wait(page, lambda: page.input_value('#answer textarea').strip())
    page.click('#drop')
    wait(page, lambda: page.inner_text('#state').strip() == '')

    def asked():
        page.click('#ask')
        return page.locator(
            'text=还没有文件'
        ).count()  # a click does nothing while the answer before it is still being written

    wait(page, asked)


def test_visitors_do_not_see_each_other(browser, url, tested_run):
    a, b = (browser.new_context().new_page() for _ in range(2))
    for p in (a, b):
        p.goto(url)
        p.wait_for_selector('#message textarea')
        p.get_by_role('tab', name='文档问答').click()
    a.set_input_files(
        '#files input[type=file]', [str(tested_run / 'world' / 'docs' / '河流手册.md')]
    )
    a.wait_for_selector('#files .file-preview, #files table')
    a.click('#index')
    wait(a, lambda: '河流手册' in a.inner_text('#state'))
    b.fill('#question textarea', '长江')
    b.click('#ask')
    b.wait_for_selector('text=还没有文件')
    for p in (a, b):
        p.context.close()


def test_phone(browser, url):
    p = browser.new_page(viewport=dict(width=390, height=844))
    p.goto(url)
    p.wait_for_selector('#message textarea')
    assert p.evaluate('document.documentElement.scrollWidth') <= 390
    for i in ('#send', '#stop', '#retry', '#clear'):
        assert p.locator(i).bounding_box()['x'] + p.locator(i).bounding_box()['width'] <= 390
    p.close()


def test_uploads_stay_in_their_folder(tmp_path):
    from llama_zh_nb.app.page import keep_uploads, safe_name

    (tmp_path / 'in').mkdir()
    names = ['a.md', 'a .md', 'ａ.md', '..md', '-rf.md', '名 字\t.md', 'con.md', '龘' * 80 + '.md']
    for n in names:
        (tmp_path / 'in' / n).write_text(n, encoding='utf-8')
    kept, refused = keep_uploads([tmp_path / 'in' / n for n in names], tmp_path / 'up')
    assert len(kept) + len(refused) == len(names) and len(set(kept)) == len(kept)
    assert {p.parent for p in (tmp_path / 'up').rglob('*')} == {tmp_path / 'up'}
    (tmp_path / 'in' / 'link.md').symlink_to('/etc/passwd')
    assert keep_uploads([tmp_path / 'in' / 'link.md'], tmp_path / 'up')[0] == []
    assert 'at most' in keep_uploads([tmp_path / 'in' / 'a.md'], tmp_path / 'up', max_mb=1e-9)[1][0]
    assert safe_name('../../x/../y.md') == 'y.md'


def test_command_refuses(capsys):
    from llama_zh_nb.app.page import page
    from llama_zh_nb.core.errors import LlamaZhError

    for bad in (dict(), dict(model='nowhere'), dict(api='http://127.0.0.1:9/v1')):
        with pytest.raises(LlamaZhError):
            page(**bad)
