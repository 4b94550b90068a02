"tasks: files of the real benchmarks are read whole, rows in every spelling, bad ones are counted"

import pytest
from helpers.made_task import made_task

from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.evals.choice import prompt_text
from llama_zh_nb.evals.tasks import (
    HUB,
    HubTask,
    Question,
    parse_row,
    read_task,
    subject_table,
    world_task,
    write_task,
)


def test_real_benchmarks_are_read_whole(shared):
    d = shared / 'data' / 'eval'
    t = read_task(d / 'ceval')
    assert (len(t), len(t.subjects), t.style, t.dropped) == (685, 26, 'ceval', {}) and all(
        len(t.shots[s]) == 5 for s in t.subjects
    )
    assert (
        t.intro('marxism')
        == '以下是中国关于马克思主义基本原理考试的单项选择题，请选出其中的正确答案。\n\n'
        and t.groups['marxism'] == ['Social Science']
    )
    assert len(read_task(d / 'ceval', 'dev')) == 260
    published = [q for part in (t.subjects, t.shots) for qs in part.values() for q in qs]
    assert sum('\r\n' in q.question for q in published) == 21  # prompts as published
    assert t.digest.startswith('6170c8dbd629d16a')
    c = read_task(d / 'cmmlu', 'dev')
    assert (len(c), len(c.subjects), c.style) == (
        335,
        67,
        'cmmlu',
    ) and 'China specific' in c.groups['chinese_history']
    with pytest.raises(LlamaZhError, match='no folder val or test'):
        read_task(d / 'cmmlu')
    a = read_task(d / 'agieval')
    assert {s: len(v) for s, v in a.subjects.items()} == {
        'gaokao-chinese': 246,
        'gaokao-english': 306,
        'gaokao-history': 235,
    } and not a.dropped
    assert (
        read_task(d / 'agieval' / 'gaokao-english.jsonl').style == 'agieval_en'
        and read_task(d / 'agieval' / 'gaokao-history.jsonl').style == 'agieval_zh'
    )
    h = read_task(d / 'agieval' / 'gaokao-history.jsonl')
    tail = prompt_text(h, h.subjects['gaokao-history'][0])[1]
    assert (
        tail.startswith('问题：')
        and tail.endswith('\n答案：从A到D, 我们应选择')
        and ' 选项：(A)' in tail
    )
    m = read_task(d / 'c3' / 'c3-m-dev.json')
    g = read_task(d / 'c3' / 'c3-d-dev.json')
    assert (
        (len(m), len(g)) == (1991, 1825)
        and {len(q.options) for v in m.subjects.values() for q in v} == {2, 3, 4}
        and '\n' in g.subjects['c3-d-dev'][0].passage
    )
    for t in (c, a, m):
        assert all(
            q.passage + q.question and 0 <= q.answer < len(q.options)
            for v in t.subjects.values()
            for q in v
        )


def test_rows_in_every_spelling():
    want = Question('0', 's', '一加一', ('一', '二'), 1)
    for row in (
        {'question': '一加一', 'A': '一', 'B': '二', 'answer': 'B'},
        {'Question': ' 一加一 ', 'A': '一', 'B': '二', 'Answer': 'b'},
        {'question': '一加一', 'options': ['(A)一', '(B) 二'], 'label': 'B'},
        {'query': '一加一', 'choices': ['一', '二'], 'gold': [1]},
        {
            'question': '一加一',
            'choices': {'text': ['一', '二'], 'label': ['A', 'B']},
            'answer': '二',
        },
    ):
        assert parse_row(row, 's', '0') == want
    for row in (
        {'question': '', 'A': '1', 'B': '2', 'answer': 'A'},
        {'question': 'x', 'A': '1', 'answer': 'A'},
        {'question': 'x', 'A': '1', 'B': '2', 'answer': 'E'},
        {'question': 'x', 'A': '1', 'B': '2', 'answer': ''},
    ):
        assert isinstance(parse_row(row, 's', '0'), str)


def test_bad_rows_are_counted_and_a_test_split_without_answers_is_refused(tmp_path):
    (tmp_path / 'a.csv').write_text(
        'id,question,A,B,C,D,answer\n0,甲,1,2,3,4,A\n1,乙,1,2,3,4,\n2,丙,1,2,3,4,E\n'
    )
    assert (len(read_task(tmp_path / 'a.csv')), read_task(tmp_path / 'a.csv').dropped) == (
        1,
        {'no answer among the options': 2},
    )
    (tmp_path / 'b.csv').write_text('id,question,A,B,C,D\n0,甲,1,2,3,4\n')
    with pytest.raises(LlamaZhError, match='test split without answers'):
        read_task(tmp_path / 'b.csv')
    for name, text in (('c.csv', ''), ('d.json', '{}'), ('e.json', '[[1]]'), ('f.jsonl', '[1]\n')):
        (tmp_path / name).write_text(text)
        with pytest.raises(LlamaZhError):
            read_task(tmp_path / name)
    (tmp_path / 'g').mkdir()
    with pytest.raises(LlamaZhError):
        read_task(tmp_path / 'g')


def test_written_and_read_again(tmp_path):
    for t in (made_task(), made_task(options=5), world_task('en')):
        assert read_task(write_task(tmp_path / 't', t)).digest == t.digest


@pytest.mark.parametrize('name', [*HUB, 'nobody/nothing'])
def test_without_network_one_message_says_what_to_do(name):
    with pytest.raises(LlamaZhError, match='pass DIR instead of the name'):
        read_task(name)


def test_a_dataset_of_the_hub_reads_like_files(monkeypatch):
    datasets = pytest.importorskip('datasets')
    rows = {
        'dev': [
            dict(id=i, question=f'例{i}', A='1', B='2', C='3', D='4', answer='A', explanation='')
            for i in range(5)
        ],
        'val': [dict(id=0, question='题', A='1', B='2', C='3', D='4', answer='D', explanation='')],
    }
    monkeypatch.setattr(
        datasets,
        'load_dataset',
        lambda id, config, split: (
            rows[split] if id == 'ceval/ceval-exam' and config in subject_table('ceval') else 1 / 0
        ),
    )
    t = read_task('ceval', subjects=['law', 'logic'])
    assert (len(t), len(t.shots['law']), t.names['law'], t.style) == (2, 5, '法学', 'ceval')


def test_an_english_dataset_is_asked_in_english(monkeypatch):
    datasets = pytest.importorskip('datasets')
    row = dict(question='Which is a river?', A='Thames', B='Dover', C='Kent', D='Bath', answer='A')
    monkeypatch.setattr(datasets, 'load_dataset', lambda id, config, split: [row])
    monkeypatch.setitem(HUB, 'rivers', HubTask('nobody/rivers', 'test', lang='en'))
    english, chinese = read_task('rivers'), read_task('nobody/rivers')
    assert (english.lang, english.style, chinese.lang) == ('en', 'english', 'zh')
    asked = ''.join(prompt_text(english, english.questions()[0]))
    assert asked.isascii() and 'Answer:' in asked


@pytest.mark.parametrize(
    'name, split, read',
    [
        ('c3', None, 'validation'),
        ('c3', 'val', 'validation'),
        ('c3', 'validation', 'validation'),
        ('c3', 'train', 'train'),
        ('ceval', 'validation', 'val'),
        ('nobody/nothing', 'validation', 'validation'),
    ],
)
def test_a_split_by_either_name(name, split, read, monkeypatch):
    datasets = pytest.importorskip('datasets')
    asked = []

    def load_dataset(id, config, split):
        asked.append(split)
        return [dict(question='题', A='1', B='2', C='3', D='4', answer='D')]

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    read_task(name, split)
    assert asked[0] == read
