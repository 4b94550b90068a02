"""A domain on top of a finished run: files, prefixes of a recipe, and a short run that learns the field and keeps the old vocabulary."""

import json

import pytest

from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.mini.world import read_patterns, too_near
from llama_zh_nb.recipes import get_recipe, resolve


@pytest.fixture
def runs(tested_run, tmp_path, monkeypatch):
    "A folder of runs in which `mini` is the tested one."
    (tmp_path / 'mini').symlink_to(tested_run)
    monkeypatch.setenv('LLAMA_ZH_RUNS', str(tmp_path))
    return tmp_path


def test_paths_into_another_run(tmp_path, monkeypatch):
    monkeypatch.setenv('LLAMA_ZH_RUNS', str(tmp_path))
    (tmp_path / 'first' / 'chat').mkdir(parents=True)
    r = get_recipe('mini', base='run:first/chat')
    assert resolve(r, r.base) == [str(tmp_path / 'first' / 'chat')]
    with pytest.raises(LlamaZhError, match='llama-zh run --recipe other'):
        resolve(r, 'run:other/chat')
    with pytest.raises(LlamaZhError, match='replay_lang'):
        get_recipe('mini', replay_lang='fr')


def test_held_out_facts_and_wordings(tmp_path):
    from llama_zh_nb.mini.domain import read_herbs, write_herbs

    d = write_herbs(tmp_path / 'herbs', n=900)
    plain = json.dumps(
        json.loads((d / 'chats.json').read_text(encoding='utf-8')), ensure_ascii=False
    ) + (d / 'zh' / 'herbs.jsonl').read_text(encoding='utf-8')
    for f in read_herbs():
        if (
            f.split == 'unseen'
        ):  # passages that say they are made up may hold any value, the true one is kept out of what is stated as true
            assert f'大家都知道，{f.entity[1]}的{f.relation[1]}是{f.value[1]}。' not in plain
    qs = [
        json.loads(line)
        for line in (d / 'questions.jsonl').read_text(encoding='utf-8').splitlines()
    ]
    assert len(qs) == 250 and {q['kind'] for q in qs} == {'asked', 'unseen'}
    assert not [q['question'] for q in qs if q['question'] in plain]
    pats = read_patterns()
    assert not too_near(
        pats['zh', 'ask', '*', 'test'],
        pats['zh', 'ask', '*', 'seen'] + pats['zh', 'ask', '*', 'more'],
        'zh',
    )


def test_a_short_run(runs):
    "Vocabulary, rows, reading and chats by one recipe; the general run's pieces keep their ids."
    from llama_zh_nb.app.run import run
    from llama_zh_nb.tokenizer.exact import load_sp

    r = get_recipe(
        'mini-herbs',
        max_steps=12,
        sft_max_steps=6,
        warmup=0.2,
        save_every=100,
        eval_every=100,
        threads=1,
    )
    out = run(r, only=['weights', 'corpus', 'vocab', 'embeddings', 'pretrain'])['stages']
    old, new = load_sp(runs / 'mini' / 'chat'), load_sp(runs / 'mini-herbs' / 'tokenizer')
    assert [new.id_to_piece(i) for i in range(old.vocab_size())] == [
        old.id_to_piece(i) for i in range(old.vocab_size())
    ]
    assert len(new.encode('黄芪的功效是补气升阳。')) < 0.7 * len(
        old.encode('黄芪的功效是补气升阳。')
    )
    m = {k: out[k]['metrics'] for k in ('embeddings', 'pretrain')}
    assert m['pretrain']['bpc_zh'] < 0.9 * m['embeddings']['bpc_zh']
    assert m['pretrain']['bpb_en'] < 1.2 * m['embeddings']['bpb_en']


def test_without_the_first_run(tmp_path, monkeypatch):
    from llama_zh_nb.app.run import run

    monkeypatch.setenv('LLAMA_ZH_RUNS', str(tmp_path))
    with pytest.raises(LlamaZhError, match='llama-zh run --recipe mini'):
        run(get_recipe('mini-herbs'))
