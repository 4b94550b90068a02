"Audits and comparisons: the faults of the published vocabularies are found, every kind of tokenizer is read, every wrong input gets one message."

import base64
import json

import pytest

from llama_zh_nb.app.cli import main
from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.tokenizer.audit import (
    Audit,
    audit,
    audit_command,
    compare_command,
    compare_vocabularies,
    fertility,
    pieces_of,
)
from llama_zh_nb.tokenizer.exact import load_tiktoken, open_tokenizer, read_model, save_tokenizer
from llama_zh_nb.vocab import merge


@pytest.fixture(scope='module')
def t(shared):
    return shared / 'data' / 'tokenizers'


@pytest.fixture(scope='module')
def zh(shared):
    "Chinese lines of mixed kinds"
    out = []
    for f in sorted((shared / 'data' / 'text_zh').glob('*.txt')):
        out += [s for s in f.read_text(encoding='utf-8').split('\n') if s.strip()][::40][:40]
    return out[:945]


@pytest.fixture(scope='module')
def en(shared):
    return [
        s
        for s in (shared / 'data' / 'text_en' / 'wikitext2_valid.txt')
        .read_text(encoding='utf-8')
        .split('\n')
        if s.strip()
    ][:900]


@pytest.fixture(scope='module')
def published(t, tmp_path_factory):
    "name -> audit of each published vocabulary, with the base found by itself"
    tmp = tmp_path_factory.mktemp('published')
    with pytest.warns(UserWarning, match='follow this model'):
        merge(
            t / 'llama2_32000.model',
            t / 'chinese_sp_20000.model',
            tmp / 'llama',
            compat='chinese-llama',
        )
    return {
        '49953': tmp / 'llama' / 'tokenizer.model',
        '55296': t / 'chinese_llama2_55296.model',
        'literary': t / 'literary_alpaca2_merged.model',
        'llama2': t / 'llama2_32000.model',
    }


@pytest.fixture(scope='module')
def audits(published, zh, en):
    return {k: audit(f, texts=dict(zh=zh, en=en)) for k, f in published.items()}


def has_zh(s):
    return any('\u4e00' <= c <= '\u9fff' for c in s)


def test_ties_make_two_answers(audits, zh):
    "All new pieces at score 0: SentencePiece and Hugging Face differ on most Chinese lines"
    for k, new in {'49953': 17_952, '55296': 23_295, 'literary': 42_673}.items():
        a = audits[k]
        assert a.ties == new, (k, a.ties)
        assert sum(map(has_zh, a.differ)) > 0.2 * len(zh), (
            k,
            len(a.differ),
        )  # a fifth of these short lines at least, even with the best list of merges there is
        assert any('share a score' in f for f in a.faults) and any(
            'differs from SentencePiece' in f for f in a.faults
        )


def test_english_is_cut_anew(audits, en):
    "Score 0 outranks Llama's own merges: 49,953 cuts English differently, 55,296 does not, the literary one cuts every line differently since it lost its prefix"
    changed = {k: len([s for s in a.changed if s in set(en)]) / len(en) for k, a in audits.items()}
    assert (
        0.06 < changed['49953'] < 0.8
        and changed['55296'] == changed['llama2'] == 0
        and changed['literary'] > 0.99
    ), changed
    assert audits['49953'].after['en'] > audits['49953'].before['en']


def test_dead_pieces_are_listed(audits):
    assert {k: len(a.dead) for k, a in audits.items()} | {'literary': 0} == {
        '49953': 345,
        '55296': 657,
        'literary': 0,
        'llama2': 0,
    }
    a = audits['55296']
    assert (
        {'越来越', '意大利', '新加坡'} <= set(a.dead)
        and all(p in repr(a) and p in a._repr_html_() for p in a.dead if '<' not in p)
        and '657 dead pieces' in a.faults[0]
    )


def test_the_lost_prefix(audits, published, t):
    assert [k for k, a in audits.items() if any('add_dummy_prefix' in f for f in a.faults)] == [
        'literary'
    ]
    a = audit(published['literary'], base=t / 'llama2_32000.model')
    assert a.unlike == ['add_dummy_prefix'] and a.base == 32_000 and a.moved == 0


def test_all_bases_are_found_and_llama2_is_sound(audits):
    assert (
        {a.base for a in audits.values()} == {32_000}
        and audits['llama2'].ok
        and not any(a.ok for k, a in audits.items() if k != 'llama2')
    )


def test_other_faults(t, tmp_path):
    m = read_model(t / 'llama2_32000.model')

    def save(name, change):
        x = type(m).FromString(m.SerializeToString())
        change(x)
        (tmp_path / name).write_bytes(x.SerializeToString())
        return audit(
            tmp_path / name, base=t / 'llama2_32000.model', texts=['Two  spaces, ①②.', '河']
        )

    def double(x):
        x.pieces.add(piece='the', score=-40_000)

    def moved(x):
        x.pieces[300].piece, x.pieces[301].piece = x.pieces[301].piece, x.pieces[300].piece

    def trim(x):
        x.normalizer_spec.remove_extra_whitespaces = True

    for change, says in (
        (double, '1 duplicate pieces: the'),
        (moved, '2 base pieces moved'),
        (trim, 'not as in the base: remove_extra_whitespaces'),
    ):
        a = save(f'{change.__name__}.model', change)
        assert not a.ok and any(says in f for f in a.faults), a.faults

    def no_bytes(x):
        x.trainer_spec.byte_fallback = False

    with pytest.raises(LlamaZhError, match='SentencePiece refuses'):
        save('no_bytes.model', no_bytes)
    a = audit(t / 'chinese_sp_20000.model', texts=['①２'])
    assert (
        any('no byte fallback' in f for f in a.faults)
        and any("'nmt_nfkc'" in f for f in a.faults)
        and any('not the same after' in f for f in a.faults)
        and a.flags['model'] == 'UNIGRAM'
    )


def test_a_folder_whose_json_is_not_its_models(t, tmp_path):
    "The tokenizer.json that lies there is looked at, not one we would write"
    d = save_tokenizer(t / 'llama2_32000.model', tmp_path / 'd')
    assert audit(d).ok
    j = json.loads((d / 'tokenizer.json').read_text())
    j['model']['merges'] = j['model']['merges'][:20_000]
    (d / 'tokenizer.json').write_text(json.dumps(j))
    assert [f.split(' on ')[0] for f in audit(d).faults] == [
        'tokenizer.json differs from SentencePiece'
    ]


def test_audit_command_text_json_picture(t, tmp_path, zh):
    (tmp_path / '小说.txt').write_text('\n'.join(zh[:60]), encoding='utf-8')
    (tmp_path / 'old.txt').write_text('\n'.join(zh[:60]), encoding='gb18030', errors='ignore')
    f, texts = (
        t / 'chinese_llama2_55296.model',
        [str(tmp_path / '小说.txt'), str(tmp_path / 'old.txt')],
    )
    a = audit_command(f, text=texts, json=str(tmp_path / 'a.json'), picture=str(tmp_path / 'a.png'))
    assert (
        isinstance(a, Audit)
        and list(a.after) == ['小说', 'old']
        and abs(a.after['old'] - a.after['小说']) < 0.05
    )  # the other encoding was understood
    assert all(
        w in repr(a)
        for w in ('55,296 pieces', 'normaliser identity', 'byte fallback on', 'FAULT', '小说')
    )
    j = json.loads((tmp_path / 'a.json').read_text(encoding='utf-8'))
    assert (
        len(j['dead']) == 657
        and j['ok'] is False
        and j['after'].keys() == a.after.keys()
        and j['flags']['model'] == 'BPE'
    )
    assert (tmp_path / 'a.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
    for p in ('a.svg', 'b.html'):
        audit_command(t / 'llama2_32000.model', picture=str(tmp_path / p))
    assert (
        '<svg' in (tmp_path / 'a.svg').read_text()
        and 'no fault found' in (tmp_path / 'b.html').read_text()
    )


def test_exit_code(t, tmp_path, capsys):
    (tmp_path / 'x.txt').write_text('河水东流\n')
    assert (
        main(['vocab', 'audit', str(t / 'llama2_32000.model'), '--text', str(tmp_path / 'x.txt')])
        == 0
    )
    assert main(['vocab', 'audit', str(t / 'chinese_llama2_55296.model')]) == 1
    out, err = capsys.readouterr()
    assert '657 dead pieces' in out and err.count('llama-zh: ') == 1


def ranks(path, joined=(), n=256):
    "A tiktoken file: all bytes, then what is joined"
    path.write_text(
        ''.join(
            f'{base64.b64encode(b).decode()} {i}\n'
            for i, b in enumerate([bytes([i]) for i in range(n)] + list(joined))
        )
    )
    return path


JOINED = [
    b' t',
    b'he',
    b' the',
    *[w.encode()[:k] for w in ('河', '水') for k in (2, 3)],
    '河水'.encode(),
]


def test_tiktoken_by_hand(tmp_path):
    f = ranks(tmp_path / 'a.tiktoken', JOINED)
    assert pieces_of(f)('the the 河水。') == [
        't',
        'he',
        ' the',
        ' ',
        '河水',
        *'。' * 3,
    ]  # three bytes of one character
    tok = load_tiktoken(f)
    for s in ('a  b\n\n\tc', '👩‍🌾 café <|endoftext|>', '１２３ 12345'):
        assert tok.decode(tok.encode(s).ids) == s
    assert fertility(f, ['河水河水'])['text'] == 2


def test_compare_all_kinds(t, tmp_path, zh):
    "SentencePiece BPE and UNIGRAM, tokenizer.json and tiktoken side by side, also where Llama 3 calls its ranks tokenizer.model"
    (tmp_path / 'zh.txt').write_text('\n'.join(zh[:50]), encoding='utf-8')
    (tmp_path / 'en.txt').write_text('The river runs east, past the mill.\n')
    three = tmp_path / 'llama3'
    three.mkdir()
    ranks(three / 'tokenizer.model', JOINED)
    qwen = tmp_path / 'qwen'
    qwen.mkdir()
    ranks(qwen / 'qwen.tiktoken', JOINED)
    paths = [
        t / 'llama2_32000.model',
        t / 'chinese_llama2_55296.model',
        t / 'chinese_sp_20000.model',
        t / 'minimind_tokenizer.json',
        three,
        qwen,
        ranks(tmp_path / 'c.tiktoken', JOINED),
    ]
    c = compare_command(
        list(map(str, paths)),
        [str(tmp_path / 'zh.txt'), str(tmp_path / 'en.txt')],
        json=str(tmp_path / 'c.json'),
        picture=str(tmp_path / 'c.png'),
    )
    assert [c.sizes[k] for k in c.rows] == [32_000, 55_296, 20_000, 6_400, 264, 264, 264]
    assert (
        c.rows['llama3'] == c.rows['qwen'] == c.rows['c']
        and c.rows['chinese_llama2_55296']['zh'] > 1.5 * c.rows['llama2_32000']['zh']
        and c.rows['c']['en'] > 1
    )
    assert (
        set(c.audits) == {'llama2_32000', 'chinese_llama2_55296', 'chinese_sp_20000'}
        and len(c.audits['chinese_llama2_55296'].dead) == 657
    )
    row = next(line for line in repr(c).splitlines() if line.startswith('chinese_llama2_55296'))
    assert '657' in row and '23,295' in row and '0.0%' in row
    j = json.loads((tmp_path / 'c.json').read_text())
    assert (
        j['c']['pieces'] == 264
        and 'audit' not in j['c']
        and j['chinese_llama2_55296']['audit']['ties'] == 23_295
        and (tmp_path / 'c.png').stat().st_size > 5000
    )


def test_files_of_one_name_are_two_genres(t, tmp_path):
    for d, s in (('a', '河水东流'), ('b', 'The river')):
        (tmp_path / d).mkdir()
        (tmp_path / d / 'x.txt').write_text(s)
    c = compare_command(
        [str(t / 'llama2_32000.model')], [str(tmp_path / 'a/x.txt'), str(tmp_path / 'b/x.txt')]
    )
    assert list(c.rows['llama2_32000']) == [str(tmp_path / 'a/x.txt'), str(tmp_path / 'b/x.txt')]


def test_json_and_model_agree_and_marks_are_text(t, tmp_path):
    d = save_tokenizer(t / 'llama2_32000.model', tmp_path / 'd')
    s = '<s> 河水 </s>  x'
    assert open_tokenizer(d / 'tokenizer.json').encode(
        s, add_special_tokens=False
    ).ids == open_tokenizer(d).encode(s)
    c = compare_vocabularies([d, d / 'tokenizer.json'], [s])
    assert len(c.rows) == 2 and len({tuple(r.values()) for r in c.rows.values()}) == 1


def test_refusals(t, tmp_path, shared):
    (tmp_path / 'x.txt').write_text('河水东流\n')
    (tmp_path / 'page.model').write_text('<!DOCTYPE html><html></html>')
    (tmp_path / 'conf.json').write_text('{"a": 1}')
    (tmp_path / 'blank.txt').write_text('\n \n')
    (tmp_path / 'odd.tiktoken').write_text('IQ== 0\nIg== 1\n!! 2\n')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'lfs.tiktoken').write_bytes(
        (shared / 'data/hostile/tokenizer/real_lfs_pointer.model').read_bytes()
    )
    good, x = str(t / 'llama2_32000.model'), [str(tmp_path / 'x.txt')]

    def cmp(bad):
        return compare_command([good, str(bad)], x)

    for call, *says in [
        (lambda: cmp(tmp_path / 'no.model'), 'no such file'),
        (lambda: cmp(tmp_path / 'page.model'), 'HTML page'),
        (lambda: cmp(tmp_path / 'conf.json'), 'tokenizer.json', 'JSON'),
        (lambda: cmp(tmp_path / 'empty'), 'no such file'),
        (lambda: cmp(tmp_path / 'odd.tiktoken'), 'line 3', "'!! 2'"),
        (lambda: cmp(ranks(tmp_path / 'cut.tiktoken', n=200)), '56 of the 256'),
        (lambda: cmp(tmp_path / 'lfs.tiktoken'), 'LFS'),
        (lambda: cmp(shared / 'data/hostile/tokenizer/empty.model'), 'empty'),
        (lambda: compare_command([good]), '--text is missing'),
        (lambda: compare_command([good], [str(tmp_path / 'y.txt')]), 'y.txt', 'no such file'),
        (lambda: audit_command(good, text=['nowhere.txt']), 'nowhere.txt'),
        (lambda: audit_command(good, text=[str(tmp_path / 'blank.txt')]), 'blank.txt', 'no line'),
        (lambda: audit_command(good, picture=str(tmp_path / 'a.bmp')), '.png'),
        (lambda: audit_command(good, base=str(tmp_path / 'page.model')), 'HTML'),
        (lambda: audit_command(ranks(tmp_path / 'd.tiktoken')), 'tiktoken'),
        (lambda: audit_command(t / 'minimind_tokenizer.json'), 'tokenizer.json'),
        (lambda: audit_command(good, json=str(tmp_path / 'x.txt' / 'a.json')), 'cannot write'),
    ]:
        with pytest.raises(LlamaZhError) as e:
            call()
        assert all(s in str(e.value) for s in says) and '\n' not in str(e.value), str(e.value)
    assert not [
        p.name for p in tmp_path.iterdir() if p.suffix in ('.bmp', '.png') or p.name.startswith('.')
    ]
