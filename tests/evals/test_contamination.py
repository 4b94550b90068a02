"contamination: planted questions of a real benchmark are found, others not"

from llama_zh_nb.evals.choice import TaskResult
from llama_zh_nb.evals.contamination import find_leaks, word_units
from llama_zh_nb.evals.tasks import read_task


def test_planted_leaks_of_a_real_benchmark_are_found(shared):
    t = read_task(shared / 'data' / 'eval' / 'ceval').only('marxism', 'physician')
    qs = [q for v in t.subjects.values() for q in v]
    long = [q for q in qs if len(word_units(q.question)) >= 20][:5]
    clean = find_leaks(t, ['春天来了，柳树发芽。' * 20, 'Nothing of it is here.'])
    assert not clean.found
    leaky = find_leaks(
        t, [f'题库（{i}）：{q.question.replace("，", " ")}选{q.answer}' for i, q in enumerate(long)]
    )
    assert (
        {q.id for q in long} <= leaky.found
        and leaky.count('clean') > 0
        and leaky.rows[0]['subject'] in t.subjects
    )
    r = TaskResult(
        dict(task=t.name, model='m', shots=0, form='base', by='letter'),
        [dict(id=q.id, subject=q.subject, right=q.id in leaky.found) for q in qs],
    )
    b = leaky.beside(r)
    assert b['found']['share'] == 1 and b['not found']['share'] == 0 and b['all']['n'] == len(qs)
