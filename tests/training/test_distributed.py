"""Many processes, the same run: two equal one, engines are what they say, sharded checkpoints go on elsewhere. Two CPU processes, gloo."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.processes import TESTS, chat_run, env
from helpers.tiny import EN, HELD, ZH, grouped, make, tensors, tiny

from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.core.settings import TrainArgs
from llama_zh_nb.training import distributed as scale
from llama_zh_nb.training.trainer import History

torch = pytest.importorskip('torch')
pytest.importorskip('peft')
pytest.importorskip('accelerate')


KW = dict(
    lora_r=4,
    lora_alpha=8,
    lora_dropout=0.0,
    block=64,
    batch=2,
    global_batch=4,
    lr=5e-3,
    max_steps=12,
    eval_every=4,
    save_every=4,
    log_every=1,
    device='cpu',
)
CHILD = """
import json, os, sys
sys.path.insert(0, {tests!r})
import helpers.tiny as t, llama_zh_nb.pretrain as p
from llama_zh_nb.core.settings import TrainArgs
die = int(os.environ.get('DIE', 0))
class Dies(p.BlockCollate):
    n = 0
    def __call__(self, rows):
        Dies.n += 1
        if Dies.n == die: os._exit(9)
        return super().__call__(rows)
if die: p.BlockCollate = Dies
p.pretrain(sys.argv[1], t.ZH, sys.argv[2], replay_corpus=t.EN, heldout=t.HELD, **t.grouped(TrainArgs, json.loads(sys.argv[3])))
"""
needs_deepspeed = pytest.mark.skipif(
    not importlib.util.find_spec('deepspeed'),
    reason='deepspeed is not installed: pip install llama-zh-nb[scale]',
)

CHAT_CHILD = """
import json, os, sys
sys.path.insert(0, {tests!r})
import helpers.processes as t
t.chat_run(sys.argv[1], sys.argv[2], int(os.environ.get('DIE', 0)), **json.loads(sys.argv[3]))
"""


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    return make(tmp_path_factory.mktemp('scale') / 'base')


@pytest.fixture(scope='module')
def start(base, tmp_path_factory):
    "start(n, out, die=0, **arguments of pretrain): n processes of torchrun"

    def f(n, out, die=0, ok=True, folder=base, child=CHILD, **kw):
        script = tmp_path_factory.mktemp('child') / 'child.py'
        script.write_text(child.format(tests=str(TESTS)))
        p = subprocess.run(
            [
                sys.executable,
                '-m',
                'torch.distributed.run',
                '--nproc_per_node',
                str(n),
                '--master_port',
                str(20000 + os.getpid() % 20000),
                str(script),
                str(folder),
                str(out),
                json.dumps((KW if child is CHILD else {}) | kw),
            ],
            capture_output=True,
            text=True,
            timeout=240,
            env=env(DIE=str(die)),
        )
        assert (p.returncode == 0) == (ok and not die), p.stdout[-1000:] + p.stderr[-4000:]
        return p.stdout + p.stderr

    return f


@pytest.fixture(scope='module')
def one(base, tmp_path_factory):
    "One process without any launcher"
    from llama_zh_nb.pretrain import pretrain

    os.environ['LLAMA_ZH_PROGRESS'] = '0'
    out = tmp_path_factory.mktemp('one') / 'o'
    return out, pretrain(base, ZH, out, replay_corpus=EN, heldout=HELD, **grouped(TrainArgs, KW))


def same(a, b, tol=1e-5):
    "Losses, held-out bits and weights of two folders"
    h, g = History.load(a / 'history.json'), History.load(b / 'history.json')
    for k in ('loss', 'zh_bpc', 'en_bpb', 'lr', 'tokens'):
        assert h.column(k)[0] == g.column(k)[0] and np.allclose(
            h.column(k)[1], g.column(k)[1], atol=tol, rtol=0
        ), k
    x, y = tensors(a), tensors(b)
    assert set(x) == set(y) and max((x[k] - y[k]).abs().max() for k in x) < tol


def test_two_processes_equal_one(one, start, tmp_path):
    out = start(2, tmp_path / 'o')
    same(one[0], tmp_path / 'o')
    assert (tmp_path / 'o' / 'adapter' / 'adapter_model.safetensors').exists() and not (
        tmp_path / 'o' / 'checkpoints'
    ).exists()
    assert 'Traceback' not in out


def test_fsdp2_splits_dies_and_goes_on_with_one_process(one, start, tmp_path):
    start(2, tmp_path / 'o', die=11, engine='fsdp2')
    marks = {
        p.parent.name: json.loads(p.read_text())
        for p in (tmp_path / 'o' / 'checkpoints').glob('*/complete.json')
    }
    assert (
        set(marks) == {'checkpoint-4', 'checkpoint-8'}
        and marks['checkpoint-8']['engine'] == 'fsdp2'
        and marks['checkpoint-8']['processes'] == 2
    )
    assert list(
        (tmp_path / 'o' / 'checkpoints' / 'checkpoint-8').rglob('__1_0.distcp')
    )  # the second process wrote a part of its own
    assert 'resuming from checkpoint-8' in start(1, tmp_path / 'o', engine='fsdp2')
    same(one[0], tmp_path / 'o')


@pytest.mark.slow
@pytest.mark.parametrize('engine,train', [('ddp', 'full'), ('fsdp2', 'full'), ('fsdp2', 'embed')])
def test_other_parts_are_trained_alike(base, start, tmp_path, engine, train):
    from llama_zh_nb.pretrain import pretrain

    pretrain(
        base,
        ZH,
        tmp_path / 'one',
        replay_corpus=EN,
        heldout=HELD,
        **grouped(TrainArgs, KW | dict(train=train, max_steps=4)),
    )
    start(2, tmp_path / 'two', engine=engine, train=train, max_steps=4)
    same(tmp_path / 'one', tmp_path / 'two')


@pytest.mark.slow
def test_ddp_dies_and_goes_on_with_one_process(one, start, tmp_path):
    start(2, tmp_path / 'o', die=11)
    start(1, tmp_path / 'o')
    same(one[0], tmp_path / 'o')


@needs_deepspeed
@pytest.mark.parametrize(
    'engine,n,then',
    [
        ('zero2', 1, 'zero2'),
        *(
            pytest.param(*p, marks=pytest.mark.slow)
            for p in (
                ('zero2', 2, 'zero2'),
                ('zero3', 1, 'zero3'),
                ('zero3', 2, 'zero3'),
                ('zero2', 2, 'zero3'),
                ('zero3-offload', 1, 'zero2'),
            )
        ),
    ],
)
def test_deepspeed_dies_and_goes_on_with_any_number_of_processes(
    base, start, tmp_path, engine, n, then
):
    "Two groups with learning rates of their own, and parameters whose sizes two does not divide, among them"
    kw = dict(embed_lr=2e-3, weight_decay=0.1, lora_r=3)
    start(1, tmp_path / 'one', engine='ddp', **kw)
    start(2, tmp_path / 'o', die=11, engine=engine, **kw)
    assert 'resuming from checkpoint-8' in start(n, tmp_path / 'o', engine=then, **kw)
    same(tmp_path / 'one', tmp_path / 'o')


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(
    'engine,train',
    [
        ('zero2-offload', 'lora+new'),
        ('zero3-offload', 'lora+new'),
        ('zero2', 'full'),
        ('zero3', 'full'),
        ('zero3', 'embed'),
    ],
)
def test_deepspeed_offload_and_full(base, start, tmp_path, engine, train):
    from llama_zh_nb.pretrain import pretrain

    pretrain(
        base,
        ZH,
        tmp_path / 'one',
        replay_corpus=EN,
        heldout=HELD,
        **grouped(TrainArgs, KW | dict(train=train, max_steps=4, save_every=None)),
    )
    start(2, tmp_path / 'two', engine=engine, train=train, max_steps=4, save_every=None)
    same(tmp_path / 'one', tmp_path / 'two')


# ---- chats


@pytest.fixture(scope='module')
def chats(tmp_path_factory, start):
    "chats(n, out, ...): fine-tuning in n processes; chats.one: what one process gives; chats.base"
    d = tmp_path_factory.mktemp('chats')
    base = tiny(d)

    def f(n, out, **kw):
        return start(n, out, folder=base, child=CHAT_CHILD, **kw)

    f.base, f.one = base, d / 'one'
    os.environ['LLAMA_ZH_PROGRESS'] = '0'
    chat_run(base, f.one)
    return f


@pytest.mark.parametrize('engine', ['ddp', 'fsdp2'])
def test_finetuning_in_two_processes_equals_one(chats, tmp_path, engine):
    "Among others: the loss of a step is divided by the answered tokens of both processes, which differ"
    chats(2, tmp_path / 'o', engine=engine)
    same(chats.one, tmp_path / 'o')
    a, b = (History.load(d / 'history.json') for d in (chats.one, tmp_path / 'o'))
    assert a.column('right') == b.column('right') and len(a.column('right')[0]) == 2
    assert (
        (tmp_path / 'o' / 'adapter' / 'adapter_model.safetensors').exists()
        and (tmp_path / 'o' / 'chat_template.jinja').exists()
        and not (tmp_path / 'o' / 'checkpoints').exists()
    )


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize('engine', ['zero2', 'zero3'])
def test_finetuning_by_deepspeed_equals_one_process(chats, tmp_path, engine):
    chats(2, tmp_path / 'o', engine=engine)
    same(chats.one, tmp_path / 'o')


@pytest.mark.slow
def test_finetuning_dies_and_goes_on_with_one_process(chats, tmp_path):
    chats(2, tmp_path / 'o', engine='fsdp2', die=6)
    assert 'resuming from checkpoint-3' in chats(1, tmp_path / 'o', engine='fsdp2')
    same(chats.one, tmp_path / 'o')


@pytest.mark.parametrize('train', ['pretrain', 'finetune'])
def test_the_hub_is_asked_before_and_gets_the_folder_after(base, tmp_path, monkeypatch, train):
    from llama_zh_nb.pretrain import pretrain
    from llama_zh_nb.training import artifacts

    sent, asked = [], []

    def go(out, **kw):
        if train == 'pretrain':
            return pretrain(
                base,
                ZH,
                out,
                **grouped(TrainArgs, KW | dict(max_steps=1, save_every=None, heldout={}) | kw),
            )
        return chat_run(tiny(tmp_path), out, max_steps=1, save_every=None, eval_every=None, **kw)

    with pytest.raises(LlamaZhError, match='nobody'):
        go(tmp_path / 'o', push_to_hub='nobody')
    assert not (tmp_path / 'o').exists()
    monkeypatch.setattr(
        artifacts, 'check_push', lambda repo, base: asked.append((repo, Path(base).exists()))
    )
    monkeypatch.setattr(
        artifacts,
        'push_after',
        lambda folder, repo: sent.append(
            (repo, (Path(folder) / 'config.json').exists(), (Path(folder) / 'README.md').exists())
        ),
    )
    go(tmp_path / 'o', push_to_hub='me/x')
    assert asked == [('me/x', True)] and sent == [('me/x', True, True)]


@pytest.mark.parametrize(
    'says,engine',
    [
        (dict(ACCELERATE_USE_FSDP='true'), 'fsdp2'),
        (
            dict(
                ACCELERATE_USE_DEEPSPEED='true',
                ACCELERATE_DEEPSPEED_ZERO_STAGE='3',
                ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE='cpu',
            ),
            'zero3-offload',
        ),
        (
            dict(ACCELERATE_USE_DEEPSPEED='true', ACCELERATE_DEEPSPEED_CONFIG_FILE='x/zero2.json'),
            'x/zero2.json',
        ),
        ({}, 'ddp'),
    ],
)
def test_what_accelerate_was_told(monkeypatch, says, engine):
    for k in ('ACCELERATE_USE_FSDP', 'ACCELERATE_USE_DEEPSPEED'):
        monkeypatch.delenv(k, raising=False)
    for k, v in dict(says, RANK='0').items():
        monkeypatch.setenv(k, v)
    assert scale.pick_engine() == engine


def test_an_engine_that_fell_back_is_noticed(monkeypatch):
    class T:
        model_wrapped, args = torch.nn.Linear(2, 2), SimpleNamespace(world_size=1)

    with pytest.raises(LlamaZhError, match='held by Linear'):
        scale.check_engine(T, 'fsdp2')
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(LlamaZhError, match='same rows'):
        scale.check_engine(T, 'ddp')


@pytest.mark.slow
def test_the_gpu_benchmark_runs_at_a_small_shape(tmp_path):
    script = [
        sys.executable,
        str(TESTS.parent / 'benchmarks' / 'train_gpu.py'),
        '--shape',
        'tiny',
        '--device',
        'cpu',
    ]
    p = subprocess.run(
        [
            *script,
            '--lengths',
            '64',
            '--steps',
            '5',
            '--peak',
            '1',
            '--json',
            str(tmp_path / 'r.json'),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env=env(),
    )
    assert p.returncode == 0, p.stderr[-2000:]
    d = json.loads((tmp_path / 'r.json').read_text())
    rows = {r['way']: r for r in d['rows']}
    assert set(rows) == {'plain', 'ours', 'ours, mixed'} and all(
        r['tokens_per_second'] > 0 and r['mfu'] > 0 and r['peak_bytes'] > 0 and r['loss']
        for r in rows.values()
    )
    assert (
        rows['ours']['trained'] < rows['plain']['trained']
        and d['versions']['torch']
        and 'over plain' in p.stdout
    )
    for bad, says in (
        (['--steps', '2'], 'at least 5'),
        (['--batch', '0'], 'above 0'),
        (['--lengths', '999'], 'positions'),
    ):
        q = subprocess.run([*script, *bad], capture_output=True, text=True, env=env())
        assert q.returncode and says in q.stderr and 'Traceback' not in q.stderr
