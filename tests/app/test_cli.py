"llama-zh: help that is complete and quick, exit codes that mean something, and functions behind every command"

import inspect
import os
import subprocess
import sys

import pytest

from llama_zh_nb.app.cli import COMMANDS, _load, add_arguments, commands, main
from llama_zh_nb.core.settings import settings


def cli(*args, **kw):
    return subprocess.run(
        [sys.executable, '-m', 'llama_zh_nb.app.cli', *map(str, args)],
        capture_output=True,
        text=True,
        **kw,
    )


def test_help_lists_all_and_imports_nothing_heavy():
    code = "import sys; from llama_zh_nb.app.cli import main; c = main(['--help']); print('HEAVY', sorted({'torch','transformers','langchain_core','datasets','sentencepiece','jieba','numpy'} & set(sys.modules))); sys.exit(c)"
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert p.returncode == 0 and 'HEAVY []' in p.stdout
    assert all(f'  {c} ' in p.stdout for c in commands())


def test_run_help_is_light_and_names_every_field():
    code = "import sys; from llama_zh_nb.app.cli import main; c = main(['run', '--help']); print('HEAVY', sorted({'torch','transformers'} & set(sys.modules))); sys.exit(c)"
    p = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        env=dict(os.environ, COLUMNS='200'),
    )
    assert p.returncode == 0 and 'HEAVY []' in p.stdout
    for f in settings():
        assert f'--{f.replace("_", "-")} ' in p.stdout, f


@pytest.mark.parametrize('cmd', sorted(COMMANDS))
def test_every_command_has_a_function_and_help(cmd, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '200')
    if cmd not in commands():
        pytest.fail(f'{cmd}: {COMMANDS[cmd][0]} is not there')
    assert main([*cmd.split(), '--help']) == 0
    out = capsys.readouterr().out
    assert out.startswith(f'usage: llama-zh {cmd}')
    if cmd in ('run', 'estimate'):
        return
    f = _load(COMMANDS[cmd][0])
    assert inspect.getdoc(f) and inspect.getdoc(f).split('\n')[0].split()[0] in out


@pytest.mark.parametrize(
    'argv',
    [
        [],
        ['nonsense'],
        ['weights'],
        ['weights', 'frobnicate'],
        ['run', '--no-such-field', '1'],
        ['run', '--lr', 'fast'],
        ['run', '--recipe', 'nobody'],
        ['run', '--only'],
        ['corpus'],
        ['report'],
        ['estimate', '--recipe', 'minni'],
        ['run', '--bits', '5'],
    ],
)
def test_wrong_use_is_2(argv, capsys):
    assert main(argv) == 2
    assert 'Traceback' not in capsys.readouterr().err


@pytest.mark.parametrize(
    'argv',
    [
        ['report', '/nowhere'],
        ['weights', 'verify', '/nowhere'],
        ['corpus', '/nowhere', '/tmp/llama-zh-none'],
        ['run', '--only', 'vocabulary', '--corpus', __file__, '--base', '/nowhere'],
        ['run', '--base', '/nowhere/at/all', '--corpus', '/nowhere.txt'],
        ['estimate', '--base', '/nowhere/at/all'],
        ['vocab', 'audit', '/nowhere'],
    ],
)
def test_explained_failure_is_1(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('LLAMA_ZH_RUNS', str(tmp_path / 'runs'))
    assert main(argv) == 1
    err = capsys.readouterr().err
    assert err.count('llama-zh: ') == 1 and 'Traceback' not in err and len(err) < 1000, err


def test_near_names(capsys):
    main(['wieghts'])
    assert 'weights' in capsys.readouterr().err
    main(['run', '--recipe', 'llama2-7b-24g'])
    assert 'llama2-7b-24gb' in capsys.readouterr().err


def test_a_function_becomes_arguments():
    import argparse

    def f(
        sources,
        out,
        size: int = 3,
        ratio=0.5,
        deep: bool = False,
        names: list = (),
        steps=None,
        heldout=None,
    ):
        "Do."

    p = argparse.ArgumentParser()
    add_arguments(p, f)
    a = vars(
        p.parse_args(
            [
                'a',
                'b',
                'o',
                '--size',
                '4',
                '--ratio',
                '1',
                '--deep',
                '--names',
                'x',
                'y',
                '--steps',
                '7',
            ]
        )
    )
    assert a == dict(
        sources=['a', 'b'], out='o', size=4, ratio=1.0, deep=True, names=['x', 'y'], steps=7
    )
    assert vars(p.parse_args(['a', 'o', '--steps', 'none'])) == dict(
        sources=['a'], out='o', steps=None
    )
    with pytest.raises(SystemExit) as e:
        p.parse_args(['a', 'o', '--heldout', 'x'])
    assert e.value.code == 2


def test_vocab_merge_takes_lists(capsys):
    import argparse

    p = argparse.ArgumentParser()
    add_arguments(p, _load('vocab.merge_command'))
    a = vars(
        p.parse_args(
            [
                '--base',
                'm',
                '--corpus',
                'a.txt',
                'b.txt',
                '--add',
                'x.model',
                '--size',
                '900',
                '--out',
                'o',
            ]
        )
    )
    assert a == dict(base='m', corpus=['a.txt', 'b.txt'], add=['x.model'], size=900, out='o')


def test_corpus_and_report_through_the_shell(tmp_path):
    (tmp_path / 'a.txt').write_text(
        '春天来了，燕子飞回来了，河边的柳树也绿了。\n秋天到了，稻子熟了，农民忙着收割。\n'
    )
    p = cli('corpus', tmp_path / 'a.txt', tmp_path / 'c', '--valid-share', '0')
    assert p.returncode == 0 and (tmp_path / 'c' / 'train.jsonl').exists() and 'kept' in p.stdout
    assert cli('--version').stdout.startswith('llama-zh-nb ')


def test_estimate(capsys):
    assert main(['estimate', '--recipe', 'llama2-7b-24gb']) == 0
    assert 'not measured' in capsys.readouterr().out
