"""From a recipe to many processes: the words of a shell, accelerate's files, and presets that one process cannot train."""

import json
import os
import subprocess
import sys

import pytest
from helpers.processes import TESTS, env
from helpers.tiny import EN, ZH, make, tiny

from llama_zh_nb.app import launch
from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.training.trainer import History

torch = pytest.importorskip('torch')
pytest.importorskip('peft')
pytest.importorskip('accelerate')


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    return make(tmp_path_factory.mktemp('scale') / 'base')


@pytest.fixture(scope='module')
def recipe(base, tmp_path_factory):
    "A run folder with what the earlier stages leave, and a recipe that names it"
    import shutil

    run = tmp_path_factory.mktemp('runs') / 'r'
    shutil.copytree(base, run / 'resized')
    for d, ts in (('corpus', ZH), ('corpus_en', EN)):
        (run / d).mkdir()
        for part, t in (('train', ts[:-8]), ('valid', ts[-8:])):
            (run / d / f'{part}.jsonl').write_text(
                ''.join(json.dumps(dict(text=x)) + '\n' for x in t), encoding='utf-8'
            )
    f = run.parent / 'r.yaml'
    f.write_text(
        f'out: {run}\ndevice: cpu\nblock: 64\nbatch: 2\naccum: 1\nlora_r: 4\nlora_alpha: 8\nlora_dropout: 0.\nlr: 5e-3\nmax_steps: 4\neval_every: 2\n'
    )
    return f, run


def test_words_and_a_recipe_become_settings(recipe, tmp_path):
    f, run = recipe
    _, kw = launch.call_by_recipe('pretrain', [str(f), '--engine', 'ddp', '--lr', '1e-3'])
    assert (kw['compute'].engine, kw['args'].lr, kw['args'].block) == ('ddp', 1e-3, 64)
    (tmp_path / 'c.json').write_text(json.dumps([dict(instruction='q', output='a')]))
    words = ['--sft', str(tmp_path / 'c.json'), '--model-dir', str(run / 'resized')]
    _, kw = launch.call_by_recipe('sft', [str(f), '--lr', '1e-3', '--sft-batch', '2', *words])
    assert (kw['args'].lr, kw['args'].batch, kw['args'].block) == (1e-3, 2, 512)


def test_accelerate_launch_takes_a_recipe(recipe):
    f, run = recipe
    yaml = TESTS.parent / 'configs' / 'ddp.yaml'
    p = subprocess.run(
        [
            sys.executable,
            '-m',
            'accelerate.commands.launch',
            '--config_file',
            str(yaml),
            '--num_processes',
            '2',
            '--main_process_port',
            str(20001 + os.getpid() % 20000),
            '-m',
            'llama_zh_nb.app.launch',
            'pretrain',
            str(f),
            '--lr',
            '4e-3',
            '--global-batch',
            '4',
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env=env(),
    )
    assert p.returncode == 0, p.stderr[-4000:]
    h = History.load(run / 'pretrained' / 'history.json')
    assert (
        h.info['lr'] == 4e-3
        and h.info['batch'] == 4
        and h.last('tokens') == 4 * 4 * 64
        and p.stdout.count('History: 4 steps') == 1
    )
    assert json.loads((run / 'run.json').read_text())['stages']['pretrain']['metrics']['steps'] == 4


def test_fine_tuning_takes_a_recipe(recipe, tmp_path, capsys):
    "The sft_ fields of the recipe, on the command line without their prefix"
    from llama_zh_nb.app.launch import train_by_recipe

    f, run = recipe
    assert (
        train_by_recipe('sft', [str(f), '--model-dir', str(tmp_path / 'no')]) == 1
        and '--only weights corpus vocab embeddings pretrain' in capsys.readouterr().err
    )
    assert (
        train_by_recipe('sft', [str(f), '--model-dir', str(tiny(tmp_path))]) == 1
        and 'names no chats' in capsys.readouterr().err
    )
    (tmp_path / 'c.json').write_text(
        json.dumps([dict(instruction=f'Where is {i}?', output='It is far.') for i in range(40)])
    )
    words = [
        str(f),
        '--sft',
        str(tmp_path / 'c.json'),
        '--model-dir',
        str(tmp_path / 'hf'),
        '--lr',
        '4e-3',
        '--max-steps',
        '3',
        '--block',
        '128',
        '--batch',
        '2',
        '--global-batch',
        '4',
        '--log-every',
        '1',
    ]
    assert train_by_recipe('sft', words) == 0
    h = History.load(run / 'chat' / 'history.json')
    assert (
        h.info['lr'],
        h.info['steps'],
        h.info['batch'],
        h.info['weight_decay'],
        h.info['text_share'],
    ) == (4e-3, 3, 4, 0.0, 0.1) and (run / 'chat' / 'config.json').exists()
    assert json.loads((run / 'run.json').read_text())['stages']['sft']['metrics']['steps'] == 3
    assert (
        train_by_recipe('sft', [*words, '--report-to', 'tensorbord']) == 1
        and "'auto', 'none' or one of" in capsys.readouterr().err
    )


def test_a_preset_for_many_gpus_says_what_to_type():
    from llama_zh_nb.recipes import get_recipe

    r = get_recipe('llama2-7b-8x80gb-full', sft='c.json', corpus='my texts')
    with pytest.raises(LlamaZhError) as e:
        launch.check_alone(r, source='llama2-7b-8x80gb-full')
    for say in (
        '--only weights corpus vocab embeddings',
        "accelerate launch --config_file configs/fsdp2.yaml -m llama_zh_nb.app.launch pretrain llama2-7b-8x80gb-full --corpus 'my texts' --sft c.json",
        '-m llama_zh_nb.app.launch sft',
        '--engine none',
    ):
        assert say in str(e.value), say
    launch.check_alone(r, ['weights', 'corpus'])
    launch.check_alone(get_recipe('llama2-7b-8x80gb-full', engine='none'))
    assert (
        '--num_processes 16 --num_machines 2'
        in launch.recipe_commands(get_recipe('llama2-70b-multinode'))[1]
    )


def test_the_module_refuses_what_makes_no_sense(recipe, tmp_path, capsys, monkeypatch):
    from llama_zh_nb.app.launch import train_by_recipe

    f, run = recipe
    assert (
        train_by_recipe('pretrain', [str(f), '--engine', 'fsdp2']) == 1
        and 'torchrun' in capsys.readouterr().err
    )
    assert (
        train_by_recipe('pretrain', [str(f), '--leaning-rate', '1']) == 1
        and "unknown recipe field 'leaning_rate'" in capsys.readouterr().err
    )
    assert (
        train_by_recipe('pretrain', [str(f), '--corpus-dir', str(tmp_path / 'no')]) == 1
        and 'is not there' in capsys.readouterr().err
    )
    assert (
        train_by_recipe('pretrain', [str(f), '--engine', 'zero9']) == 1
        and 'one of ddp, fsdp2' in capsys.readouterr().err
    )
    assert (
        train_by_recipe('pretrain', [str(f), '--global-batch', '3']) == 1
        and 'a multiple of batch' in capsys.readouterr().err
    )


def test_configs_are_what_the_module_says(root):
    import yaml

    made = launch.configs()
    assert {p.name for p in (root / 'configs').iterdir()} == set(made)
    for name, d in made.items():
        assert (json.loads if name.endswith('json') else yaml.safe_load)(
            (root / 'configs' / name).read_text()
        ) == d, name
