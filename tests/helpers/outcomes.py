"""What is read from a run on mini, by name, and what it may not miss: the table of tests/test_outcomes.py.

python tests/helpers/outcomes.py RUN_FOLDER      # the values of a run beside the table, to fill it in anew
"""

import sys
from pathlib import Path
from typing import NamedTuple

from llama_zh_nb.core.errors import read_json
from llama_zh_nb.training.trainer import History


class Bound(NamedTuple):
    "What a run must reach, and what was measured when it was set"

    measured: float  # on two cores; shares: the end of the interval that is judged
    limit: float  # close to what was measured, so that the test can fail
    at_least: bool  # else at most
    why: str


# Shares are judged by the lower end of their 95 % interval where they must be high, by the upper end
# where they must be low. Limits lie within a tenth of what was measured (shares: 0.06).
BOUNDS = {
    'bits per Chinese character, pretrained to base': Bound(
        0.455, 0.49, False, 'reading Chinese halves what a character costs'
    ),
    'bits per Chinese character, new vocabulary to old at equal compute': Bound(
        0.655, 0.72, False, 'the new pieces are worth it: the control keeps the old vocabulary'
    ),
    'bits per English byte, worst stage to base': Bound(
        0.775, 0.85, False, 'English is kept, and on mini it even gains'
    ),
    'Chinese characters per token, new vocabulary to old': Bound(
        2.685, 2.60, True, 'a token holds more than twice as much'
    ),
    'asked facts right': Bound(
        0.845, 0.79, True, 'facts asked in wordings that no training text holds'
    ),
    'asked facts lost by four bits': Bound(
        0.022, 0.05, False, 'share of right answers, before and after quantizing'
    ),
    'bytes in four bits to before': Bound(
        0.563, 0.58, False, 'embeddings and head stay as they are, so not a quarter'
    ),
    'unseen facts right without documents': Bound(
        0.042, 0.08, False, 'nobody can know what no text has said'
    ),
    'unseen facts right with documents': Bound(
        0.498, 0.44, True, 'the document assistant reads them out of the handbooks'
    ),
}


def stage_metrics(run) -> dict:
    "{stage: what it measured} of a run folder"
    stages = read_json(Path(run) / 'run.json')['stages']
    return {name: stage['metrics'] for name, stage in stages.items()}


def new_to_old_at_equal_compute(m):
    new, old = History(m['pretrain']['history']), History(m['control']['history'])
    return new.at('zh_bpc', flops=old.last('flops')) / old.last('zh_bpc')


def measured(m) -> dict:
    "The values that `BOUNDS` speaks of, by name; what needs a stage that `m` lacks is left out"
    values = {}
    if 'vocab' in m:
        values['Chinese characters per token, new vocabulary to old'] = (
            m['vocab']['zh_after'] / m['vocab']['zh_before']
        )
    if 'pretrain' in m:
        values['bits per Chinese character, pretrained to base'] = (
            m['pretrain']['bpc_zh'] / m['weights']['bpc_zh']
        )
    if 'control' in m:
        values['bits per Chinese character, new vocabulary to old at equal compute'] = (
            new_to_old_at_equal_compute(m)
        )
    if 'quantize' in m:
        values['bytes in four bits to before'] = (
            m['quantize']['bytes_after'] / m['quantize']['bytes_before']
        )
    if 'rag' in m:
        values['unseen facts right with documents'] = m['rag']['accuracy']['unseen']['lo']
    if 'sft' in m:
        known = m['sft']['accuracy']
        values['bits per English byte, worst stage to base'] = (
            max(m['pretrain']['bpb_en'], m['sft']['bpb_en']) / m['weights']['bpb_en']
        )
        values['asked facts right'] = known['asked']['lo']
        values['unseen facts right without documents'] = known['unseen']['hi']
        values['asked facts lost by four bits'] = (
            known['asked']['share'] - m['quantize']['accuracy']['asked']['share']
        )
    return values


def main():
    values = measured(stage_metrics(sys.argv[1]))
    for name, bound in BOUNDS.items():
        now = f'{values[name]:.3f}' if name in values else 'none'
        sign = '>=' if bound.at_least else '<='
        print(f'{now:>8}  {sign} {bound.limit:<6} measured {bound.measured:<6} {name}')


if __name__ == '__main__':
    main()
