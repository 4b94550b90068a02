"Sentences, headings and budgets, on made and on real text."

import json

import pytest
from helpers.documents import TOWN

from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.documents.load import Document
from llama_zh_nb.documents.split import ZhTextSplitter, chunks, sentences, split_text, token_counter


@pytest.mark.parametrize(
    'text,want',
    [
        ('他说：“走吧！”大家走了。', ['他说：“走吧！”', '大家走了。']),
        ('真的吗？！（没有人信。）……算了', ['真的吗？！', '（没有人信。）……', '算了']),
        ('“好！”，他说。「是。」她说', ['“好！”，他说。', '「是。」', '她说']),
        ('价格是3.5元。v1.2 is out. New one.', ['价格是3.5元。', 'v1.2 is out. ', 'New one.']),
        ('他说"走。"就走了。', ['他说"走。"', '就走了。']),
        ('', []),
        ('。。。', ['。。。']),
    ],
)
def test_sentences(text, want):
    assert sentences(text) == want


def test_headings_and_rows():
    cs = list(chunks(TOWN, chunk_tokens=60))
    assert all(c.text.startswith('# 青石镇\n## ') for c in cs)
    assert {c.heading for c in cs} == {'青石镇 / 茶馆', '青石镇 / 码头'}
    assert any('| 青鱼号 | 七点 |' in c.text for c in cs)
    assert [c.heading for c in chunks('第一章 出山\n他走了。\n第二节\n他回来了。')] == [
        '第一章 出山',
        '第一章 出山 / 第二节',
    ]
    assert split_text('# 只有标题') == ['# 只有标题'] and split_text(' \n ') == []
    assert split_text('```\n# 不是标题\n```\n正文。') == ['```\n# 不是标题\n```\n正文。']


def test_budget_and_ends_on_real_text(shared, folder):
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(folder)
    text = '\n'.join(
        p['context']
        for x in json.loads((shared / 'data/eval/cmrc2018/cmrc2018_trial.json').read_text())[
            'data'
        ][:12]
        for p in x['paragraphs']
    )
    cs, count = list(chunks(text, tok, 200, 40)), token_counter(tok)
    assert max(count([c.text for c in cs])) <= 200 and all(c.cost <= 200 for c in cs)
    assert not [c.text for c in cs if c.text[0] in '。！？…，、；：”’』」）》']

    def squeeze(s):
        return ''.join(s.split())

    assert ''.join(squeeze(c) for c in split_text(text, tok, 200)) == squeeze(text)


def test_pieces_never_exceed():
    for n in (8, 13, 40):
        assert all(
            len(c) <= n
            for c in split_text('无标点' * 50 + ' https://example.org/' + 'a' * 60, chunk_tokens=n)
        )
    with pytest.raises(LlamaZhError):
        split_text('x', chunk_tokens=4)


def test_langchain_splitter():
    docs = ZhTextSplitter(chunk_tokens=60).split_documents(
        [Document(TOWN, metadata={'source': 'x'})]
    )
    assert all(
        d.metadata['source'] == 'x' and d.metadata['heading'] and d.metadata['tokens'] <= 60
        for d in docs
    )


def test_overlap_is_whole_sentences():
    text = ''.join(f'第{i}句话说了{"很" * (i % 5)}多。' for i in range(40))
    cs = split_text(text, chunk_tokens=60, overlap=20)
    for a, b in zip(cs, cs[1:]):
        shared = next(n for n in range(min(len(a), len(b)), -1, -1) if a.endswith(b[:n]))
        assert 0 < shared <= 20 and a[-shared - 1] == '。' and b[shared - 1] == '。'
    assert max(map(len, cs)) <= 60


def test_rows_and_code_are_not_cut():
    table = '| 名 | 说明 |\n|---|---|\n' + ''.join(
        f'| 第{i}行 | 有。有！有？ |\n' for i in range(20)
    )
    code = (
        '```python\n' + ''.join(f's{i} = "一。二。三！"  # 说明。\n' for i in range(20)) + '```\n'
    )
    want = set((table + code).strip().split('\n'))
    got = [
        line
        for c in split_text(f'# 表\n{table}\n# 码\n{code}', chunk_tokens=64)
        for line in c.split('\n')
        if not line.startswith('# ')
    ]
    assert set(got) == want and len(got) == len((table + code).strip().split('\n'))


def test_quotes_and_headings_travel():
    text = (
        '第一章 出山\n'
        + '他说：“走吧！”她答：「好。」（没有人听见。）' * 12
        + '\n第二节 归来\n'
        + '“回来了！”众人说。' * 12
    )
    cs = list(chunks(text, chunk_tokens=64))
    assert all(
        c.text.split('\n')[-1][0] not in '”」）。！？' and c.text[-1] in '。”」）' for c in cs
    )
    assert {c.heading for c in cs} == {'第一章 出山', '第一章 出山 / 第二节 归来'} and all(
        c.text.startswith('第一章 出山\n') for c in cs
    )
