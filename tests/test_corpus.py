"""Text files of every kind and damage -> a clean corpus, or one clear message."""

import codecs
import json

import pytest

from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.corpus import build_corpus, held_out, mojibake, reason_to_drop
from llama_zh_nb.text.files import clean, detect, find_files, read_docs, read_texts

DOCS = [
    '黄河流经九个省区，最后注入渤海。',
    '长江发源于青藏高原，全长六千多公里。',
    '泰山在山东省中部，古人称为东岳。',
    '西湖在杭州城西，三面环山，一面临城。',
    '端午节这一天，人们赛龙舟，吃粽子。',
    '敦煌的石窟里保存着许多彩色的壁画。',
    '竹子长得很快，有的一天能长一米多。',
    '秋天到了，北方的树叶渐渐变黄。',
]


def build(tmp_path, sources, **kw):
    r = build_corpus(sources, tmp_path / 'out', **kw)
    rows = [
        json.loads(line)
        for n in ('train', 'valid')
        for line in (tmp_path / 'out' / f'{n}.jsonl').read_text(encoding='utf-8').splitlines()
    ]
    assert len(rows) == r.train + r.valid
    assert not any(c in d['text'] for d in rows for c in '\ufeff\ufffd') and not any(
        '\ud800' <= c <= '\udfff' for d in rows for c in d['text']
    )
    return r, [d['text'] for d in rows]


def count(r):
    return {k: v['count'] for k, v in r.dropped.items()}


# --- encodings


@pytest.mark.parametrize('enc', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-32', 'gb18030', 'gbk'])
def test_encodings(tmp_path, enc):
    (tmp_path / 'a.txt').write_text('\r\n'.join(DOCS), encoding=enc, newline='')
    assert sorted(build(tmp_path, tmp_path / 'a.txt')[1]) == sorted(DOCS)


def test_utf16_big_endian_bom(tmp_path):
    (tmp_path / 'a.txt').write_bytes(codecs.BOM_UTF16_BE + '\n'.join(DOCS).encode('utf-16-be'))
    assert sorted(build(tmp_path, tmp_path / 'a.txt')[1]) == sorted(DOCS)


def test_big5_is_not_taken_for_gb18030(tmp_path):
    trad = ['黃河流經九個省區，最後注入渤海。', '長江發源於青藏高原，全長六千多公里。']
    (tmp_path / 'a.txt').write_text('\n'.join(trad), encoding='big5')
    assert sorted(build(tmp_path, tmp_path / 'a.txt')[1]) == sorted(trad)


def test_one_bad_byte_costs_one_document(tmp_path):
    b = '\n'.join(f'{i}号文件说：{d}' for i in range(40) for d in DOCS).encode()
    at = b.index('20号'.encode()) + 5
    (tmp_path / 'a.txt').write_bytes(b[:at] + b'\xff' + b[at:])
    r, texts = build(tmp_path, tmp_path / 'a.txt')
    assert (
        count(r) == {'undecodable bytes': 1}
        and len(texts) == 319
        and f'byte {at:,}' in r.files[0]['notes'][1]
    )


def test_noise_is_refused_with_file_and_byte(tmp_path):
    (tmp_path / 'a.txt').write_bytes('正常的一行。\n'.encode() + bytes(range(128, 256)) * 50)
    with pytest.raises(LlamaZhError, match=r'a\.txt: byte \d+ \(0x80\)'):
        build_corpus(tmp_path / 'a.txt', tmp_path / 'out')
    assert not (tmp_path / 'out').exists() and [p.name for p in tmp_path.iterdir()] == ['a.txt']


def test_wrong_encoding_named_by_user(tmp_path):
    (tmp_path / 'a.txt').write_text('\n'.join(DOCS), encoding='gb18030')
    with pytest.raises(LlamaZhError, match='is not utf-8: byte 0'):
        build_corpus(tmp_path / 'a.txt', tmp_path / 'out', encoding='utf-8')
    with pytest.raises(LlamaZhError, match='unknown encoding'):
        build_corpus(tmp_path / 'a.txt', tmp_path / 'out', encoding='klingon')


def test_mojibake_of_others():
    assert all(mojibake(d.encode().decode('gb18030', 'ignore')) for d in DOCS) and not any(
        map(mojibake, DOCS)
    )
    assert reason_to_drop('好' * 20 + '\ufffd') == 'mojibake'


# --- kinds of files


def test_kinds(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    d = tmp_path / 'in'
    (d / 'sub').mkdir(parents=True)
    (d / 'a.json').write_text(
        json.dumps([DOCS[0], DOCS[1]], ensure_ascii=False), encoding='utf-8-sig'
    )
    (d / 'b.json').write_text(
        '\n'.join(json.dumps({'text': t}) for t in DOCS[2:4]), encoding='utf-8'
    )
    (d / 'c.csv').write_text(
        'id,content\r\n1,"' + DOCS[4] + '\r\n第二行"\r\n', encoding='utf-8-sig', newline=''
    )
    (d / 'sub' / 'd.md').write_text(f'# {DOCS[5]}\n\n{DOCS[6]}\n', encoding='utf-8')
    pq.write_table(pa.table({'id': [1], 'text': [DOCS[7]]}), d / 'e.parquet')
    r, texts = build(tmp_path, d)
    assert (
        sorted(texts)
        == sorted([*DOCS[:4], DOCS[4] + '\n第二行', f'# {DOCS[5]}\n\n{DOCS[6]}', DOCS[7]])
        and not r.dropped
    )
    assert [n for _, n in find_files([str(d / '**' / '*.md'), d / 'a.json', d])] == [
        'd.md',
        'a.json',
        'b.json',
        'c.csv',
        'e.parquet',
    ]


def test_field(tmp_path):
    (tmp_path / 'a.jsonl').write_text(json.dumps({'q': DOCS[0], 'a': DOCS[1]}), encoding='utf-8')
    assert build(tmp_path, tmp_path / 'a.jsonl', field=['q', 'a'])[1] == ['\n'.join(DOCS[:2])]
    with pytest.raises(LlamaZhError, match='no text field among q, a'):
        build_corpus(tmp_path / 'a.jsonl', tmp_path / 'out2')


def test_paragraphs_and_hard_wrapping(tmp_path):
    para = '　　' + '从前有一座山，山上有一座庙，庙里有一个老和尚正在给小和尚讲故事' * 5 + '。'
    wrapped = '\n'.join(para[i : i + 30] for i in range(0, len(para), 30))
    (tmp_path / 'a.txt').write_text(f'{wrapped}\n\n{wrapped}结束\n\n{DOCS[0]}\n', encoding='utf-8')
    assert [t for _, t in read_docs(tmp_path / 'a.txt')] == [
        para.strip(),
        para.strip() + '结束',
        DOCS[0],
    ]


def test_bad_paths(tmp_path):
    for s in ('nothing.txt', 'x/*.txt'):
        with pytest.raises(LlamaZhError, match='no such file'):
            build_corpus(tmp_path / s, tmp_path / 'out')
    (tmp_path / 'dir').mkdir()
    with pytest.raises(LlamaZhError, match='file in this folder'):
        build_corpus(tmp_path / 'dir', tmp_path / 'out')
    (tmp_path / 'p.txt').write_text('<!DOCTYPE html><html>', encoding='utf-8')
    with pytest.raises(LlamaZhError, match='an HTML page'):
        build_corpus(tmp_path / 'p.txt', tmp_path / 'out')
    (tmp_path / 'x.parquet').write_bytes(b'not parquet')
    with pytest.raises(LlamaZhError, match='not a readable Parquet'):
        build_corpus(tmp_path / 'x.parquet', tmp_path / 'out')


def test_one_bad_file_does_not_stop_the_others(tmp_path):
    (tmp_path / 'a.txt').write_text('\n'.join(DOCS), encoding='utf-8')
    (tmp_path / 'b.json').write_text('[{"text": "x"', encoding='utf-8')
    r, texts = build(tmp_path, tmp_path)
    assert (
        len(texts) == 8
        and len(r.problems) == 1
        and 'line 1' in r.problems[0]
        and 'b.json' in r._repr_html_()
    )


# --- cleaning, splitting, repeating


def test_clean_keeps_what_is_rare():
    rare = '𠀀㐀豈⺀葛󠄀①Ⅷ㎡ＡＢＣ，é👨‍👩‍👧❤️'
    assert clean(rare) == (rare, 0)
    assert clean('a\x00b\ufeffc\ud800d\u202ee\r\nf\u2028g') == ('abcde\nf\ng', 4)


def test_languages(tmp_path):
    (tmp_path / 'a.txt').write_text(
        '\n'.join(
            [
                *DOCS,
                'An English sentence about a river.',
                '日本語の文章はこのようにかなを使います。',
            ]
        ),
        encoding='utf-8',
    )
    assert count(build(tmp_path, tmp_path / 'a.txt')[0]) == {'not Chinese': 2}
    assert build(tmp_path, tmp_path / 'a.txt', lang='en')[1] == [
        'An English sentence about a river.'
    ]
    assert len(build(tmp_path, tmp_path / 'a.txt', lang='any')[1]) == 10


def test_split_does_not_depend_on_order_or_company(tmp_path):
    docs = [f'{i}号档案记录了那一年的收成和天气。' for i in range(600)]
    (tmp_path / 'a.txt').write_text('\n'.join(docs), encoding='utf-8')
    (tmp_path / 'b.txt').write_text('\n'.join(docs[::-1] + DOCS), encoding='utf-8')
    build_corpus(tmp_path / 'a.txt', tmp_path / 'A', valid_share=0.1)
    build_corpus(tmp_path / 'b.txt', tmp_path / 'B', valid_share=0.1)
    a, b = (set(read_texts(tmp_path / n, 'valid')) for n in 'AB')
    assert (
        a == {t for t in b if t in docs} == {d for d in docs if held_out(d, 0.1)}
        and 30 < len(a) < 90
    )
    assert not a & set(read_texts(tmp_path / 'A'))


def test_a_tiny_corpus_still_holds_one_out(tmp_path):
    (tmp_path / 'a.txt').write_text('\n'.join(DOCS[:3]), encoding='utf-8')
    assert (r := build(tmp_path, tmp_path / 'a.txt')[0]).valid == 1 and r.train == 2
    assert build(tmp_path, tmp_path / 'a.txt', valid_share=0)[0].valid == 0


def test_near_duplicates(tmp_path):
    long = (
        ''.join(DOCS)
        + '此外，'
        + '这座城市的图书馆收藏了几万册古书，每天都有很多人来这里读书和查资料。'
    )
    (tmp_path / 'a.txt').write_text(
        '\n'.join([long, long.replace('一米多', '半米多'), ''.join(DOCS[::-1])]), encoding='utf-8'
    )
    assert count(build(tmp_path, tmp_path / 'a.txt')[0]) == {'near duplicate': 1}
    assert len(build(tmp_path, tmp_path / 'a.txt', near_dup=False)[1]) == 3


def test_rebuilding_replaces_and_ignores_its_own_output(tmp_path):
    (tmp_path / 'a.txt').write_text('\n'.join(DOCS), encoding='utf-8')
    one, train = build(tmp_path, tmp_path)[1], list(read_texts(tmp_path / 'out'))
    assert build(tmp_path, tmp_path)[1] == one
    with pytest.raises(LlamaZhError):
        build_corpus(tmp_path / 'a.txt', tmp_path / 'out', min_chars=1000)
    assert (
        list(read_texts(tmp_path / 'out')) == train
    )  # a failed build leaves the old corpus as it was


def test_wrong_arguments(tmp_path):
    (tmp_path / 'a.txt').write_text('\n'.join(DOCS), encoding='utf-8')
    for kw in (dict(lang='fr'), dict(unit='page'), dict(valid_share=1.5), dict(max_chars=1)):
        with pytest.raises(LlamaZhError, match=next(iter(kw))):
            build_corpus(tmp_path / 'a.txt', tmp_path / 'out', **kw)


def test_long_documents_are_cut_at_sentences(tmp_path):
    (tmp_path / 'a.md').write_text(
        '。'.join(f'第{i}句话说的是另一件事' for i in range(300)), encoding='utf-8'
    )
    r, texts = build(tmp_path, tmp_path / 'a.md', max_chars=500, near_dup=False)
    assert (
        r.train + r.valid > 5
        and max(map(len, texts)) <= 500
        and sum(t.endswith('。') for t in texts) == len(texts) - 1
    )


# --- real and hostile files


def test_hostile_gb18030(shared, tmp_path):
    p = shared / 'data/hostile/text/real_gb18030_tcm.txt'
    r, texts = build(tmp_path, p)
    raw = ''.join(p.read_bytes().decode('gb18030').split())
    assert (
        detect(p)[0] == 'gb18030'
        and '太阳病' in ''.join(texts)
        and all(''.join(t.split()) in raw for t in texts)
    )
    assert 'mojibake' not in r.dropped and not r.problems


def test_hostile_bom(shared, tmp_path):
    r, texts = build(tmp_path, shared / 'data/hostile/text/utf8_bom.txt')
    assert any(t.startswith('小，希图冒充') for t in texts)


def test_hostile_truncated(shared, tmp_path):
    r, texts = build(tmp_path, shared / 'data/hostile/text/utf8_truncated_midchar.txt')
    notes = ' '.join(r.files[0]['notes'])
    assert (
        'middle of a character' in notes
        and 'byte 3,001 of 3,002' in notes
        and 'undecodable bytes' not in r.dropped
    )
    assert any(t.endswith('—') for t in texts)  # all whole characters stay


@pytest.mark.parametrize(
    'name,says', [('empty.txt', 'empty'), ('only_whitespace.txt', 'no document in it')]
)
def test_hostile_nothing(shared, tmp_path, name, says):
    with pytest.raises(LlamaZhError, match=f'(?s)no document is left.*{says}'):
        build_corpus(shared / 'data/hostile/text' / name, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('name', ['rare_cjk.txt', 'emoji.txt'])
def test_hostile_rare_characters_are_unchanged(shared, name):
    p = shared / 'data/hostile/text' / name
    raw = [t for _, t in read_docs(p)]
    assert [clean(t) for t in raw] == [(t.strip(), 0) for t in raw]


def test_hostile_injection(shared, tmp_path):
    r, texts = build(tmp_path, shared / 'data/hostile/text/special_token_injection.txt', lang='any')
    assert (
        r.space_marks == 2
        and 'U+2581' in repr(r)
        and '<s> 和 </s>' in '\n'.join(texts)
        and '▁下划线▁' in '\n'.join(texts)
    )


def test_hostile_duplicates(shared, tmp_path):
    r, texts = build(tmp_path, shared / 'data/hostile/text/duplicates.txt')
    assert len(texts) == 40 and count(r) == {
        'exact duplicate': 52,
        'same letters, other punctuation': 18,
    }  # the report says which


def test_hostile_folder(shared, tmp_path):
    r, texts = build(tmp_path, shared / 'data/hostile/text')
    assert len(r.files) == 9 and not r.problems and len(texts) > 50
    assert {f['name']: f['kept'] for f in r.files}['empty.txt'] == 0


def test_real_text_keeps_its_characters(shared, tmp_path):
    names = ['wiki_dev.txt', 'luxun_坟.txt', 'tcm_伤寒论.txt', 'fairytale_auto.txt']
    r, texts = build(tmp_path, [shared / 'data/text_zh' / n for n in names])
    assert not {'mojibake', 'undecodable bytes'} & set(r.dropped) and not r.problems
    bytes_in = sum((shared / 'data/text_zh' / n).stat().st_size for n in names)
    assert r.chars * 3 > 0.8 * bytes_in and r.han / r.chars > 0.6
