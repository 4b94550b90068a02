"""How a run's chat model does on each wording of the test questions: exact answers to every third fact that was asked in training.

python benchmarks/wordings.py runs/mini/chat [--split dev] [--json out.json]"""

import argparse
import json
from pathlib import Path

from llama_zh_nb.checkpoint.folder import load
from llama_zh_nb.evals.measure import ask
from llama_zh_nb.mini.world import Scribe, read_facts, split_facts


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('model', help='folder of a chat model that learned the world of mini')
    p.add_argument('--split', default='test', choices=('test', 'dev'))
    p.add_argument('--json', type=Path)
    a = p.parse_args()
    facts = split_facts(read_facts())
    scribe = Scribe('zh', facts, split=a.split)
    asked = [f for f in facts if f.split == 'asked'][::3]
    model, tok = load(a.model)
    rows = {}
    for form in scribe.forms('ask'):
        questions = [scribe.fill(form, f) for f in asked]
        answers = ask(model, tok, questions, max_new_tokens=24, batch=64)
        rows[form] = sum(x == scribe.answer(f) for x, f in zip(answers, asked))
        print(f'{rows[form]:4} of {len(asked)}  {form}', flush=True)
    print(f'{sum(rows.values()):4} of {len(rows) * len(asked)}  all')
    if a.json:
        a.json.write_text(
            json.dumps(dict(of=len(asked), right=rows), ensure_ascii=False, indent=1) + '\n',
            encoding='utf-8',
        )


if __name__ == '__main__':
    main()
