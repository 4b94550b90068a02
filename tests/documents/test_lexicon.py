"Terms in both scripts, and lexicons that are joined."

import random

import pytest

from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.documents.lexicon import Lexicon, extract_terms, normalize_text


def test_lexicon_round_trip(tmp_path):
    lex = Lexicon.fit(['长江发源于青藏高原', '', 'GPU 7B 模型'])
    lex.save(tmp_path / 'l')
    for q in ('长江', '7b', '没有的词', ''):
        assert (Lexicon.load(tmp_path / 'l').scores(q) == lex.scores(q)).all()
    assert lex.scores('ＧＰＵ').argmax() == 2 and lex.scores('火星在哪里').max() == 0
    (tmp_path / 'l' / 'tf.npy').write_bytes(b'broken')
    with pytest.raises(LlamaZhError, match='again'):
        Lexicon.load(tmp_path / 'l')


def test_scripts_are_one():
    assert (
        extract_terms('臺灣的頭髮') == extract_terms('台湾的头发')
        and normalize_text('ＡＢＣ') == 'abc'
    )
    lex = Lexicon.fit(['長江發源於青藏高原，是中國最長的河流。', '黄河的水是黄的。'])
    assert (
        lex.scores('长江发源于哪里').tolist() == lex.scores('長江發源於哪裡').tolist()
        and lex.scores('长江发源于哪里').argmax() == 0
    )


def test_merged_lexicons_are_one(tmp_path):
    import numpy as np

    rng = random.Random(0)
    texts = [
        ''.join(rng.choices('山水船桥茶饭书人来去大小', k=rng.randint(0, 60))) for _ in range(60)
    ]
    place, parts, at = rng.sample(range(60), 60), [], 0
    for n in (7, 0, 30, 23):
        parts.append(
            (
                Lexicon.fit([texts[place[i]] for i in range(at, at + n)]),
                np.array(place[at : at + n], 'i4'),
            )
        )
        at += n
    gone = Lexicon.fit(['此段已删，山水船桥']), np.array([-1], 'i4')
    Lexicon.merge([*parts, gone], tmp_path / 'l')
    one, two = Lexicon.fit(texts), Lexicon.load(tmp_path / 'l')
    assert (one.keys == two.keys).all() and (one.starts == two.starts).all()
    for q in ('山水', '船桥茶饭', '没有的', ''):
        assert one.scores(q).tolist() == two.scores(q).tolist()
    for f in ('rows.npy', 'keys.npy'):
        (tmp_path / 'l' / f).write_bytes((tmp_path / 'l' / f).read_bytes()[:-9])
        with pytest.raises(LlamaZhError, match='again'):
            Lexicon.load(tmp_path / 'l')
