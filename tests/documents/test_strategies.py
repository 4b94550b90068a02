"One after another, each for itself, neighbours that fit."

import re

from helpers.documents import heard

from llama_zh_nb.documents.assistant import Assistant
from llama_zh_nb.documents.strategies import combine_until_fits, group_neighbours


def test_refine_reads_one_after_another(index):
    llm = heard(
        lambda p: f'见到{len(re.findall("<资料 ", p))}条[{re.findall(chr(34) + "([0-9]+)", p)[0]}]'
    )
    a = Assistant(index, llm, 'cited', 3, 0.0, strategy='refine').ask('早上几点？')
    assert (
        len(llm.heard) == 3 == len(a.sources)
        and [s[0] for s in a.steps] == llm.heard[:2]
        and a.prompt == llm.heard[2]
    )
    assert all(p.count('<资料 ') == 1 and '早上几点？' in p for p in llm.heard)
    assert (
        '见到1条[1]' in llm.heard[1]
        and '见到1条[2]' in llm.heard[2]
        and a.text == '见到1条[3]'
        and not a.invented
    )


def test_map_reduce_asks_each_and_joins(index):
    llm = heard(
        lambda p: (
            '合起来[1][3]'
            if '摘出的内容' in p
            else '无。'
            if '茶馆' in p
            else f'要点{"码头" in p}[{re.search("编号=.([0-9])", p)[1]}][8]'
        )
    )
    a = Assistant(index, llm, 'cited', 3, 0.0, strategy='map_reduce').ask('早上几点？')
    last = llm.heard[-1]
    assert (
        len(llm.heard) == 4
        and '无' not in last.split('问题')[0].replace('摘出', '')
        and last.count('要点') == 2
        and '[8]' not in last
    )
    assert a.cited() == ([1, 3], []) if len(a.sources) == 3 else True
    nothing = Assistant(index, heard(lambda p: '无'), 'cited', 3, 0.0, strategy='map_reduce').ask(
        '早上几点？'
    )
    assert nothing.refused and '没有找到' in nothing.text


def test_strategies_stream_as_they_answer(index):
    for s in ('stuff', 'refine', 'map_reduce'):
        bot = Assistant(
            index, heard(lambda p: f'{len(p)}个字[1]，又[7]。'), 'cited', 3, 0.0, strategy=s
        )
        *parts, last = bot.stream('早上几点？')
        whole = bot.ask('早上几点？')
        assert (
            ''.join(parts) == last.text == whole.text
            and last.invented == whole.invented == [7]
            and last.sources == whole.sources
        )
        assert [a.text for a in bot.ask_all(['早上几点？', '量子？'])][0] == whole.text


def test_fold_halves_and_keeps_order():
    texts, seen = [f'<{i:03}>' for i in range(41)], []

    def length(ts):
        return [len(t) for t in ts]

    def join(gs):
        seen.append([len(g) for g in gs])
        return [g[0][:4] + g[-1][-4:] for g in gs]

    out = combine_until_fits(texts, length, 24, join)
    assert (
        sum(map(len, out)) <= 24
        and out[0].startswith('<000')
        and out[-1].endswith('040>')
        and all(min(g) >= 2 for g in seen)
    )
    assert (
        group_neighbours(['长' * 100, '长' * 100], length, 20) == [['长' * 10, '长' * 10]]
        and combine_until_fits([], length, 5, None) == []
    )
