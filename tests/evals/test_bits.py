"bits of several models: documents are counted apart, two equal models do not differ"

import math

import pytest
from helpers.byte_model import byte_model

from llama_zh_nb.evals.bits import compare_bits
from llama_zh_nb.evals.measure import bits

torch = pytest.importorskip('torch')


@pytest.fixture(scope='module')
def tiny():
    return byte_model()


def test_strided_bits_are_bounded_by_documents(tiny):
    a, b = '秋天的湖水很静。' * 4, 'The lake is calm. ' * 3
    one, two, both = (bits(*tiny, x, max_len=40, stride=9) for x in (a, b, [a, b]))
    assert (
        math.isclose(one.nats + two.nats, both.nats, rel_tol=1e-5)
        and both.chars == len(a) + len(b)
        and both.interval()
        and one.interval() is None
    )
    t = compare_bits({'x': tiny, 'y': tiny}, {'zh': [a, a], 'english': [b, b]})
    assert (
        t.difference('y', 'zh') == (0, 0, 0)
        and [r['unit'] for r in t.rows[:2]] == ['bpc', 'bpb']
        and '0.0%' in repr(t)
        and '0.0%' in t._repr_html_()
    )
