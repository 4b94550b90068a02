"""What all tests share: no network, few threads, the `slow` marker, and where the wider test data lies."""

import os
from pathlib import Path

import pytest

os.environ['HF_HUB_OFFLINE'] = '1'
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
for _v in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'):
    os.environ.setdefault(_v, '2')

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    parser.addoption(
        '--slow', action='store_true', default=False, help='also run the tests marked slow'
    )


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes minutes; run with --slow (make test-all)')


LONG = [
    'test_distributed.py',
    'test_launch.py',
    'test_site.py',
    'test_run.py',
    'test_serve.py',
    'test_chat.py',
]  # first, so that two processes end at about the same time


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda i: LONG.index(i.path.name) if i.path.name in LONG else len(LONG))
    if config.getoption('--slow'):
        return
    skip = pytest.mark.skip(reason='slow: run with --slow (make test-all)')
    for item in items:
        if 'slow' in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope='session')
def root():
    "The repository's root."
    return ROOT


@pytest.fixture(scope='session')
def shared():
    "Folder of real and hostile test data, kept beside the repository because its licences differ from ours."
    p = Path(os.environ.get('LLAMA_ZH_SHARED') or ROOT.parent / 'shared')
    if not (p / 'data').is_dir():
        pytest.skip(
            f'test data not found at {p}: set LLAMA_ZH_SHARED to the folder that holds data/'
        )
    return p


@pytest.fixture(scope='session')
def tested_run(root):
    "The run folder that `make test` made with the notebooks before the tests: run.json, report.html, notebooks/ and every stage's folder."
    p = root / 'runs' / 'test' / 'mini'
    if not (p / 'run.json').exists():
        pytest.skip(
            f'no run at {p}: `make test` makes it; or run tools/run_notebooks.py --runs runs/test --report'
        )
    return p
