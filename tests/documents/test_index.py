"An index that is changed, stopped, damaged, or built by several at once."

import itertools
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.documents import same, write

from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.core.settings import RagArgs
from llama_zh_nb.documents import index as indexing
from llama_zh_nb.documents.index import build_index, open_index
from llama_zh_nb.documents.load import Document
from llama_zh_nb.documents.recall import pick_threshold


def test_index_opens_elsewhere(town):
    code = f"from llama_zh_nb.documents.index import open_index; d = open_index({str(town / 'index')!r}).find('去县城的船几点开？')[0]; print(d.metadata['score'], d.page_content)"
    out = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, timeout=120
    ).stdout
    assert '每天早上七点有船去县城' in out and 0 < float(out.split()[0]) < 1


def test_failed_build_keeps_the_old_index(town, tmp_path, monkeypatch):
    out = tmp_path / 'index'
    build_index([Document('甲乙丙丁。', metadata={'source': 'a'})], out)

    def stop(*a, **k):
        raise KeyboardInterrupt

    monkeypatch.setattr(indexing, '_fill', stop)
    with pytest.raises(KeyboardInterrupt):
        build_index(town / 'docs', out)
    assert open_index(out).find('甲乙')[0].page_content == '甲乙丙丁。' and sorted(
        p.name for p in tmp_path.iterdir()
    ) == ['.index.parts', 'index']  # parts are for the next try


def test_damaged_index(town, tmp_path):
    import shutil

    shutil.copytree(town / 'index', tmp_path / 'i')
    lines = (tmp_path / 'i/chunks.jsonl').read_text(encoding='utf-8').splitlines()
    (tmp_path / 'i/chunks.jsonl').write_text('\n'.join(lines[:-1]), encoding='utf-8')
    with pytest.raises(LlamaZhError, match='damaged'):
        open_index(tmp_path / 'i')
    with pytest.raises(LlamaZhError, match='not an index'):
        open_index(tmp_path)


def test_only_what_changed_is_read(tmp_path, monkeypatch):
    d, out, read = tmp_path / 'docs', tmp_path / 'ix', []
    real = indexing.read_file
    monkeypatch.setattr(
        indexing, 'read_file', lambda p, *a: read.append(Path(p).name) or real(p, *a)
    )
    write(d, 12)
    (d / 'broken.txt').write_bytes(b'\x89PNG\r\n')
    ix = build_index(d, out)
    assert (
        len(read) == 13
        and ix.info['skipped'][0][0] == 'broken.txt'
        and 'skipped broken.txt' in repr(ix)
    )
    pick_threshold(
        ix,
        [
            {'question': '第7号船几点开', 'source': '007.txt'},
            {'question': '第3号船票价', 'source': '003.txt'},
        ],
    )
    stamp, read[:] = (out / 'index.json').stat().st_mtime_ns, []
    assert (
        len(build_index(d, out)) == 12
        and read == ['broken.txt']
        and (out / 'index.json').stat().st_mtime_ns == stamp
    )  # nothing was written
    (d / '003.txt').unlink()
    (d / '005.txt').write_text('新的一句话，和原来的不同。')
    (d / '020.txt').write_text('后来的船。')
    (d / '007.txt').rename(d / '107.txt')
    (d / 'broken.txt').write_text('修好了。')
    read.clear()
    ix = build_index(d, out)
    assert sorted(read) == ['005.txt', '020.txt', '107.txt', 'broken.txt'] and ix.info[
        'update'
    ] == dict(kept=9, read=4, gone=2)
    assert same(ix, build_index(d, tmp_path / 'whole')) and not ix.info['skipped']
    assert ix.threshold == json.loads((out / 'index.json').read_text())['thresholds']['lexical']
    dense = open_index(out, search='dense')
    assert {x.metadata['source'] for x in dense.find('船', k=50)} == {
        x.metadata['source'] for x in ix.chunks
    }  # the store followed, too
    assert (
        len(build_index(d, out, args=RagArgs(chunk_tokens=64))) == len(ix) and len(read) > 12
    )  # other settings: all anew
    assert sorted(p.name for p in tmp_path.iterdir()) == ['docs', 'ix', 'whole']


KILLED = """
import sys, time
from pathlib import Path
from llama_zh_nb.documents import load as documents, index as indexing
log, slow = open(sys.argv[3], 'a'), documents.READERS['.txt']
def read(path, *a): log.write(Path(path).name + chr(10)); log.flush(); time.sleep(float(sys.argv[4])); return slow(path, *a)
documents.READERS['.txt'], batches = read, indexing._batches
indexing._batches = lambda items: batches(items, most=5)
indexing.build_index(sys.argv[1], sys.argv[2], indexing.RagArgs(embedding='none'))
"""


@pytest.mark.parametrize('old', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_killed_and_resumed(tmp_path, old):
    d, out, log = tmp_path / 'docs', tmp_path / 'ix', tmp_path / 'log'
    if old:
        write(d, 3)
        build_index(d, out, args=RagArgs(embedding='none'))
    write(d, 40)

    def run(pause):
        return subprocess.Popen(
            [sys.executable, '-W', 'ignore', '-c', KILLED, d, out, log, pause],
            stderr=subprocess.DEVNULL,
        )

    p = run('.05')
    while not (log.exists() and len(log.read_text().split()) >= 18):
        assert p.poll() is None
        time.sleep(0.02)
    p.send_signal(signal.SIGKILL)
    p.wait()
    first = log.read_text().split()
    assert out.exists() == old and len(first) < 40 and (not old or len(open_index(out)) == 3)
    log.unlink()
    assert run('0').wait() == 0
    again = log.read_text().split()
    assert (
        len(set(first) & set(again)) <= 5 and len(again) <= 40 - len(first) + 5
    )  # of what was finished, nothing
    ix = open_index(out)
    assert len(ix) == 40 and same(
        ix, build_index(d, tmp_path / 'whole', args=RagArgs(embedding='none'))
    )
    assert not [p for p in tmp_path.iterdir() if p.name[0] == '.']


def test_several_processes_give_the_same(tmp_path, monkeypatch):
    write(tmp_path / 'd', 24)
    real = indexing._batches
    monkeypatch.setattr(indexing, '_batches', lambda items: real(items, most=8))
    assert same(
        build_index(tmp_path / 'd', tmp_path / 'two', workers=2, args=RagArgs(embedding='none')),
        build_index(tmp_path / 'd', tmp_path / 'one', args=RagArgs(embedding='none')),
    )


def test_workers_end_with_their_parent(tmp_path):
    psutil = pytest.importorskip('psutil')
    write(tmp_path / 'd', 40)
    code = KILLED.replace("embedding='none')", "embedding='none'), workers=2")
    run = tmp_path / 'run.py'
    run.write_text(
        'if __name__ == "__main__":\n'
        + ''.join(f'    {line}\n' for line in code.strip().split('\n'))
    )
    p = subprocess.Popen(
        [
            sys.executable,
            '-W',
            'ignore',
            run,
            tmp_path / 'd',
            tmp_path / 'ix',
            tmp_path / 'log',
            '0',
        ],
        stderr=subprocess.DEVNULL,
    )
    workers = []
    while len(workers) < 2 and p.poll() is None:
        workers = [
            c for c in psutil.Process(p.pid).children() if 'spawn_main' in ' '.join(c.cmdline())
        ]
        time.sleep(0.01)
    assert len(workers) == 2
    p.kill()
    p.wait()
    for _ in range(1500):
        if not any(w.is_running() for w in workers):
            return
        time.sleep(0.02)
    pytest.fail('workers live on without their parent')


def test_one_builder_at_a_time(tmp_path):
    write(tmp_path / 'd', 2)
    with (
        indexing._working(tmp_path / '.ix.parts', {}),
        pytest.raises(LlamaZhError, match='already'),
    ):
        build_index(tmp_path / 'd', tmp_path / 'ix', args=RagArgs(embedding='none'))
    assert len(build_index(tmp_path / 'd', tmp_path / 'ix', args=RagArgs(embedding='none'))) == 2


def test_wrong_use(tmp_path):
    write(tmp_path / 'd', 2)
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'x').touch()
    (tmp_path / 'empty').mkdir()
    bad = [
        dict(out='full'),
        dict(docs=tmp_path / 'empty'),
        dict(docs=tmp_path / 'none'),
        dict(args=RagArgs(chunk_tokens=0)),
        dict(args=RagArgs(chunk_overlap=-1)),
        dict(args=RagArgs(chunk_tokens=10, chunk_overlap=10)),
        dict(args=RagArgs(embedding='/no/model')),
        dict(store='somewhere'),
        dict(store='http://127.0.0.1:9'),
        dict(encoding='no-such'),
        dict(tokenizer='/no/tokenizer'),
        dict(max_mib=0),
        dict(docs=[]),
        dict(workers=0),
    ]
    for kw in bad:
        with pytest.raises(LlamaZhError):
            build_index(kw.pop('docs', tmp_path / 'd'), tmp_path / kw.pop('out', 'ix'), **kw)
        assert not (tmp_path / 'ix').exists() and not [
            p for p in tmp_path.iterdir() if p.name[0] == '.'
        ], kw
    ix = build_index(tmp_path / 'd', tmp_path / 'ix', args=RagArgs(embedding='none'))
    with pytest.raises(LlamaZhError, match='without vectors'):
        open_index(tmp_path / 'ix', search='hybrid').find('船')
    with pytest.raises(LlamaZhError, match='no file'):
        ix.find('船', files='x.txt')
    (tmp_path / 'ix' / 'index.json').write_text('{"version": 1}')
    with pytest.raises(LlamaZhError, match='again'):
        open_index(tmp_path / 'ix')


MANY = """
import json, random, resource, sys
from pathlib import Path
from llama_zh_nb.core.settings import RagArgs
from llama_zh_nb.documents.index import build_index
if __name__ == '__main__':
    ix = build_index(sys.argv[1], sys.argv[2], RagArgs(embedding='none'), workers=2)
    peak = max(resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps(dict(documents=ix.info['documents'], chunks=len(ix), mib=peak/1024, found=ix.find('第9999号文件')[0].metadata['source'])))
"""


@pytest.mark.slow
def test_ten_thousand(tmp_path):
    "10,000 files on two processes; no process takes more than 1 GiB"
    rng, chars = (
        random.Random(0),
        [
            bytes([a, b]).decode('gb2312', 'ignore')
            for a in range(0xB0, 0xD7)
            for b in range(0xA1, 0xFA)
        ],
    )
    weights = list(itertools.accumulate(1 / (i + 3) for i in range(len(chars))))
    (tmp_path / 'docs').mkdir()
    (tmp_path / 'run.py').write_text(MANY)
    for i in range(10_000):
        (tmp_path / 'docs' / f'{i}.txt').write_text(
            f'第{i}号文件。\n'
            + ''.join(
                ''.join(rng.choices(chars, cum_weights=weights, k=rng.randint(8, 30))) + '。'
                for _ in range(40)
            ),
            encoding='utf-8',
        )
    out = subprocess.run(
        [sys.executable, '-W', 'ignore', tmp_path / 'run.py', tmp_path / 'docs', tmp_path / 'ix'],
        capture_output=True,
        text=True,
    )
    got = json.loads(out.stdout.splitlines()[-1])
    print(got)
    assert got['documents'] == 10_000 and got['mib'] < 1024 and got['found'] == '9999.txt'
