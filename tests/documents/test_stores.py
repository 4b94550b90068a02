"The same for every store, and two programs at one server."

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.documents import write

from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.documents.index import build_index, open_index
from llama_zh_nb.documents.stores import open_store


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    "A real Chroma server"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    p = subprocess.Popen(
        [
            Path(sys.executable).with_name('chroma'),
            'run',
            '--host',
            '127.0.0.1',
            '--port',
            str(port),
            '--path',
            tmp_path_factory.mktemp('chroma'),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(600):
        try:
            socket.create_connection(('127.0.0.1', port), 0.1).close()
            break
        except OSError:
            time.sleep(0.1)
    yield f'http://127.0.0.1:{port}'
    p.terminate()
    p.wait()


def follow(tmp_path, store):
    "The same life of an index, whatever the store"
    d, out = tmp_path / 'docs', tmp_path / 'ix'
    write(d, 6)
    build_index(d, out, store=store)
    (d / '001.txt').unlink()
    (d / '002.txt').write_text('西湖在杭州。', encoding='utf-8')
    ix = build_index(d, out, store=store)
    dense = open_index(out, search='dense')
    assert dense.find('西湖在哪', k=1)[0].page_content == '西湖在杭州。' and len(
        dense.find('船', k=20)
    ) == 5 == len(dense.store)
    assert (
        dense.find('船', files='00[34].txt', k=9)[0].metadata['source'] in ('003.txt', '004.txt')
        and not (out / ix.info['vectors']).exists()
    )
    return dense


def test_milvus(tmp_path):
    pytest.importorskip('langchain_milvus')
    pytest.importorskip('milvus_lite')
    follow(tmp_path, f'milvus://{tmp_path}/m.db').store.close()


CLIENT = """
import sys
from pathlib import Path
from llama_zh_nb.documents.index import build_index, open_index
me, store, box = sys.argv[1], sys.argv[2], Path(sys.argv[3])
(box/me).mkdir()
for round in range(4):
    for i in range(5): (box/me/f'{me}-{i}.txt').write_text(f'{me}的第{i}份，第{round}稿。', encoding='utf-8')
    build_index(box/me, box/f'ix-{me}', store=store)
    found = open_index(box/f'ix-{me}', search='dense').find(f'{me}的第{round}稿', k=30)
    mine = [d.page_content for d in found if d.metadata['source'].startswith(me)]
    assert len(mine) == 5 and all(f'第{round}稿' in t for t in mine), mine
"""


def test_server(server, tmp_path):
    (tmp_path / 'one').mkdir()
    follow(tmp_path / 'one', server)
    shared = f'{server}/shared'  # one collection, several programs that write and read at once
    clients = [
        subprocess.Popen(
            [sys.executable, '-W', 'ignore', '-c', CLIENT, n, shared, tmp_path],
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in ('甲', '乙')
    ]
    for c in clients:
        err = c.communicate(timeout=120)[1]
        assert c.returncode == 0, err[-2000:]
    ix = open_index(tmp_path / 'ix-甲', search='dense')
    assert (
        len(ix.store or ix.find('稿') and ix.store) == 10
    )  # old drafts are gone, both clients' last ones are there
    assert {d.metadata['source'][0] for d in ix.find('第3稿', k=10)} == {'甲', '乙'}
    from langchain_core.embeddings import DeterministicFakeEmbedding

    with pytest.raises(LlamaZhError, match='another embedding'):
        open_store(shared, DeterministicFakeEmbedding(size=8)).add(['x'], ['x'], [{'source': 'x'}])
