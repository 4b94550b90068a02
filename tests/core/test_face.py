"the package's face: every name it offers is there, and nothing is loaded before it is used"

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import llama_zh_nb

PLACES = llama_zh_nb._PLACES
PACKAGE = Path(llama_zh_nb.__file__).parent


@pytest.mark.parametrize('name', sorted(PLACES))
def test_every_name_is_what_the_table_says(name):
    module, _, attribute = PLACES[name].rpartition('.')
    there = getattr(importlib.import_module(f'llama_zh_nb.{module}'), attribute)
    assert getattr(llama_zh_nb, name) is there and there.__doc__


def test_no_name_is_a_module_too():
    "Once a stage's module is imported it would win over the name"
    assert not [n for n in PLACES if (PACKAGE / f'{n}.py').exists() or (PACKAGE / n).is_dir()]


def test_unknown_names():
    assert set(PLACES) <= set(dir(llama_zh_nb)) and llama_zh_nb.__version__
    with pytest.raises(AttributeError, match='no attribute'):
        llama_zh_nb.merge_vocabs  # noqa: B018 - asking is the test
    with pytest.raises(ImportError):
        from llama_zh_nb import merge_vocabs  # noqa: F401


def test_nothing_is_loaded_before_it_is_used():
    code = (
        'import sys; before = set(sys.modules); import llama_zh_nb; dir(llama_zh_nb); '
        'print(sorted(m for m in set(sys.modules) - before if m.partition(".")[0] not in sys.stdlib_module_names))'
    )
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert p.stdout.strip() == "['llama_zh_nb']", p.stdout + p.stderr
    code = "import sys; from llama_zh_nb import get_recipe, TrainArgs; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert p.stdout.strip() == '[]', p.stdout + p.stderr
