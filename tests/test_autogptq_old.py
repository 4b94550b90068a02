"""The GPTQ folder we write, read by the archived auto-gptq 0.7.1 in an environment of its own: the same perplexity."""

import json
import math
import os
import subprocess
import venv
from pathlib import Path

import pytest

PACKAGES = [
    'torch==2.13.0',
    'auto-gptq==0.7.1',
    'transformers==4.57.6',
    'peft==0.17.1',
    'accelerate',
    'safetensors',
    'sentencepiece',
    'protobuf',
    'datasets',
    'gekko',
    'rouge',
    'pandas',
    'setuptools<81',
    'numpy<2.3',
]

# Runs over there, where nothing of ours is installed: folder, file of lists of ids
CHILD = """
import json, sys, torch, auto_gptq, transformers
from auto_gptq import AutoGPTQForCausalLM
folder, ids = sys.argv[1:]
model = AutoGPTQForCausalLM.from_quantized(folder, device="cpu", use_safetensors=True)
nll = n = 0
for x in json.load(open(ids)):
    x = torch.tensor([x])
    with torch.inference_mode(): z = model(input_ids=x).logits.float()
    nll += torch.nn.functional.cross_entropy(z[0, :-1], x[0, 1:], reduction="sum").item(); n += x.shape[1] - 1
print("RESULT " + json.dumps(dict(nll=nll/n, version=auto_gptq.__version__, transformers=transformers.__version__)))
"""


@pytest.fixture(scope='module')
def old_python():
    "Python of an environment with auto-gptq 0.7.1, made once and kept in the cache folder"
    home = (
        Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
        / 'llama-zh-nb-tests'
        / 'auto-gptq-0.7.1'
    )
    exe = home / ('Scripts/python.exe' if os.name == 'nt' else 'bin/python')
    if (home / 'ready').exists():
        return exe
    venv.create(home, with_pip=True, clear=True)
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | dict(BUILD_CUDA_EXT='0')
    res = subprocess.run(
        [exe, '-m', 'pip', 'install', '-q', 'torch==2.13.0', 'setuptools<81', 'wheel', 'numpy<2.3'],
        capture_output=True,
        text=True,
        env=env,
    )
    res = (
        res
        if res.returncode
        else subprocess.run(
            [exe, '-m', 'pip', 'install', '-q', '--no-build-isolation', *PACKAGES],
            capture_output=True,
            text=True,
            env=env,
        )
    )
    if res.returncode:
        pytest.skip(
            f'auto-gptq 0.7.1 could not be installed here: {(res.stderr or res.stdout)[-600:]}'
        )
    (home / 'ready').touch()
    return exe


@pytest.mark.slow
def test_auto_gptq_reads_our_folder(old_python, tested_run, tmp_path):
    torch = pytest.importorskip('torch')
    from llama_zh_nb.checkpoint.folder import load

    model, tok = load(tested_run / 'gptq', 'cpu')
    held = [
        json.loads(line)['text']
        for line in (tested_run / 'world' / 'heldout_zh.jsonl')
        .read_text(encoding='utf-8')
        .splitlines()
    ][:30]
    ids = [[tok.bos_token_id, *tok(t, add_special_tokens=False)['input_ids']][:250] for t in held]
    nll = n = 0
    for x in ids:
        with torch.inference_mode():
            z = model(input_ids=torch.tensor([x])).logits.float()
        nll += torch.nn.functional.cross_entropy(
            z[0, :-1], torch.tensor(x[1:]), reduction='sum'
        ).item()
        n += len(x) - 1
    (tmp_path / 'ids.json').write_text(json.dumps(ids), encoding='utf-8')
    res = subprocess.run(
        [old_python, '-c', CHILD, tested_run / 'gptq', tmp_path / 'ids.json'],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'},
    )
    line = next((line for line in res.stdout.splitlines() if line.startswith('RESULT ')), None)
    assert line, res.stderr[-3000:]
    got = json.loads(line[7:])
    assert got['version'] == '0.7.1'
    assert math.exp(got['nll']) == pytest.approx(
        math.exp(nll / n), rel=2e-3
    )  # auto-gptq computes in float16 here and there
