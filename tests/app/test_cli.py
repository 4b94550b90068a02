"llama-zh: help that is complete and quick, exit codes that mean something, and functions behind every command"

import argparse
import inspect
import os
import re
import subprocess
import sys

import pytest

from llama_zh_nb.app.cli import COMMANDS, Command, _parse, add_arguments, main
from llama_zh_nb.core.settings import (
    ChatArgs,
    ComputeArgs,
    LoraArgs,
    SftArgs,
    TrainArgs,
    settings,
)
from llama_zh_nb.embeddings import INITS
from llama_zh_nb.text.templates import template_names


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
    assert all(f'  {c} ' in p.stdout for c in COMMANDS)


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
        assert re.search(f'--{f.replace("_", "-")}[ ,]', p.stdout), f


@pytest.mark.parametrize(
    'cmd, choices',
    [
        ('run', INITS),
        ('run', template_names()),
        ('embeddings resize', INITS),
        ('sft', template_names()),
        ('chat', template_names()),
    ],
)
def test_help_lists_what_a_table_holds(cmd, choices, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '300')
    assert main([*cmd.split(), '--help']) == 0
    assert f'({", ".join(choices)})' in capsys.readouterr().out


@pytest.mark.parametrize('cmd', sorted(COMMANDS))
def test_every_command_has_a_function_and_help(cmd, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '200')
    assert main([*cmd.split(), '--help']) == 0
    out = capsys.readouterr().out
    assert out.startswith(f'usage: llama-zh {cmd}')
    if cmd in ('run', 'estimate'):
        return
    f = COMMANDS[cmd].load()
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


@pytest.mark.parametrize('cmd', sorted(set(COMMANDS) - {'run', 'estimate'}))
def test_every_argument_is_explained(cmd):
    p = argparse.ArgumentParser(prog=cmd)
    add_arguments(p, COMMANDS[cmd].load(), COMMANDS[cmd])
    assert [a.dest for a in p._actions if not a.help] == []


def test_a_function_becomes_arguments():
    def f(
        sources,
        out,
        size: int = 3,
        ratio=0.5,
        deep: bool = False,
        names: list = (),
        steps: int = None,
        heldout=None,
    ):
        "Do."

    p = argparse.ArgumentParser()
    add_arguments(p, f, Command(None, '', several=('sources',), hide=('heldout',)))
    words = 'a b --out o --size 4 --ratio 1 --deep --names x y --steps 7'.split()
    assert vars(p.parse_args(words)) == dict(
        sources=['a', 'b'], out='o', size=4, ratio=1.0, deep=True, names=['x', 'y'], steps=7
    )
    few = ['a', '--out', 'o']
    assert vars(p.parse_args([*few, '--steps', 'none'])) == dict(sources=['a'], out='o', steps=None)
    for wrong in (['--heldout', 'x'], ['--size', 'many']):
        with pytest.raises(SystemExit) as e:
            p.parse_args([*few, *wrong])
        assert e.value.code == 2


def test_vocab_merge_takes_lists():
    words = 'm --corpus a.txt b.txt --add x.model --size 900 --out o'.split()
    _, typed = _parse('vocab merge', words)
    assert typed == dict(base='m', corpus=['a.txt', 'b.txt'], add=['x.model'], size=900, out='o')


# ---- one grammar: what goes in stands first, what is made behind --out; older forms are understood

FORMS = {  # command: (today's form, the older one, what both mean)
    'weights get': ('s --out o', 's o', dict(source='s', out='o')),
    'weights convert': ('s --out o', 's o', dict(src='s', out='o')),
    'corpus': ('a b --out o', 'a b o', dict(sources=['a', 'b'], out='o')),
    'vocab train': ('a b 900 --out o', 'a b 900 o', dict(texts=['a', 'b'], size=900, out='o')),
    'vocab merge': (
        'm --size 9 --out o',
        '--base m --size 9 --out o',
        dict(base='m', size=9, out='o'),
    ),
    'embeddings resize': ('m t --out o', 'm t o', dict(model_dir='m', tokenizer_dir='t', out='o')),
    'pretrain': ('m c --out o', 'm c o', dict(model='m', corpus='c', out='o')),
    'sft': ('m a b --out o', 'm a b o', dict(model='m', chats=['a', 'b'], out='o')),
    'merge-lora': ('b x y --out o', 'b x y o', dict(base='b', adapters=['x', 'y'], out='o')),
    'quantize': ('m c --out o', 'm c o', dict(model_dir='m', chats_or_texts=['c'], out='o')),
    'rag index': ('a b --out o', 'a b o', dict(docs=['a', 'b'], out='o')),
    'gguf': ('m --out o', 'm o', dict(model_dir='m', out='o')),
    'draft': ('m c --out o', 'm c o', dict(model_dir='m', chats=['c'], out='o')),
    'rope': ('m --out o', 'm o', dict(model_dir='m', out='o')),
    'page': ('m --port 1', '--model m --port 1', dict(model='m', port=1)),
    'webui-template': ('zhu --out o', '--template zhu --out o', dict(template='zhu', out='o')),
}


def values(typed):
    "By today's names, as owners of the functions may rename `model_dir` to `model`"
    return {k.removesuffix('_dir'): v for k, v in typed.items()}


@pytest.mark.parametrize('cmd', sorted(FORMS))
def test_todays_form_and_the_older_one(cmd, capsys):
    today, older, means = FORMS[cmd]
    _, typed = _parse(cmd, today.split())
    assert values(typed) == values(means) and capsys.readouterr().err == ''
    _, typed = _parse(cmd, older.split())
    said = capsys.readouterr().err
    assert values(typed) == values(means) and said.startswith('note: now ') and len(said) < 120


@pytest.mark.parametrize(
    'cmd', sorted(c for c in COMMANDS if c not in FORMS and c not in ('run', 'estimate'))
)
def test_no_other_command_has_two_forms(cmd):
    "Whoever adds a command that makes something has to say both"
    out = inspect.signature(COMMANDS[cmd].load()).parameters.get('out')
    assert out is None or out.default is not out.empty


def test_the_same_word_twice_is_refused(capsys):
    with pytest.raises(SystemExit):
        _parse('page', ['m', '--model', 'n'])
    assert 'given twice' in capsys.readouterr().err


def test_settings_objects_from_the_command_line(monkeypatch, capsys):
    "Each option reaches its field; a wrong value is named as it was typed"
    got = {}

    def finetune(
        model,
        chats,
        out,
        args: SftArgs = SftArgs(),
        lora: LoraArgs = LoraArgs(),
        chat: ChatArgs = ChatArgs(),
    ):
        "Do."
        got.update(args=args, lora=lora, chat=chat)

    command = Command(lambda: finetune, '', several=('chats',))
    monkeypatch.setitem(COMMANDS, 'sft', command)
    words = ['sft', 'm', 'c', '--out', 'o', '--lora-r', '4', '--template', 'zhu', '--no-pack']
    assert main([*words, '--lr', '1e-3', '--max_steps', '7', '--embed-lr', 'none']) == 0
    assert got['args'] == SftArgs(lr=1e-3, max_steps=7, pack=False)
    assert (got['lora'], got['chat']) == (LoraArgs(r=4), ChatArgs(template='zhu'))
    assert main([*words, '--lr', 'fast']) == 1 and '--lr' in capsys.readouterr().err
    assert main([*words, '--too-long', 'never']) == 1 and 'turns, cut' in capsys.readouterr().err


def test_help_is_grouped_by_settings_class(capsys):
    assert main(['pretrain', '--help']) == 0
    out = capsys.readouterr().out
    for cls in (TrainArgs, LoraArgs, ComputeArgs):
        assert cls.__doc__ in ' '.join(out.split())
    out = ' '.join(out.split())
    assert 'share of blocks from the replay corpus' in out and '--lora-dropout' in out


def test_corpus_and_report_through_the_shell(tmp_path):
    (tmp_path / 'a.txt').write_text(
        '春天来了，燕子飞回来了，河边的柳树也绿了。\n秋天到了，稻子熟了，农民忙着收割。\n'
    )
    p = cli('corpus', tmp_path / 'a.txt', '--out', tmp_path / 'c', '--valid-share', '0')
    assert p.returncode == 0 and (tmp_path / 'c' / 'train.jsonl').exists() and 'kept' in p.stdout
    assert cli('--version').stdout.startswith('llama-zh-nb ')


def test_estimate(capsys):
    assert main(['estimate', '--recipe', 'llama2-7b-24gb']) == 0
    assert 'not measured' in capsys.readouterr().out
