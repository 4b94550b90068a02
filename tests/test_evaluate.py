"evaluate: the page of several models, and the command"

import json

import pytest
from helpers.byte_model import byte_model
from helpers.made_task import made_task

from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.core.settings import EvalArgs
from llama_zh_nb.evals.bits import compare_bits
from llama_zh_nb.evals.choice import measure_task
from llama_zh_nb.evals.compare import changed_answers, comparison_html, result_lines
from llama_zh_nb.evals.tasks import world_task, write_task
from llama_zh_nb.evaluate import evaluate_models

torch = pytest.importorskip('torch')


@pytest.fixture(scope='module')
def tiny():
    return byte_model()


def test_the_page(tiny):
    a, b = (measure_task(tiny, made_task(), EvalArgs(shots=s), name=f'<{s}>') for s in (0, 0))
    b.settings['model'] = 'b&c'
    page = comparison_html([a, b, compare_bits({'b&c': tiny}, {'zh': ['秋天的湖水', '很静']})])
    assert (
        '&lt;0&gt;' in page
        and '<0>' not in page
        and 'b&amp;c' in page
        and '28.2 / 36.0' in page
        and '–' in page
        and '瞎猜' in page
    )
    assert (
        comparison_html(json.loads(json.dumps(result_lines([a, b]))), published=False).count('<svg')
        == 2
    )
    assert changed_answers(a, b)['lost'] == 0


def test_the_command(tmp_path):
    from llama_zh_nb.weights import acquire

    base = acquire('mini', tmp_path / 'base')
    (tmp_path / 'text.txt').write_text('秋天的湖水很静。\n' * 5)
    write_task(tmp_path / 'mine', world_task('zh').only('river', 'animal'))
    args = EvalArgs(tasks=(str(tmp_path / 'mine'),), limit=1, shots=1)
    text = [str(tmp_path / 'text.txt')]
    c = evaluate_models([base], args, text=text, out=str(tmp_path / 'out'), device='cpu')
    assert [x['task'] for x in c.lines] == [
        'world-zh, 1-shot, base, by letter',
        'world-en, 0-shot, base, by text',
        'text, bits per character',
        'English sample, bits per byte',
    ]
    page = (tmp_path / 'out' / 'comparison.html').read_text()
    assert page.startswith('<!DOCTYPE html>') and 'Evaluation' in page and '<svg' in page
    saved = json.loads((tmp_path / 'out' / 'comparison.json').read_text())
    assert [x['task'] for x in saved['lines']] == [x['task'] for x in c.lines]
    for args, text, message in (
        (EvalArgs(tasks=('cevall',)), None, 'no task'),
        (EvalArgs(), ['none.txt'], 'no such text'),
        (EvalArgs(window=2), None, 'window is 2'),
    ):
        with pytest.raises(LlamaZhError, match=message):
            evaluate_models([base], args, text=text, out=str(tmp_path / 'no'))
    assert not (tmp_path / 'no').exists()
