"Chat data of every shape: what is read, what is refused, and what is said about it."

import json
from pathlib import Path

import pytest
from helpers.files import write
from helpers.tiny import talk

from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.text.chats import read_chats


@pytest.mark.parametrize(
    'row,want',
    [
        (dict(instruction='翻译', input='hello', output='你好'), talk('翻译\nhello', '你好')),
        (dict(instruction='q', input='', output=['a', 'r', 'b']), talk('q', 'a', 'r', 'b')),
        (
            dict(
                instruction='q',
                output=[
                    {'from': 'gpt', 'value': 'a'},
                    {'from': 'human', 'value': 'r'},
                    {'from': 'gpt', 'value': 'b'},
                ],
            ),
            talk('q', 'a', 'r', 'b'),
        ),
        (dict(instruction='r', output='b', history=[['q', 'a']]), talk('q', 'a', 'r', 'b')),
        (
            dict(conversations=[{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a'}]),
            talk('q', 'a'),
        ),
        (
            dict(messages=[dict(role='system', content='s')] + talk('q', 'a')),
            [dict(role='system', content='s')] + talk('q', 'a'),
        ),
        (
            dict(
                messages=[
                    dict(role='user', content=[dict(type='text', text='q')]),
                    dict(role='assistant', content='a'),
                ]
            ),
            talk('q', 'a'),
        ),
        (
            dict(conversation=[dict(human='q', assistant='a'), dict(human='r', assistant='b')]),
            talk('q', 'a', 'r', 'b'),
        ),
        (
            dict(text='<s>Human: q\n</s><s>Assistant: a\n</s><s>Human: r</s><s>Assistant: b</s>'),
            talk('q', 'a', 'r', 'b'),
        ),
        (
            dict(text='<s>System: s\n</s><s>Human: q\n</s><s>Assistant: a\n</s>'),
            [dict(role='system', content='s')] + talk('q', 'a'),
        ),
        (dict(text='<s>\nhuman:\nq\n</s><s>\nassistant:\na\n</s>'), talk('q', 'a')),
        (
            dict(
                text='<s>[INST] <<SYS>>\ns\n<</SYS>>\n\nq [/INST] a </s><s>[INST] r [/INST] b </s>'
            ),
            [dict(role='system', content='s')] + talk('q', 'a', 'r', 'b'),
        ),
        (dict(text='Below is ...\n\n### Instruction:\nq\n\n### Response: a</s>'), talk('q', 'a')),
        (dict(prompt='q', response='a'), talk('q', 'a')),
        (dict(instruction='t', instances=[dict(input='x', output='a')]), talk('t\nx', 'a')),
    ],
)
def test_shapes(row, want):
    assert [c['messages'] for c in read_chats([row])] == [want]


@pytest.mark.parametrize(
    'row,why',
    [
        (dict(instruction='q', output=''), 'nothing to learn'),
        (dict(instruction='q', output=None), 'output is missing'),
        (dict(instruction='q', output=3), 'output is int'),
        (dict(messages=talk('q')), 'nothing to learn'),
        (dict(messages=talk('q', 'a') + talk('r', 'b')[1:]), 'two turns|in a row'),
        (dict(x=1), 'no known fields; found x'),
        (dict(conversations=[{'from': 'tool', 'value': 'x'}]), "unknown role 'tool'"),
        (dict(text='only prose'), 'no turns found'),
        ([], 'list instead of'),
        ('text', 'str instead of'),
    ],
)
def test_rows_that_cannot_be_learnt(row, why):
    with pytest.raises(LlamaZhError, match=why):
        read_chats([dict(instruction='', output=''), row])


def test_lines_of_bad_rows(tmp_path):
    "In an array too, a bad row is named by its line."
    f = write(
        tmp_path,
        'a.txt',
        '[\n {"instruction": "q\u2028x",\n  "output": "a"},\n\n {"instruction": "q",\n  "output": ""},\n {"instruction": "q", "output": "b"}]',
    )
    c = read_chats(f)
    assert len(c) == 2 and [line for _, line, _ in c.bad] == [5] and c[1]['source'].endswith(':7')


def test_notes(tmp_path):
    f = write(
        tmp_path,
        'a.jsonl',
        '\n'.join(
            json.dumps(dict(messages=m))
            for m in (talk('q', 'a', 'r'), talk('', '')[1:] + talk('q', 'a'))
        ),
    )
    c = read_chats(f)
    assert [x['messages'] for x in c] == [talk('q', 'a')] * 2 and sum(c.notes.values()) == 2


def test_parquet_gb18030_folder(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(dict(messages=[talk('问', '答')])), tmp_path / 'a.parquet')
    write(
        tmp_path,
        'b.json',
        '\n'.join(
            json.dumps(
                dict(instruction=f'这是第{i}个问题，请回答', output='这是回答'), ensure_ascii=False
            )
            for i in range(20)
        ),
        encoding='gb18030',
    )
    write(tmp_path, 'c.csv', '\ufeffinstruction,output\r\n"你好，\r\n世界",好\r\n')
    c = read_chats(tmp_path)
    assert (
        len(c) == 22
        and c[1]['messages'][0]['content'] == '这是第0个问题，请回答'
        and c[-1]['messages'] == talk('你好，\n世界', '好')
    )


@pytest.mark.parametrize(
    'name,text,why',
    [
        ('a.json', '[{"instruction": "a", "output": "b"},\n{"instru', 'line 2: not valid JSON'),
        ('a.csv', 'text\n"<s>Human: a', 'not a valid table'),
        ('a.json', '', 'is empty'),
        ('a.txt', '今天天气很好。', 'holds no chats'),
        ('a.json', ' \n ', 'white space|empty'),
        ('a.json', '{"data": []}', 'hold no rows'),
    ],
)
def test_files_that_are_no_chats(tmp_path, name, text, why):
    with pytest.raises(LlamaZhError, match=why):
        read_chats(write(tmp_path, name, text))


def test_folder_by_content(tmp_path):
    "In a folder the content decides; what is no chat is named, and does not stop the rest."
    import gzip

    row = '{"instruction": "q", "output": "%s"}\n'
    write(tmp_path, 'lines.txt', row % 'a')
    write(tmp_path, 'README.md', '# no chats')
    write(tmp_path, 'words.csv', 'en,zh\nriver,河\n')
    (tmp_path / 'b.jsonl.gz').write_bytes(gzip.compress((row % 'b').encode()))
    (tmp_path / '.cache').mkdir()
    write(tmp_path, '.cache/c.json', row % 'c')
    c = read_chats(tmp_path)
    assert sorted(x['messages'][1]['content'] for x in c) == ['a', 'b']
    assert [Path(f).name for f, _, _ in c.bad] == ['words.csv'] and any(
        'README.md' in k for k in c.notes
    )
    with pytest.raises(LlamaZhError, match='holds no chats'):
        read_chats(tmp_path / 'words.csv')
    (tmp_path / 'bad.gz').write_bytes(b'\x1f\x8bxx')
    with pytest.raises(LlamaZhError, match='gzip'):
        read_chats(tmp_path / 'bad.gz')


def test_a_byte_that_is_no_text_spoils_its_row_only(tmp_path):
    rows = [
        json.dumps(
            dict(instruction=f'这是第{i}个问题', output='这是回答'), ensure_ascii=False
        ).encode()
        for i in range(300)
    ]
    rows[7] = rows[7].replace('答'.encode(), b'\xff')
    (tmp_path / 'a.jsonl').write_bytes(b'\n'.join(rows))
    c = read_chats(tmp_path / 'a.jsonl')
    assert len(c) == 299 and [
        (line, 'no text in the encoding' in why) for _, line, why in c.bad
    ] == [(8, True)]


def test_data_sets(tmp_path, monkeypatch):
    "A folder that `datasets` saved; a data set of the Hub by its name; a name that leads nowhere."
    import datasets

    ds = datasets.Dataset.from_list([dict(messages=talk('问', '答'))])
    ds.save_to_disk(tmp_path / 'one')
    datasets.DatasetDict(train=ds, test=ds).save_to_disk(tmp_path / 'two')
    for n in ('one', 'two'):
        assert read_chats(tmp_path / n)[0]['messages'] == talk('问', '答')
    asked = []

    def load(name, split=None):
        asked.append((name, split))
        if name == 'a/gone':
            raise FileNotFoundError('no such data set')
        return ds if split else datasets.DatasetDict(test=ds)

    monkeypatch.setattr(datasets, 'load_dataset', load)
    c = read_chats('owner/some-chats:test')
    assert (
        c[0]['messages'] == talk('问', '答')
        and c[0]['source'] == 'owner/some-chats:test:1'
        and asked == [('owner/some-chats', 'test')]
    )
    with pytest.raises(
        LlamaZhError, match="no split 'train', but test; write owner/some-chats:test"
    ):
        read_chats('owner/some-chats')
    with pytest.raises(LlamaZhError, match='no chats at a/gone.*no such data set'):
        read_chats('a/gone')
    with pytest.raises(LlamaZhError, match='no such file'):
        read_chats('nowhere/file.json')
    assert len(asked) == 3


def test_languages_are_counted():
    c = read_chats(
        [
            dict(prompt='翻译：长江', response='the Yangtze'),
            dict(prompt='q', response='长江 long'),
            dict(prompt='多少?', response='3'),
        ]
    )
    assert (
        c.languages == dict(en=1, zh=2)
        and 'Chinese 2, English 1' in repr(c)
        and c.to_dict()['languages'] == c.languages
    )


def test_wrong_paths(tmp_path):
    for p in (tmp_path, tmp_path / 'x.json', str(tmp_path / '*.json')):
        with pytest.raises(LlamaZhError, match='no chats at'):
            read_chats(p)


def test_hostile(shared):
    d = shared / 'data/hostile'
    expect = {
        Path(k).name: v
        for k, v in json.loads((d / 'EXPECT.json').read_text(encoding='utf-8')).items()
        if k.startswith('sft/')
    }
    got = {n: read_chats(d / 'sft' / n) for n in expect}
    assert len(got) == 6
    for n, e in expect.items():
        if 'rows' in e:
            assert len(got[n]) == e['rows'] and not got[n].bad, n
    b = got['broken_lines.jsonl']
    assert len(b) >= expect['broken_lines.jsonl']['good']
    lines = list((d / 'sft/broken_lines.jsonl').read_text(encoding='utf-8').split('\n'))
    kept = {int(c['source'].rsplit(':', 1)[1]) for c in b}
    assert {line for _, line, _ in b.bad} == {
        i for i, line in enumerate(lines, 1) if line.strip()
    } - kept
    assert len(got['text_no_eos.csv']) == 3 and sum(got['text_no_eos.csv'].notes.values()) == 3


@pytest.mark.parametrize(
    'name,n,bad',
    [
        ('alpaca_zh_demo_1000.json', 1000, 0),
        ('alpaca_en_demo_1000.json', 999, 0),
        ('belle_zh_seed_tasks.jsonl', 175, 0),
        ('firefly_dummy.jsonl', 33, 0),
        ('huatuo_med_kg.jsonl', 8658, 0),
        ('medical_sft_1K.jsonl', 1000, 0),
        ('sharegpt_zh_1K.jsonl', 998, 2),
        ('llama2chinese_dev_sft.csv', 200, 0),
        ('ruozhiba_qa2449_gpt4t.json', 2449, 0),
    ],
)
def test_real_files(shared, name, n, bad):
    c = read_chats(shared / 'data/sft' / name)
    assert (len(c), len(c.bad)) == (n, bad)
