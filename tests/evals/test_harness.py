"harness: EleutherAI's program finds the same numbers"

import pytest

from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.core.settings import EvalArgs
from llama_zh_nb.evals.choice import measure_task
from llama_zh_nb.evals.tasks import read_task


@pytest.mark.slow
def test_lm_eval_finds_the_same_numbers(shared, tmp_path):
    pytest.importorskip('lm_eval')
    from llama_zh_nb.checkpoint.folder import load
    from llama_zh_nb.evals.harness import run_lm_eval, to_lm_eval
    from llama_zh_nb.weights import acquire

    model = load(acquire('mini', tmp_path / 'base'), 'cpu')
    t = read_task(shared / 'data' / 'eval' / 'ceval').only('middle_school_history', 'marxism')
    names = to_lm_eval(t, tmp_path / 'tasks')
    for shots in (0, 1):
        theirs, ours = (
            run_lm_eval(model, names, tmp_path / 'tasks', shots=shots, limit=8),
            measure_task(model, t, EvalArgs(shots=shots, limit=8, spelling='bare')),
        )
        mine = {f'zh_nb_ceval_{x["subject"]}-{x["id"].rsplit("-", 1)[1]}': x for x in ours.rows}
        same = [
            (mine[x['id']], x)
            for x in theirs.rows
            if mine[x['id']]['shots'] == shots and not mine[x['id']]['cut']
        ]
        assert same and all(
            max(abs(a - b) for a, b in zip(x['scores'], y['scores'])) < 1e-3
            and x['choice'] == y['choice']
            for x, y in same
        )
    with pytest.raises(LlamaZhError, match='no task'):
        run_lm_eval(model, 'no_such_task')
