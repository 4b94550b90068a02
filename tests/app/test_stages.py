"stages: what is watched follows from the settings classes, and a folder of an earlier version opens"

import ast
import json
from dataclasses import fields
from pathlib import Path

import pytest

from llama_zh_nb.app.pipeline import STAGES
from llama_zh_nb.app.run import plan
from llama_zh_nb.app.stages import Run, file_sums, stage_inputs, verdict, watched
from llama_zh_nb.core.errors import write_json
from llama_zh_nb.core.settings import flatten, groups, settings, unpack_type
from llama_zh_nb.recipes import get_recipe

NOTEBOOKS = Path(__file__).parent.parent.parent / 'nbs'
# settings that no stage watches though they do not say how: files are watched by their content,
# held-out texts only measure, and the run's own name and folder are no input
NOT_WATCHED = {'name', 'out', 'base', 'corpus', 'replay_corpus', 'sft', 'docs', 'questions'}
NOT_WATCHED |= {'heldout_zh', 'heldout_en'}


@pytest.fixture
def finished(tmp_path):
    "A recipe whose stages are all done, as far as run.json knows"
    text = tmp_path / 'in.txt'
    text.write_text('春江潮水连海平，海上明月共潮生。', encoding='utf-8')
    chats = tmp_path / 'c.json'
    chats.write_text(json.dumps([dict(instruction='在吗？', output='在。')]), encoding='utf-8')
    recipe = get_recipe(
        'mini', corpus=text, sft=chats, docs=text, tasks='world-zh', out=tmp_path / 'run'
    )
    finish(recipe)
    return recipe


def finish(recipe, only_fields=None):
    "Write run.json as if every stage were done; with `only_fields` as a version that watched only those"
    run, log = Run(recipe), {}
    for name, stage in STAGES.items():
        (run / stage.out).mkdir(exist_ok=True)
        (run / stage.out / 'x').write_text(name)
    for name, stage in STAGES.items():
        inputs = stage_inputs(run, stage)
        if only_fields:
            inputs['fields'] = {k: flatten(recipe)[k] for k in only_fields[name].split()}
        log[name] = dict(made='k', done='k', inputs=inputs, outputs=file_sums(run / stage.out))
    write_json(run / 'run.json', {'stages': log, 'recipe': flatten(recipe)})


def todo(recipe):
    "{stage: why} of what is not done"
    run = Run(recipe)
    verdicts = {n: verdict(run, s, stage_inputs(run, s)) for n, s in STAGES.items()}
    return {name: v.why for name, v in verdicts.items() if v.what != 'done'}


def other_value(name, value):
    "Another value that the setting may have"
    kind, choices, _ = unpack_type(settings()[name].type)
    if choices:
        return next(c for c in choices if c != value)
    if kind is bool:
        return not value
    if kind in (int, float):
        step = 8 * 3 if 'batch' in name else 1  # a global batch is a multiple of the batch
        return kind((value or 0) * 2 + step)
    if kind is tuple:
        return (*value, 'other')
    return f'{value}x'


def test_nothing_is_done_again_without_a_change(finished):
    assert todo(finished) == {}
    assert {row.why for row in plan(finished) if row.what == 'done'} == {'unchanged'}


@pytest.mark.parametrize('name', sorted(set(settings()) - NOT_WATCHED))
def test_a_change_of_any_setting_is_seen_unless_it_says_how(finished, name):
    changed = get_recipe(finished, **{name: other_value(name, flatten(finished)[name])})
    again = todo(changed)
    if settings()[name].how:
        assert again == {}
    else:
        assert again and set(again.values()) == {f'{name} changed'}


def test_settings_that_were_forgotten_once(finished):
    "Changing them on a finished run was answered `skipped: unchanged`"
    for kw, stages in (
        (dict(global_batch=16), {'pretrain', 'control'}),
        (dict(sft_global_batch=16), {'sft'}),
        (dict(system='Be brief.'), {'sft', 'quantize', 'rag', 'evaluate'}),
        (dict(control_steps=300), {'control'}),
        (dict(max_steps=700), {'pretrain'}),
    ):
        assert set(todo(get_recipe(finished, **kw))) == stages, kw


# what the version before settings classes wrote into run.json
_TRAINED = 'lora_r lora_alpha lora_dropout load_in_4bit warmup weight_decay seed dtype '
_PRETRAIN = _TRAINED + (
    'train block batch accum lr embed_lr epochs replay eval_every save_every '
    'mix_documents cut drop_rest embed_steps '
)
OLD_FIELDS = {
    'weights': '',
    'corpus': 'seed replay_lang',
    'vocab': 'vocab_size segment',
    'embeddings': 'init pad_to seed',
    'pretrain': _PRETRAIN + 'max_steps',
    'control': _PRETRAIN + 'control_steps',
    'sft': _TRAINED
    + 'template system sft_train sft_lr sft_epochs sft_max_steps sft_batch sft_block '
    + 'sft_text_share sft_embed_lr sft_warmup',
    'quantize': 'bits group_size desc_act calib template seed',
    'rag': 'embedding chunk_tokens chunk_overlap k threshold',
    'evaluate': 'tasks tasks_limit template system',
}


def test_a_folder_of_an_earlier_version_opens(finished):
    finish(finished, OLD_FIELDS)
    assert todo(finished) == {}
    assert todo(get_recipe(finished, save_every=50)) == {}
    assert todo(get_recipe(finished, sft_global_batch=16)) == {'sft': 'sft_global_batch changed'}
    assert todo(get_recipe(finished, accum=2, sft_accum=1)) == {
        'pretrain': 'accum changed',
        'control': 'accum changed',
    }


def test_watched_settings_name_no_files():
    for stage in STAGES.values():
        assert not set(watched(stage)) & NOT_WATCHED, stage.name


# ---- the notebooks hand over the same objects


def calls(notebook, function):
    "Every call of `function` in a notebook's own cells"
    for cell in json.loads((NOTEBOOKS / notebook).read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] != 'code' or source.startswith('#| export'):
            continue
        lines = [line for line in source.split('\n') if not line.startswith('%')]
        for node in ast.walk(ast.parse('\n'.join(lines))):
            if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == function:
                yield node


def hands_over(call, group):
    "Whether a call gets `r.group`, whole or field by field"
    values = [ast.unparse(a) for a in (*call.args, *(k.value for k in call.keywords))]
    whole = f'r.{group}' in values
    return whole or all(f'r.{group}.{f.name}' in values for f in fields(groups()[group]))


@pytest.mark.parametrize(
    'notebook,function,given',
    [
        ('04_vocab.ipynb', 'merge', 'vocab'),
        ('05_embeddings.ipynb', 'resize', 'embeddings'),
        ('06_pretrain.ipynb', 'pretrain', 'pretrain lora compute'),
        ('08_sft.ipynb', 'finetune', 'sft lora compute chat'),
        ('09_quantize.ipynb', 'quantize', 'quantize chat'),
    ],
)
def test_a_stage_notebook_hands_over_whole_settings(notebook, function, given):
    found = list(calls(notebook, function))
    assert any(all(hands_over(c, g) for g in given.split()) for c in found), [
        ast.unparse(c) for c in found
    ]


def test_a_setting_left_out_is_found():
    call = ast.parse("finetune('m', chats, 'out', SftArgs(lr=r.sft.lr), r.lora)").body[0].value
    assert hands_over(call, 'lora') and not hands_over(call, 'sft')
