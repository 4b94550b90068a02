"What a run trains on holds nothing of the wordings by which it is measured: looked for in the files themselves, not in the patterns."

import json
import re

import pytest

from llama_zh_nb.mini.world import _frame, _runs, read_facts, read_patterns, split_facts, too_near


def held(lang, split):
    return [
        p for (of, *_, s), ps in read_patterns().items() for p in ps if (of, s) == (lang, split)
    ]


def _plain(
    text, lang
):  # marks become borders; English words in small letters with one space around each
    text = re.sub(r"[^\w' ]+", '\n', text)
    return (
        text.replace(' ', '')
        if lang == 'zh'
        else re.sub(r'[ ]*\n[ ]*', ' \n ', f' {text.lower()} ')
    )


@pytest.fixture(scope='module')
def texts(tested_run):
    world = tested_run / 'world'
    docs = {
        lang: [
            json.loads(line)['text']
            for f in sorted((world / lang).glob('*.jsonl'))
            for line in f.read_text(encoding='utf-8').splitlines()
        ]
        for lang in ('zh', 'en')
    }
    chats = [
        m['content']
        for c in json.loads((world / 'chats.json').read_text(encoding='utf-8'))
        for m in c['messages']
    ]
    assert len(docs['zh']) > 20_000 and len(chats) > 10_000
    return {lang: '\n'.join(_plain(d, lang) for d in docs[lang] + chats) for lang in docs}


@pytest.mark.parametrize(
    'lang,split', [(lang, split) for lang in ('zh', 'en') for split in ('dev', 'test')]
)
def test_no_wording_of_a_held_out_pattern_is_in_training_text(texts, lang, split):
    sep = '' if lang == 'zh' else ' '
    runs = {r: p for p in held(lang, split) for r in _runs(p, lang)}
    assert len(runs) > 30
    assert [
        (sep.join(r), p) for r, p in runs.items() if sep + sep.join(r) + sep in texts[lang]
    ] == []


def test_too_near_finds_what_it_should():
    trained = ['请问{X}的{R}是什么？', "Do you know {X}'s {R}?"]
    assert too_near(
        ['请问，{X}的{R}是什么？', '{X}的{R}是什么？', '{X}有啥{R}？'], trained, 'zh'
    ) == ['请问，{X}的{R}是什么？', '{X}的{R}是什么？']
    assert too_near(["So do you know {X}'s {R}?", "What might {X}'s {R} be?"], trained, 'en') == [
        "So do you know {X}'s {R}?"
    ]


def test_development_and_test_wordings_differ():
    for lang in ('zh', 'en'):
        assert not {_frame(p, lang) for p in held(lang, 'dev')} & {
            _frame(p, lang) for p in held(lang, 'test')
        }


def test_unseen_facts_are_in_no_training_text(texts):
    for f in (f for f in split_facts(read_facts()) if f.split == 'unseen'):
        for i, lang in ((0, 'en'), (1, 'zh')):
            a, r, v = (_plain(x[i], lang).strip() for x in (f.entity, f.relation, f.value))
            says = (
                (f'{a}的{r}是{v}', f'{v}是{a}的{r}')
                if lang == 'zh'
                else (f"{a}'s {r} is {v}", f"{v} is {a}'s {r}")
            )
            assert not any(s in texts[lang] for s in says), f
