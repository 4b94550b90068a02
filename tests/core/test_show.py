"Tables and charts: odd numbers, hostile texts, Chinese in a terminal"

from llama_zh_nb.core.show import (
    Html,
    Table,
    bars,
    escape,
    intervals,
    lines,
    path_picture,
    text_width,
    tokens,
)
from llama_zh_nb.evals.measure import share_of

EVIL = '<script>alert(1)</script>"\'&'


def test_pictures_of_odd_numbers():
    assert (
        lines({'a': [(0, None), (1, float('inf'))]}) == ''
        and '<svg' in lines({'a': [(5, 2.0)]})
        and 'nan' not in lines({'a': [(0, 1.0), (9, 1.0)]}).lower()
    )
    assert (
        '100.00%' in bars([('a', 5, '5')])
        and bars([('a', 0, '0')])
        and intervals([('a', share_of(0, 1))])
        and tokens([])
        and path_picture([]) == ''
    )


def test_nothing_is_shown_unescaped():
    shown = [
        bars([(EVIL, 1, EVIL)]),
        intervals([(EVIL, share_of(1, 2))]),
        lines({EVIL: [(0, 1.0), (1, 2.0)], 'b': [(0, 1.0)]}, EVIL, EVIL),
        tokens([EVIL, '<s>']),
        path_picture([(EVIL, EVIL)]),
        Table([[EVIL, 1]], [EVIL, EVIL], title=EVIL, note=EVIL).html(),
    ]
    assert not any('<script' in html or 'alert(1)<' in html for html in shown)
    assert escape(Html('<b>x</b>')) == '<b>x</b>' and escape(EVIL) == escape(EVIL).strip()


def test_tables_are_straight():
    table = Table([['汉字', 7200, None], ['pieces', 55296, '3 %']], ['what', 'how many', 'share'])
    head, rule, *rows = repr(table).splitlines()
    assert [text_width(row[: row.index('7') + 1]) for row in rows[:1]] == [12]
    assert rows[0].split() == ['汉字', '7,200', '–'] and set(rule) == {'-', ' '}
    assert table.align == 'lrr' and Table([]).markdown() and repr(Table([])) == ''


def test_a_cell_may_hold_a_picture():
    table = Table([['a', tokens(['长', '江'])]])
    assert '<span' in table._repr_html_() and '&lt;span' not in table._repr_html_()
    assert repr(table) == 'a  长 江'
