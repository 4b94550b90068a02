"""The commands of a terminal, and what must never reach its screen."""

import json
import re

import pytest
from helpers.conversations import TEXT, stub, terminal

pytest.importorskip('torch')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    from llama_zh_nb.weights import acquire

    return acquire('mini', tmp_path_factory.mktemp('terminal') / 'base')


@pytest.fixture(scope='module')
def mini(folder):
    from llama_zh_nb.checkpoint.folder import load

    return load(folder, 'cpu', 'float32')


def test_commands(mini, tmp_path):
    f = tmp_path / '谈话.json'
    out, err, term = terminal(
        stub(mini),
        '一',
        '二\\',
        '三',
        '/history',
        f'/save {f}',
        f'/save {f}',
        '/system 你是助手',
        '/system',
        f'/load {f}',
        '/retry',
        '/preset linksoul',
        '/help',
        '/nothing',
        '/quit',
        '没有人读',
    )
    assert [m['content'] for m in term.chat.turns] == ['一', TEXT, '二\n三', TEXT]
    assert (
        out.splitlines()[:2] == [TEXT, TEXT]
        and '你是助手' in out
        and '/retry' in out
        and 'temperature 0.95' in out
    )
    assert (
        term.failed == 1
        and "unknown command '/nothing'" in err
        and '没有人读' not in repr(term.chat)
    )
    assert json.loads(f.read_text('utf-8'))[0]['messages'] == term.chat.messages
    before = f.read_bytes()
    _, err, _ = terminal(
        stub(mini), '别的', f'/save {f}', '/save', '/load nowhere.json', '/retry x'
    )
    assert 'exists already' in err and f.read_bytes() == before and err.count('llama-zh:') == 3


def test_nothing_reaches_the_terminal(mini):
    out, _, _ = terminal(stub(mini, text='a\x1b]0;x\x07b\x9b31m'), '问')
    assert not re.search('[\x00-\x09\x0b-\x1f\x7f-\x9f]', out)
