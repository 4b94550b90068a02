"choice: many questions in a row give the scores of one at a time, a killed run goes on, wrong settings are one message"

import json
import math
from pathlib import Path

import pytest
from helpers.byte_model import byte_model
from helpers.made_task import made_task

from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.core.settings import EvalArgs
from llama_zh_nb.evals import choice
from llama_zh_nb.evals.choice import letter_ids, measure_task, option_text
from llama_zh_nb.evals.tasks import LETTERS, read_task, world_task

torch = pytest.importorskip('torch')


@pytest.fixture(scope='module')
def tiny():
    return byte_model()


@torch.no_grad()
def plain(model, tok, text):
    "One prompt, one forward, no cache"
    ids = [tok.bos_token_id] + tok(text, add_special_tokens=False)['input_ids']
    return ids, model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize('shots,budget', [(0, 16_384), (2, 16_384), (2, 600), (3, 1)])
def test_letters_equal_one_prompt_at_a_time(tiny, shots, budget):
    task = made_task()
    r = measure_task(tiny, task, EvalArgs(shots=shots), budget=budget)
    assert [x['id'] for x in r.rows] == [q.id for v in task.subjects.values() for q in v]
    assert not r.settings['cut'] and {x['shots'] for x in r.rows} == {shots}
    for x in r.rows:
        _, lp = plain(*tiny, r.heads[x['subject']] + x['prompt'])
        want = [lp[-1, i].item() for i in letter_ids(tiny[1], len(x['options']))[0]]
        assert max(abs(a - b) for a, b in zip(want, x['scores'])) < 1e-4 and len(want) == len(
            x['scores']
        )
        assert x['choice'] == LETTERS[max(range(len(want)), key=want.__getitem__)] and x[
            'right'
        ] == (x['choice'] == x['answer'])


@pytest.mark.parametrize('shots,budget', [(0, 16_384), (2, 900)])
def test_options_equal_one_text_at_a_time(tiny, shots, budget):
    task = made_task(5)
    r = measure_task(tiny, task, EvalArgs(shots=shots, by='text'), budget=budget)
    qs = {q.id: q for v in task.subjects.values() for q in v}
    for x in r.rows:
        q, want = qs[x['id']], []
        whole = [plain(*tiny, r.heads[x['subject']] + option_text(task, q, o)) for o in q.options]
        start = choice.shared_length([i for i, _ in whole])
        for (ids, lp), o in zip(whole, q.options):
            want.append(
                sum(
                    lp[j - 1, ids[j]].item()
                    for j in range(min(start, min(len(i) for i, _ in whole) - 1), len(ids))
                )
                / len(o)
            )
        assert max(abs(a - b) for a, b in zip(want, x['scores'])) < 1e-4


def test_both_spellings_are_added():
    sp = pytest.importorskip('llama_zh_nb.weights')
    import tempfile

    from llama_zh_nb.checkpoint.folder import load

    with tempfile.TemporaryDirectory() as d:
        model, tok = load(sp.acquire('mini', Path(d) / 'base'), 'cpu')
    assert [tok.convert_ids_to_tokens(r) for r in letter_ids(tok)] == [
        list('ABCD'),
        ['▁A', '▁B', '▁C', '▁D'],
    ]
    t = world_task('zh').only('river')
    both, bare, space = (
        measure_task((model, tok), t, EvalArgs(spelling=s, limit=3)).rows
        for s in ('both', 'bare', 'space')
    )
    for a, b, c in zip(both, bare, space):
        for x, y, z in zip(a['scores'], b['scores'], c['scores']):
            assert abs(math.exp(x) - math.exp(y) - math.exp(z)) < 1e-4


def test_too_long_prompts_lose_examples_then_their_middle(tiny):
    task = made_task(4)
    r = measure_task(tiny, task, EvalArgs(shots=3), max_len=340)
    assert (
        {x['shots'] for x in r.rows} & {1, 2}
        and 3 not in {x['shots'] for x in r.rows}
        and r.settings['fewer'] == len(r.rows)
        and not r.settings['cut']
    )
    r = measure_task(tiny, task, max_len=60)
    assert r.settings['cut'] == len(r.rows) and all(
        len(x['scores']) == len(x['options']) for x in r.rows
    )
    assert 'lost their middle' in repr(r) and 'lost their middle' in r._repr_html_()


def test_a_killed_run_goes_on(tiny, tmp_path, monkeypatch):
    task, real, asked = made_task(), choice.score_options, []

    def dies(model, task, qs, ids, *a):
        for k, x in enumerate(real(model, task, qs, ids, *a)):
            if qs[0].subject == 'logic' and k == 2:
                raise KeyboardInterrupt
            asked.append(qs[x[0]].id)
            yield x

    whole = measure_task(tiny, task, name='m')
    monkeypatch.setattr(choice, 'score_options', dies)
    with pytest.raises(KeyboardInterrupt):
        measure_task(tiny, task, out=tmp_path, name='m')
    assert len(asked) == 9 and not list(tmp_path.glob('*[0-9a-f].json'))
    with next(tmp_path.glob('*.rows.jsonl')).open('a') as f:
        f.write('{"id": "torn')
    again = []
    monkeypatch.setattr(
        choice,
        'score_options',
        lambda model, task, qs, *a: (
            again.append(qs[x[0]].id) or x for x in real(model, task, qs, *a)
        ),
    )
    r = measure_task(tiny, task, out=tmp_path, name='m')
    assert not set(again) & set(asked) and len(again) + len(asked) == 14
    assert [(x['id'], x['choice']) for x in r.rows] == [(x['id'], x['choice']) for x in whole.rows]
    again.clear()
    assert (
        measure_task(tiny, task, out=tmp_path, name='m').to_dict() == r.to_dict() and not again
    )  # finished: read back
    measure_task(tiny, task, EvalArgs(shots=1), out=tmp_path, name='m')
    assert (
        len(again) == 14 and len(list(tmp_path.glob('*.json'))) == 2
    )  # other settings, other file


def test_the_result_keeps_its_evidence_and_names_its_means(tiny, tmp_path):
    r = measure_task(tiny, made_task(), EvalArgs(shots=1), out=tmp_path, name='m')
    d = json.loads(next(tmp_path.glob('*.json')).read_text())
    assert (
        d['settings']['extraction']
        and d['settings']['spelling'] == [list('ABCD')]
        and d['rows'][0]['prompt']
        and d['heads']['law'].startswith('以下是中国关于法学考试的单项选择题')
    )
    assert (
        set(d['subjects']) == {'law', 'logic'}
        and set(d['groups']) == {'A', 'B'}
        and d['groups']['A']['n'] == 14
    )
    assert (
        d['micro']['lo'] <= d['micro']['share'] <= d['micro']['hi']
        and 'macro' in repr(r)
        and 'micro' in repr(r)
    )


WRONG = [
    (dict(shots=-1), 'shots'),
    (dict(limit=0), 'limit'),
    (dict(form='x'), 'form'),
    (dict(by='x'), 'by'),
    (dict(shots=9), '9 examples'),
    (dict(spelling='x'), 'spelling'),
    (dict(spelling='space'), 'single pieces'),
]


@pytest.mark.parametrize('wrong,message', WRONG)
def test_wrong_settings(tiny, wrong, message):
    with pytest.raises(LlamaZhError, match=message):
        measure_task(tiny, made_task(), EvalArgs(**wrong))


@pytest.mark.parametrize(
    'wrong,message', [(dict(max_len=3), 'max_len'), (dict(budget=0), 'budget')]
)
def test_wrong_lengths(tiny, wrong, message):
    with pytest.raises(LlamaZhError, match=message):
        measure_task(tiny, made_task(), **wrong)


def test_a_file_in_the_place_of_the_results(tiny, tmp_path):
    (tmp_path / 'out').write_text('x')
    with pytest.raises(LlamaZhError, match='cannot make the folder'):
        measure_task(tiny, made_task(), out=tmp_path / 'out')


def test_nan_is_refused(tiny):
    import copy

    m = copy.deepcopy(tiny[0])
    m.lm_head.weight.data[3] = float('nan')
    with pytest.raises(LlamaZhError, match='NaN'):
        measure_task((m, tiny[1]), made_task())


def test_ceval_on_a_real_model_agrees_with_a_plain_forward(shared):
    from llama_zh_nb.checkpoint.folder import load

    model, tok = load(shared / 'data' / 'models' / 'stories260K_hf', 'cpu')
    t = read_task(shared / 'data' / 'eval' / 'ceval')
    for shots, form in ((0, 'base'), (5, 'base'), (0, 'chat')):
        r = measure_task(
            (model, tok),
            t.only('marxism', 'middle_school_history'),
            EvalArgs(shots=shots, form=form, limit=2, spelling='bare'),
        )
        for x in r.rows:
            if x['cut'] or form == 'chat' or x['shots'] < shots:
                continue
            text = r.heads[x['subject']] + x['prompt']
            ids = [tok.bos_token_id] + tok(
                text, add_special_tokens=False, split_special_tokens=True
            )['input_ids']
            with torch.no_grad():
                lp = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            assert (
                max(
                    abs(lp[i].item() - s)
                    for i, s in zip(letter_ids(tok, spelling='bare')[0], x['scores'])
                )
                < 1e-3
            )
        assert len(r.rows) == 4 and r.settings['chance'] == 0.25
