"""Blocks of texts: nothing is lost, packed equals alone, packing goes on where it was cut off."""

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny import OLD, ZH, make

from llama_zh_nb.checkpoint.folder import (
    load_tokenizer,
)
from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.core.settings import ComputeArgs
from llama_zh_nb.training.lora import load_base, prepare
from llama_zh_nb.training.packing import (
    BlockCollate,
    corpus_texts,
    encode_documents,
    fill_blocks,
    pack_blocks,
    reading_order,
)

torch = pytest.importorskip('torch')
pytest.importorskip('peft')
os.environ['LLAMA_ZH_PROGRESS'] = '0'

CPU = ComputeArgs(device='cpu')


@pytest.fixture(scope='session')
def base(tmp_path_factory):
    return make(tmp_path_factory.mktemp('tiny') / 'base')


def losses(model, batch):
    "Loss of every labelled token"
    logits = model(input_ids=batch['input_ids'], position_ids=batch.get('position_ids')).logits[
        :, :-1
    ]
    labels = batch['labels'][:, 1:]
    return torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels, reduction='none', ignore_index=-100
    )[labels >= 0]


@pytest.mark.parametrize('attn', ['sdpa', 'eager'])
@pytest.mark.parametrize('train', ['full', 'lora+new'])
def test_packed_equals_alone(base, attn, train):
    m = prepare(load_base(base, train, replace(CPU, attn=attn)), train, (OLD, 150)).eval()
    docs = list(encode_documents(load_tokenizer(base), ZH[:6]))
    rows = [dict(input_ids=np.array(b)) for b in fill_blocks(docs, sum(map(len, docs)) + 5)]
    assert len(rows) == 1
    with torch.no_grad():
        alone = torch.cat([losses(m, BlockCollate(1)([dict(input_ids=np.array(d))])) for d in docs])
        apart, mixed = losses(m, BlockCollate(1)(rows)), losses(m, BlockCollate(1, mix=True)(rows))
    assert len(alone) == len(apart) and (alone - apart).abs().max() < 1e-5
    assert len(mixed) == len(apart) + len(docs) - 1 and abs(mixed.mean() - apart.mean()) > 1e-3


def test_fill_loses_nothing():
    r = random.Random(0)
    docs = [[1, *(r.randint(3, 9) for _ in range(r.randint(0, 150))), 2] for _ in range(300)]
    for cut in (True, False):
        blocks = list(fill_blocks(docs, 64, cut))
        assert {len(b) for b in blocks} == {64}
        assert sorted(i for b in blocks for i in b if i >= 0) == sorted(i for d in docs for i in d)
    for b in fill_blocks([d for d in docs if len(d) <= 64], 64):
        assert b[0] == 1 and [i for i in b if i >= 0][-1] == 2  # short documents are never cut


def test_pack_reports_and_is_used_again(base, tmp_path):
    tok = load_tokenizer(base)
    a = pack_blocks(ZH, tok, tmp_path / 'b', 64, key=[1])
    n = a.report
    assert (
        n['documents'] == len(ZH)
        and n['characters'] == sum(map(len, ZH))
        and n['blocks'] * 64 == n['tokens'] + n['padding'] == len(a) * 64
    )
    assert len(pack_blocks(iter(()), tok, tmp_path / 'b', 64, key=[1])) == len(
        a
    )  # the same key: not packed again
    d = pack_blocks(ZH, tok, tmp_path / 'c', 64, cut=True, drop_rest=True).report
    assert d['padding'] == 0 and d['blocks'] * 64 + d['dropped_tokens'] == d['tokens']
    with pytest.raises(LlamaZhError, match='nothing to train on'):
        pack_blocks(['', ' '], tok, tmp_path / 'd', 64)
    assert not (tmp_path / 'd').exists()


def test_pack_in_parts_by_any_number_of_processes(base, tmp_path):
    tok = load_tokenizer(base)
    a, b = (pack_blocks(ZH, tok, tmp_path / str(w), 64, part_docs=50, workers=w) for w in (None, 2))
    assert (
        len(list((tmp_path / '2').glob('*.arrow'))) == 3
        and a.report == b.report
        and len(a) == len(b) > 30
    )
    assert (
        all((a[i] == b[i]).all() for i in range(len(a)))
        and [p.name for p in tmp_path.iterdir() if p.name.startswith('.')] == []
    )
    whole = pack_blocks(ZH, tok, tmp_path / 'w', 64)
    assert whole.report['tokens'] == a.report['tokens'] and sorted(
        i for r in a for i in r if i >= 0
    ) == sorted(i for r in whole for i in r if i >= 0)


def test_packing_goes_on_where_it_was_cut_off(base, tmp_path, monkeypatch):
    import llama_zh_nb.training.packing as m

    tok, made, real = load_tokenizer(base), [], m._pack_part

    def part(tokenizer, texts, path, how):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(Path(path).name)
        real(tokenizer, texts, path, how)

    monkeypatch.setattr(m, '_pack_part', part)
    with pytest.raises(KeyboardInterrupt):
        pack_blocks(ZH, tok, tmp_path / 'b', 64, key=1, part_docs=30)
    assert made == ['data-00000', 'data-00001'] and not (tmp_path / 'b').exists()
    made.clear()
    b = pack_blocks(
        ZH, tok, tmp_path / 'b', 64, key=1, part_docs=30
    )  # 120 documents: two parts are left
    assert (
        made == ['data-00002', 'data-00003']
        and b.report['documents'] == len(ZH)
        and len(list((tmp_path / 'b').glob('*.arrow'))) == 4
    )


def test_control_tokens_in_text_stay_text(base):
    (ids,) = encode_documents(load_tokenizer(base), ['春天</s><s>河水'])
    assert ids.count(2) == 1 and ids.count(1) == 1


def test_order_has_its_share_and_is_repeatable():
    o = reading_order(10, 7, 0.2, 100, seed=3)
    assert (o >= 10).sum() == 20 and all(
        (o[i : i + 10] >= 10).sum() == 2 for i in range(0, 100, 10)
    )
    assert (
        sorted(o[o < 10][:10]) == list(range(10))
        and (reading_order(10, 7, 0.2, 100, seed=3) == o).all()
    )
    assert (reading_order(10, 0, 0, 10) < 10).all()


def test_corpus_folder_keeps_its_valid_part_out(tmp_path):
    for part, t in (('train', '春天'), ('valid', '河水')):
        (tmp_path / f'{part}.jsonl').write_text(json.dumps(dict(text=t)) + '\n', encoding='utf-8')
    assert list(corpus_texts(tmp_path)) == ['春天'] and list(corpus_texts(tmp_path, 'valid')) == [
        '河水'
    ]
    with pytest.raises(LlamaZhError, match='no such corpus'):
        corpus_texts(tmp_path / 'x')
