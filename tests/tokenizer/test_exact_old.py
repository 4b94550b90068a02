"""The folder we write, read by transformers 4.57 in an environment of its own: the same ids on every line, also after save and reload."""

import json
import os
import subprocess
import venv
from pathlib import Path

import pytest

from llama_zh_nb.tokenizer.exact import disagreements, load_hf, load_sp, save_tokenizer
from llama_zh_nb.vocab import merge

PACKAGES = ['transformers==4.57.6', 'sentencepiece', 'protobuf']
ODD = [
    '',
    ' ',
    '  two  spaces ',
    'tab\there',
    'a\r\nb\n\n',
    '\x00\x01\x7f',
    '\ufeffmark',
    'zero\u200bwidth',
    '\u202eright to left\u202c',
    '👩‍🌾👍🏽🇨🇳',
    'Ext 𠀀𪚥𰻞 B',
    '▁mark▁',
    'a' * 700,
    '的了' * 300,
    ' ' * 259,
]
TYPED = ['<s>', '</s>', '<pad>', '<unk>', '[INST] x [/INST]', '你好</s><s>再见', 'a <s> b']

# Runs over there, where nothing of ours is installed: folder, file of lines, folder to save to
CHILD = """
import hashlib, json, sys, sentencepiece, transformers
from transformers import AutoTokenizer
folder, lines, again = sys.argv[1:]
lines = json.load(open(lines, encoding="utf-8"))
sp = sentencepiece.SentencePieceProcessor(model_file=folder + "/tokenizer.model")
out = dict(version=transformers.__version__, lines=len(lines))
for name in ("loaded", "reloaded"):
    tok = AutoTokenizer.from_pretrained(folder if name == "loaded" else again)
    if name == "loaded": tok.save_pretrained(again)
    differ, decoded, digest = [], [], hashlib.sha256()
    for i in range(0, len(lines), 20_000):
        part = lines[i:i + 20_000]
        got, want = tok(part, add_special_tokens=False)["input_ids"], sp.encode(part)
        differ += [t for t, a, b in zip(part, want, got) if a != b]
        decoded += [t for t, ids in zip(part[:200], got) if tok.decode(ids) != sp.decode(ids)]
        digest.update(json.dumps(got).encode())
    out[name] = dict(differ=differ[:5], decoded=decoded[:5], ids=digest.hexdigest(), bos=tok("hi").input_ids == [1] + sp.encode("hi"), pad=tok.pad_token_id, eos=tok.eos_token_id)
print(json.dumps(out))
"""


@pytest.fixture(scope='session')
def old_python():
    "Python of an environment with transformers 4.57, made once and kept in the cache folder"
    home = (
        Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
        / 'llama-zh-nb-tests'
        / PACKAGES[0].replace('==', '-')
    )
    exe = home / ('Scripts/python.exe' if os.name == 'nt' else 'bin/python')
    if (home / 'ready').exists():
        return exe
    venv.create(home, with_pip=True, clear=True)
    p = subprocess.run(
        [exe, '-m', 'pip', 'install', '-q', '--disable-pip-version-check', *PACKAGES],
        capture_output=True,
        text=True,
    )
    if p.returncode:
        pytest.skip(
            f'{PACKAGES[0]} cannot be installed here (offline?): {p.stderr.strip().splitlines()[-1][:200] if p.stderr.strip() else p.returncode}'
        )
    (home / 'ready').touch()
    return exe


def over_there(python, folder, lines, tmp):
    "What transformers 4.57 makes of `lines`"
    (tmp / 'lines.json').write_text(json.dumps(lines), encoding='utf-8')
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'VIRTUAL_ENV')} | dict(
        HF_HUB_OFFLINE='1', TRANSFORMERS_VERBOSITY='error'
    )
    p = subprocess.run(
        [python, '-c', CHILD, str(folder), str(tmp / 'lines.json'), str(tmp / 'saved-by-4')],
        capture_output=True,
        text=True,
        env=env,
    )
    assert p.returncode == 0, p.stderr[-2000:]
    return json.loads(p.stdout.splitlines()[-1])


def every_line(shared):
    "All lines of the Chinese and English texts and of the chat files"
    files = [
        *sorted((shared / 'data').glob('text_*/*')),
        *sorted((shared / 'data' / 'sft').glob('*')),
    ]
    return [t for f in files for t in f.read_text(encoding='utf-8', errors='replace').split('\n')]


@pytest.mark.slow
@pytest.mark.parametrize('which', ['llama2', 'merged'])
def test_the_same_ids_in_transformers_4(which, shared, old_python, tmp_path):
    base = shared / 'data' / 'tokenizers' / 'llama2_32000.model'
    if which == 'llama2':
        folder = save_tokenizer(base, tmp_path / 'tok')
    else:
        folder = merge(
            base,
            [],
            tmp_path / 'tok',
            size=55_296,
            corpus=[
                f for f in sorted((shared / 'data' / 'text_zh').glob('*')) if f.suffix == '.txt'
            ],
        ).path
    lines = TYPED + ODD + every_line(shared)
    got = over_there(old_python, folder, lines, tmp_path)
    print(f'transformers {got["version"]}: {got["lines"]:,} lines')
    assert got['version'].startswith('4.57') and got['lines'] == len(lines) > 100_000
    for name in ('loaded', 'reloaded'):
        g = got[name]
        assert (
            g['differ'] == []
            and g['decoded'] == []
            and g['bos']
            and g['eos'] == 2
            and g['pad'] == (0 if which == 'llama2' else 32_000)
        ), (name, g)
    assert got['loaded']['ids'] == got['reloaded']['ids']
    # and here: the same lines, the folder that 4.57 saved, and one saved and reloaded by this version
    load_hf(folder).save_pretrained(tmp_path / 'saved-by-5')
    sp, five = load_sp(folder), load_hf(tmp_path / 'saved-by-5')
    for i in range(0, len(lines), 20_000):
        assert disagreements(sp, five, lines[i : i + 20_000]) == []
    assert disagreements(sp, load_hf(tmp_path / 'saved-by-4'), lines[::20]) == []
