"""Settings of sampling as the projects wrote them, and a stated policy for conversations that grow too long."""

import random

import pytest
from helpers.conversations import users

from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.generation.sampling import fit_turns, sampling


def test_policy():
    rng, count = random.Random(0), lambda ms: sum(len(m['content']) for m in ms)
    for _ in range(300):
        sys_, n = (
            [dict(role='system', content='s' * rng.randrange(1, 9))] * rng.randrange(2),
            rng.randrange(0, 6),
        )
        turns, space = (
            users(*('x' * rng.randrange(1, 12) for _ in range(2 * n + 1))),
            rng.randrange(12, 60),
        )
        kept, gone, cut = fit_turns(sys_ + turns, count, space, 'cut')
        assert (
            count(kept) <= space
            and kept[: len(sys_)] == sys_
            and kept[-1]['content'] == turns[-1]['content'][cut:]
        )
        assert kept[len(sys_) : -1] == turns[2 * gone : -1]  # whole turns, in order, the newest
        if gone and not cut:
            assert count(sys_ + turns[2 * gone - 2 :]) > space  # and no more than needed


def test_sampling():
    assert sampling('alpaca2') == dict(
        temperature=0.2, top_k=40, top_p=0.9, repetition_penalty=1.1
    )  # the projects' own
    assert (sampling('linksoul')['temperature'], sampling('linksoul')['top_p']) == (0.95, 0.7)
    for bad in (
        dict(temperature=-1),
        dict(top_p=0),
        dict(top_p=float('nan')),
        dict(repetition_penalty=0),
        dict(temprature=1),
    ):
        with pytest.raises(LlamaZhError):
            sampling(**bad)
