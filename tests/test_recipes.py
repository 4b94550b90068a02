"recipes: refused when wrong, found when relative, and a run.json that many may write"
import json, subprocess, sys
from dataclasses import asdict, fields
import pytest
from llama_zh_nb.core import LlamaZhError
from llama_zh_nb.recipes import *
from llama_zh_nb.recipes import PRESETS, _coerce

def test_every_preset_is_valid():
    for p in PRESETS:
        r = get_recipe(p)
        assert r.name == p and estimate(get_recipe(p, base='meta-llama/Llama-2-7b-hf'))['memory: sum'] > 0

def test_a_recipe_survives_json():
    for p in PRESETS:
        r = get_recipe(p)
        again = get_recipe(p, **json.loads(json.dumps(asdict(r))))
        assert json.dumps(asdict(again)) == json.dumps(asdict(r))

def test_every_field_is_documented():
    assert set(explain()) == {f.name for f in fields(Recipe)}

@pytest.mark.parametrize('kw,msg', [(dict(lr='x'), 'a number'), (dict(learning_rate=1), 'unknown recipe field'), (dict(batchs=1), "did you mean 'batch'"),
                                    (dict(bits=5), 'use one of'), (dict(block='1.5'), 'whole number'), (dict(seed=None), 'cannot be empty')])
def test_bad_fields(kw, msg):
    with pytest.raises(LlamaZhError, match=msg): get_recipe('mini', **kw)

def test_yaml(tmp_path):
    (tmp_path/'a.yaml').write_text('base_recipe: mini\nlr: 3e-4\nmax_steps: none\ncorpus: x.txt\n')
    r = get_recipe(tmp_path/'a.yaml', batch=3)
    assert (r.name, r.lr, r.max_steps, r.corpus, r.batch, r.segment) == ('a', 3e-4, None, ['x.txt'], 3, 'words')
    for text, msg in (('a: [', 'line'), ('- x', 'field: value'), ('base_recipe: minni', "did you mean 'mini'"), ('lrr: 1', 'unknown recipe field')):
        (tmp_path/'b.yaml').write_text(text)
        with pytest.raises(LlamaZhError, match=msg): get_recipe(tmp_path/'b.yaml')

def test_environment(monkeypatch, tmp_path):
    monkeypatch.setenv('LLAMA_ZH_RECIPE', 'llama2-7b-16gb'); monkeypatch.setenv('LLAMA_ZH_RUNS', str(tmp_path/'r'))
    r = get_recipe()
    assert r.name == 'llama2-7b-16gb' and run_dir(r) == tmp_path/'r'/'llama2-7b-16gb'
    monkeypatch.delenv('LLAMA_ZH_RUNS'); (tmp_path/'p'/'nbs').mkdir(parents=True); (tmp_path/'p'/'settings.ini').touch(); monkeypatch.chdir(tmp_path/'p'/'nbs')
    assert run_dir(r) == tmp_path/'p'/'runs'/'llama2-7b-16gb'

def test_run_json_survives_many_writers(tmp_path):
    code = "import sys; from llama_zh_nb.recipes import record\nfor i in range(20): record(sys.argv[1], 's'+sys.argv[2], **{f'm{i}': i})"
    ps = [subprocess.Popen([sys.executable, '-c', code, str(tmp_path), str(k)]) for k in range(3)]
    assert [p.wait() for p in ps] == [0, 0, 0]
    st = json.loads((tmp_path/'run.json').read_text())['stages']
    assert all(len(st[f's{k}']['metrics']) == 20 for k in range(3))

def test_stage_measures_and_records_only_success(tmp_path):
    with stage(tmp_path, 'ok') as m: m['x'] = 1
    with pytest.raises(ZeroDivisionError):
        with stage(tmp_path, 'bad') as m: 1/0
    st = read_run(tmp_path)['stages']
    assert list(st) == ['ok'] and st['ok']['metrics'] == {'x': 1} and st['ok']['seconds'] >= 0 and st['ok']['peak_mib'] > 0

def test_estimate_of_unknown_base():
    with pytest.raises(LlamaZhError, match='cannot tell the shape'): estimate(get_recipe('mini', base='somebody/some-model'))

def test_questions_name_the_bad_line(tmp_path):
    (tmp_path/'q.jsonl').write_text('{"question": "a"}\n{}\n')
    with pytest.raises(LlamaZhError, match='line 2'): questions(get_recipe('mini', questions=str(tmp_path/'q.jsonl'), out=str(tmp_path)))
