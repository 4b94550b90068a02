"What a run on mini must show, read from the run that the notebooks made just before. The table of limits stands in helpers/outcomes.py."

import pytest
from helpers.outcomes import BOUNDS, measured, stage_metrics


@pytest.fixture(scope='module')
def m(tested_run):
    return stage_metrics(tested_run)


@pytest.mark.parametrize('name', BOUNDS)
def test_a_run_reaches(m, name):
    bound, value = BOUNDS[name], measured(m)[name]
    reached = value >= bound.limit if bound.at_least else value <= bound.limit
    sign = 'at least' if bound.at_least else 'at most'
    assert reached, (
        f'{name} is {value:.3f}, {sign} {bound.limit} was expected ({bound.measured} was measured '
        f'when this was set): {bound.why}'
    )


@pytest.mark.parametrize('name', BOUNDS)
def test_limits_can_fail(name):
    "A limit lies on the right side of what was measured, and close to it"
    bound = BOUNDS[name]
    slack = bound.measured - bound.limit if bound.at_least else bound.limit - bound.measured
    assert 0 < slack <= max(0.1 * bound.measured, 0.06)


def test_vocabulary(m):
    vocab = m['vocab']
    assert vocab['dead'] == 0 and vocab['en_after'] == vocab['en_before']


def test_enough_was_asked(m):
    closed, with_documents = m['sft']['accuracy'], m['rag']['accuracy']
    assert closed['asked']['n'] > 500
    assert with_documents['unseen']['n'] == closed['unseen']['n'] > 80


def test_report_and_notebooks_are_there(tested_run):
    page = (tested_run / 'report.html').read_text(encoding='utf-8')
    assert 'A Llama learns Chinese' in page
    assert not any(x in page for x in ('src="http', "src='http", '<link'))
    assert len(list((tested_run / 'notebooks').rglob('*.ipynb'))) >= 60
