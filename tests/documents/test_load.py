"Files of many kinds, whole and broken, and files that want to do harm."

import json
import os
import zipfile

import pytest
from helpers.documents import pdf

from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.core.settings import RagArgs
from llama_zh_nb.documents import load as documents
from llama_zh_nb.documents.index import build_index
from llama_zh_nb.documents.load import (
    DocumentLoader,
    find_documents,
    load_documents,
    read_file,
)


def test_loaders(tmp_path):
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'a.txt').write_bytes(
        '春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。\n'.encode('gb18030')
    )
    (tmp_path / 'sub' / 'b.txt').write_bytes('\ufeff第一行。\r\n第二行。'.encode('utf-16'))
    (tmp_path / 'c.csv').write_bytes(
        '\ufeff问题,答案\n几点开门,八点\n"多少钱","四十元,学生半价"\n'.encode()
    )
    (tmp_path / 'd.jsonl').write_text(
        '{"text": "甲\\ud800\\u2028乙", "id": 7}\nnot json\n["x"]\n', encoding='utf-8'
    )
    (tmp_path / 'e.html').write_text(
        '<title>T</title><script>var 坏=1</script><h2>标题</h2><p>正<b>文</b>。', encoding='utf-8'
    )
    (tmp_path / 'empty.md').write_text('')
    (tmp_path / 'f.docx').write_bytes(b'PK\x03\x04 no text')
    (tmp_path / '.hidden.txt').write_text('no')
    docs = load_documents(tmp_path)
    assert (
        len(build_index(docs, tmp_path.parent / 'odd').find('甲乙')) == 1
    )  # lone surrogates and odd line ends survive
    text = {d.metadata['source'] + str(d.metadata.get('row', '')): d.page_content for d in docs}
    assert text['a.txt'].startswith('春眠不觉晓') and text['sub/b.txt'] == '第一行。\n第二行。'
    assert (
        text['c.csv2'] == '问题：多少钱\n答案：四十元,学生半价'
        and text['d.jsonl1'] == '甲?\u2028乙'
    )
    assert text['e.html'] == '## 标题\n\n正文。' and len(docs) == 6
    assert {n for n, _ in docs.skipped} == {'empty.md', 'f.docx'} and any(
        '2 line(s)' in n for _, n in docs.notes
    )
    assert '2 files skipped' in repr(docs)


def test_bad_sources(tmp_path):
    for bad in (tmp_path / 'no.txt', tmp_path, tmp_path / '*.md'):
        with pytest.raises(LlamaZhError):
            load_documents(bad)
    (tmp_path / 'x.txt').write_bytes(bytes(range(128, 256)) * 20)
    with pytest.raises(LlamaZhError, match='x.txt'):
        load_documents(tmp_path)


def test_hostile_texts(shared):
    loader = DocumentLoader(shared / 'data/hostile/text')
    docs = loader.load()
    assert {'empty.txt', 'only_whitespace.txt'} <= {n for n, _ in loader.skipped}
    bom = next(d for d in docs if d.metadata['source'] == 'utf8_bom.txt')
    assert not bom.page_content.startswith('\ufeff')
    cut = next((d for d in docs if 'truncated' in d.metadata['source']), None)
    assert cut is not None and any('truncated' in n for n, _ in loader.notes)


def test_pdf(tmp_path):
    (tmp_path / 'a.pdf').write_bytes(
        pdf([['渡船早上七点开。', '船票一张', '- 1 -'], ['五元，小狗免费。末班船四点。', '2']])
    )
    docs, _ = read_file(tmp_path / 'a.pdf')
    assert [(d.page_content, d.metadata['page']) for d in docs] == [
        ('渡船早上七点开。\n船票一张五元，小狗免费。', 1),
        ('末班船四点。', 2),
    ]
    ix = build_index(tmp_path, tmp_path.parent / 'pdf', args=RagArgs(embedding='none'))
    assert ix.find('末班船几点')[0].metadata['page'] == 2
    (tmp_path / 'cut.pdf').write_bytes((tmp_path / 'a.pdf').read_bytes()[:500])
    (tmp_path / 'empty.pdf').write_bytes(pdf([[]]))
    skipped = dict(load_documents(tmp_path).skipped)
    assert (
        'cannot be read' in skipped['cut.pdf']
        and 'OCR' in skipped['empty.pdf']
        and len(skipped) == 2
    )


def test_docx(tmp_path):
    docx = pytest.importorskip('docx')
    d = docx.Document()
    d.add_heading('手册', 0)
    d.add_heading('船票', 2)
    d.add_paragraph('单程五元。')
    t = d.add_table(2, 3)
    t.cell(0, 0).merge(t.cell(0, 1)).text = '青鱼号'
    t.cell(0, 2).text = '七|点'
    t.cell(1, 0).text = '两\n行'
    d.add_paragraph('以上。')
    d.save(tmp_path / 'a.docx')
    assert (
        read_file(tmp_path / 'a.docx')[0][0].page_content
        == '# 手册\n\n## 船票\n\n单程五元。\n\n| 青鱼号 | 七｜点 |\n| 两 行 |  |  |\n\n以上。'
    )
    (tmp_path / 'old.docx').write_bytes(b'\xd0\xcf\x11\xe0' + bytes(600))
    (tmp_path / 'text.docx').write_text('不是 Word')
    (tmp_path / 'a.doc').write_bytes(b'x')
    with zipfile.ZipFile(tmp_path / 'zip.docx', 'w') as z:
        z.writestr('word/x.xml', '<a/>')
    assert {n for n, _ in load_documents(tmp_path).skipped} == {
        'old.docx',
        'text.docx',
        'a.doc',
        'zip.docx',
    }


def test_bombs_and_sizes(tmp_path, monkeypatch):
    with (
        zipfile.ZipFile(tmp_path / 'bomb.docx', 'w', zipfile.ZIP_DEFLATED) as z,
        z.open('word/document.xml', 'w') as f,
    ):
        for _ in range(documents.MAX_UNPACKED // (1 << 22) + 1):
            f.write(bytes(1 << 22))
    assert (tmp_path / 'bomb.docx').stat().st_size < 1 << 20
    with pytest.raises(LlamaZhError, match='unpack'):
        read_file(tmp_path / 'bomb.docx')
    import zlib

    deep = zlib.compress(zlib.compress(b' ' * (200 << 20), 9), 9)
    body = b'%PDF-1.4\n1 0 obj\n<</Type/Catalog/Pages 2 0 R>>\nendobj\n2 0 obj\n<</Type/Pages/Count 1/Kids[3 0 R]>>\nendobj\n3 0 obj\n<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]/Contents 4 0 R>>\nendobj\n'
    body += (
        b'4 0 obj\n<</Filter[/FlateDecode/FlateDecode]/Length '
        + str(len(deep)).encode()
        + b'>>\nstream\n'
        + deep
        + b'\nendstream\nendobj\ntrailer<</Root 1 0 R/Size 5>>\n%%EOF'
    )
    (tmp_path / 'bomb.pdf').write_bytes(body)
    with pytest.raises(LlamaZhError):
        read_file(tmp_path / 'bomb.pdf')
    (tmp_path / 'big.txt').write_text('大' * 400_000, encoding='utf-8')
    with pytest.raises(LlamaZhError, match='max_mib'):
        read_file(tmp_path / 'big.txt', max_mib=1)
    monkeypatch.setattr(documents, 'MAX_TEXT', 10)
    (tmp_path / 'long.pdf').write_bytes(pdf([['一二三四五六七八九十十一']]))
    with pytest.raises(LlamaZhError, match='several files'):
        read_file(tmp_path / 'long.pdf')


def test_names_and_links(tmp_path):
    d = tmp_path / 'docs'
    for sub in ('甲', '乙', '.git'):
        (d / sub).mkdir(parents=True)
        (d / sub / '说明.txt').write_text(f'这是{sub}。', encoding='utf-8')
    (tmp_path / 'secret.txt').write_text('秘密')
    (tmp_path / 'far').mkdir()
    (tmp_path / 'far' / 'x.txt').write_text('远')
    (d / 'link.txt').symlink_to(tmp_path / 'secret.txt')
    (d / 'folder').symlink_to(tmp_path / 'far')
    (d / 'dead.txt').symlink_to(d / 'nothing')
    (d / 'same.txt').symlink_to('甲/说明.txt')
    os.mkfifo(d / 'pipe.txt')
    for n in ('a\nb.txt', 'a\u202egnp.txt', b'\xff.txt', '\\xff.txt'):
        name = os.fsdecode(n if isinstance(n, bytes) else n.encode())
        (d / name).write_text(f'内容{n!r}', encoding='utf-8')
    docs = load_documents(d)
    names = [x.metadata['source'] for x in docs]
    assert len(names) == len(set(names)) == 6 and not any(
        c in n for n in names for c in '\n\u202e\udcff'
    )
    assert '秘密' not in str(docs) and '远' not in ''.join(x.page_content for x in docs)
    assert {n for n, _ in docs.skipped} == {'link.txt', 'dead.txt', 'pipe.txt'}
    both = find_documents([d / '甲' / '说明.txt', d / '乙' / '说明.txt', d / '甲'])
    assert [n for _, n, _ in both] == ['说明.txt', '乙/说明.txt']
    json.dumps(names, ensure_ascii=False).encode()
