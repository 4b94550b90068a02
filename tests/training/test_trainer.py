"""A checkpoint belongs to its settings."""

import os
from dataclasses import replace

import numpy as np
import pytest
from helpers.tiny import ZH, make

from llama_zh_nb.checkpoint.folder import (
    load_tokenizer,
)
from llama_zh_nb.core.settings import ComputeArgs, TrainArgs
from llama_zh_nb.training.lora import load_base
from llama_zh_nb.training.packing import (
    BlockCollate,
    encode_documents,
    fill_blocks,
)
from llama_zh_nb.training.trainer import run_training

torch = pytest.importorskip('torch')
pytest.importorskip('peft')
os.environ['LLAMA_ZH_PROGRESS'] = '0'

CPU = ComputeArgs(device='cpu')


@pytest.fixture(scope='session')
def base(tmp_path_factory):
    return make(tmp_path_factory.mktemp('tiny') / 'base')


def test_other_settings_start_anew(base, tmp_path, capsys):
    class Stop(Exception):
        pass

    class Dies:
        def __init__(self, rows):
            self.rows = rows

        def __len__(self):
            return 64

        def __getitem__(self, i):
            if i == 25:
                raise Stop
            return self.rows[i % len(self.rows)]

    rows = [
        dict(input_ids=np.array(b), row=i)
        for i, b in enumerate(fill_blocks(encode_documents(load_tokenizer(base), ZH), 64))
    ]
    args = TrainArgs(max_steps=8, batch=4, accum=1, lr=1e-3, save_every=3)
    compute = replace(CPU, report_to='none')
    for s in (dict(a=1), dict(a=2)):
        with pytest.raises(Stop):
            run_training(
                load_base(base, 'full', CPU),
                None,
                Dies(rows),
                BlockCollate(1),
                tmp_path,
                args,
                compute,
                mark=s,
            )
    assert 'starting from the beginning' in capsys.readouterr().out
