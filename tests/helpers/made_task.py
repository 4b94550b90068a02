"""A made-up task of two subjects with questions of different lengths, some with a blank."""

from llama_zh_nb.evals.tasks import Question, Task


def made_task(n=7, k=3, options=4, style='ceval'):
    "`n` questions and `k` examples in each of two subjects"

    def question(s, i):
        text = f'{s}第{i}题' + '呀' * (i * 5 % 7) + ('____。' if i % 2 else '？')
        shown = [f'{"甲乙丙丁戊"[j]}{"x" * ((i + j) % 3)}' for j in range(options - (i % 2))]
        return Question(f'{s}-{i}', s, text, tuple(shown), i % (options - 1))

    subjects = ('law', 'logic')
    return Task(
        'made',
        {s: [question(s, i) for i in range(n)] for s in subjects},
        {s: [question(s, 100 + i) for i in range(k)] for s in subjects},
        {'law': '法学', 'logic': '逻辑'},
        {'law': ['A'], 'logic': ['A', 'B']},
        style,
    )
