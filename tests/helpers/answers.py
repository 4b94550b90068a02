"""A chat model, questions for it, and the answers that it gives when nobody else asks."""

from llama_zh_nb.evals.measure import greedy
from llama_zh_nb.text.templates import find_template, write_template
from llama_zh_nb.weights import acquire

N = 24  # new tokens


def chat_folder(root, folder):
    "The chat folder that the notebooks made, or else the packaged base with a template"
    made = root / 'runs' / 'test' / 'mini' / 'chat'
    if (made / 'chat_template.jinja').is_file():
        return made
    return write_template(acquire('mini', folder / 'base'), 'alpaca2')


def user(*texts):
    return [dict(role=('user', 'assistant')[i % 2], content=t) for i, t in enumerate(texts)]


def known_answers(mini):
    "{question: its greedy answer, made without our engine}"
    form = [
        'What is the capital of {}?',
        '{}的首都是哪里？',
        'Tell me about {}.',
        '请介绍一下{}。',
        'Where is {}?',
        "What is {}'s currency?",
    ]
    qs = [
        f.format(w)
        for w in ['France', 'Japan', 'Egypt', 'Kenya', 'Peru', 'Italy', '法国', '日本', '中国']
        for f in form
        if w.isascii() == f.isascii()
    ]
    t, out = find_template(mini[1]), {}
    for q, a in zip(qs, greedy(*mini, [t.encode(mini[1], user(q), True).ids for q in qs], N)):
        if '\ufffd' not in a and len(a) > 8:
            out[q] = a  # the base without Chinese writes broken characters there
    assert len(out) > 10
    return out
