"""Sdist and wheel build and carry mini; a fresh environment gets the command; importing the package stays light."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = {
    p.relative_to(ROOT).as_posix()
    for p in (ROOT / 'llama_zh_nb' / 'data').rglob('*')
    if p.is_file() and '.partial-' not in p.name
}
HEAVY = [
    'torch',
    'transformers',
    'peft',
    'datasets',
    'accelerate',
    'trl',
    'langchain',
    'langchain_core',
    'gptqmodel',
    'matplotlib',
    'jieba',
    'sentencepiece',
    'tokenizers',
    'safetensors',
    'huggingface_hub',
    'numpy',
    'pandas',
    'pyarrow',
]


def sh(*cmd, cwd=None, **env):
    res = subprocess.run(
        list(map(str, cmd)), cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert res.returncode == 0, f'{cmd}\n{res.stdout}{res.stderr}'
    return res.stdout


@pytest.fixture(scope='module')
def dist(tmp_path_factory):
    "`(sdist, wheel)`, the wheel built from the sdist, without network."
    out = tmp_path_factory.mktemp('dist')
    sh(sys.executable, '-m', 'build', '--no-isolation', '--outdir', out, ROOT)
    return next(out.glob('*.tar.gz')), next(out.glob('*.whl'))


def test_sdist_carries_what_it_needs(dist):
    with tarfile.open(dist[0]) as t:
        names = {n.partition('/')[2] for n in t.getnames()}
    assert {
        'settings.ini',
        'setup.py',
        'LICENSE',
        'README.md',
        'llama_zh_nb/core/errors.py',
    } <= names
    assert DATA and names >= DATA


def test_wheel_carries_mini_and_nothing_else(dist):
    names = set(zipfile.ZipFile(dist[1]).namelist())
    assert names >= DATA
    assert {n.split('/')[0] for n in names if '.dist-info' not in n} == {'llama_zh_nb'}
    assert any(n.endswith('licenses/LICENSE') for n in names)


def test_fresh_environment_gets_the_command(dist, tmp_path, monkeypatch):
    "Only the wheel is installed there; what it requires is borrowed from this environment, so that no network is needed."
    venv.create(tmp_path / 'env', with_pip=True)
    py = tmp_path / 'env' / 'bin' / 'python'
    # a checkout on the caller's path would be found before what is installed
    monkeypatch.delenv('PYTHONPATH', raising=False)
    sh(py, '-m', 'pip', 'install', '--no-deps', '--no-index', dist[1])
    site = sh(py, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').strip()
    import yaml

    (Path(site) / 'borrowed.pth').write_text(str(Path(yaml.__file__).parent.parent))
    where = sh(py, '-c', 'import llama_zh_nb; print(llama_zh_nb.__file__)', cwd=tmp_path).strip()
    assert where.startswith(site)
    assert 'run' in sh(tmp_path / 'env' / 'bin' / 'llama-zh', '--help', cwd=tmp_path)


@pytest.mark.parametrize('what', ['llama_zh_nb', 'llama_zh_nb.app.cli'])
def test_import_is_light(what):
    loaded = sh(sys.executable, '-c', f'import sys, {what}; print(*sys.modules)').split()
    assert [h for h in HEAVY if h in loaded] == []


def test_every_module_imports_without_the_big_ones():
    "langchain_core and pydantic are needed at the top by the modules that are made of their classes."
    package = ROOT / 'llama_zh_nb'
    files = [p for p in sorted(package.rglob('*.py')) if p.name != '_modidx.py']
    names = ['.'.join(p.relative_to(ROOT).with_suffix('').parts) for p in files]
    modules = [n.removesuffix('.__init__') for n in names]
    assert len(modules) > 70
    loaded = sh(sys.executable, '-c', f'import sys, {", ".join(modules)}; print(*sys.modules)')
    big = 'torch transformers peft datasets trl langchain gptqmodel matplotlib'.split()
    assert [b for b in big if b in loaded.split()] == []


def test_version_is_the_same_everywhere(dist):
    import llama_zh_nb

    assert (
        f'-{llama_zh_nb.__version__}' in dist[0].name
        and f'-{llama_zh_nb.__version__}-' in dist[1].name
    )
