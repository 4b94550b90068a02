"recipes: refused when wrong, found when relative, and a run.json that many may write"

import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from llama_zh_nb.app.estimate import estimate
from llama_zh_nb.core.errors import LlamaZhError
from llama_zh_nb.core.run_log import read_run, stage
from llama_zh_nb.core.settings import explain, flatten, groups, settings, to_yaml
from llama_zh_nb.recipes import get_recipe, presets, questions, run_dir
from llama_zh_nb.text.templates import get_template


def test_every_preset_is_valid():
    want = 'mini llama2-7b-16gb llama2-7b-24gb llama2-7b-80gb llama2-13b-80gb llama2-7b-8x80gb-full llama2-70b-multinode alpaca2-7b zhu-7b literary-7b linksoul-7b'
    assert set(want.split()) <= set(presets())
    for p in presets():
        assert get_recipe(p).name == p and get_template(get_recipe(p).chat.template)


@pytest.mark.parametrize(
    'name,kw',
    [
        (
            'alpaca2-7b',
            dict(
                lora_r=64,
                lora_alpha=128,
                lora_dropout=0.05,
                lr=2e-4,
                warmup=0.05,
                weight_decay=0.01,
                batch=1,
                accum=8,
                block=512,
                vocab_size=55296,
                train='lora+embed',
                sft_lr=1e-4,
                sft_warmup=0.03,
                engine='zero2',
            ),
        ),
        (
            'zhu-7b',
            dict(
                lora_r=24,
                lora_alpha=32,
                lora_dropout=0.1,
                lr=1e-4,
                batch=2,
                accum=128,
                vocab_size=49953,
                init='random',
                pad_to=1,
            ),
        ),
        (
            'literary-7b',
            dict(
                lora_r=64,
                lr=2e-5,
                accum=16,
                block=4096,
                load_in_4bit=True,
                sft_lr=1e-4,
                vocab_size=74674,
                template='literary',
            ),
        ),
        (
            'linksoul-7b',
            dict(
                train='full',
                sft_train='full',
                sft_lr=2e-5,
                sft_warmup=0.03,
                sft_batch=4,
                accum=1,
                sft_block=4096,
                vocab_size=32000,
                gpus=8,
            ),
        ),
    ],
)
def test_published_settings(name, kw):
    r = flatten(get_recipe(name))
    assert {k: r[k] for k in kw} == kw


def test_new_fields_change_nothing_on_mini():
    r = get_recipe('mini')
    assert (
        r.pretrain.mix_documents,
        r.pretrain.cut,
        r.pretrain.drop_rest,
        r.compute.attn,
        r.compute.engine,
        r.compute.gpus,
        r.pretrain.embed_steps,
        r.compute.liger,
        r.compute.workers,
    ) == (False, False, False, 'sdpa', None, 1, 0, False, None)
    assert (
        r.sft.warmup == r.pretrain.warmup
        and get_recipe('mini', warmup=0.1).sft.warmup == 0.1
        and get_recipe('mini', warmup=0.1, sft_warmup=0.02).sft.warmup == 0.02
    )


def test_fine_tuning_does_as_pretraining_unless_it_is_told():
    "The flat recipes of old had one `accum`, `eval_every`, `save_every` for both"
    r = get_recipe('llama2-7b-24gb', accum=3, eval_every=7, save_every=9, sft_save_every=11)
    assert (r.sft.accum, r.sft.eval_every, r.sft.save_every) == (3, 7, 11)
    assert get_recipe(r, sft_warmup=None).sft.warmup == r.pretrain.warmup


def test_every_preset_as_yaml_and_back(tmp_path):
    yaml = pytest.importorskip('yaml')
    for p in presets():
        r = get_recipe(p)
        (tmp_path / f'{p}.yaml').write_text(to_yaml(r), encoding='utf-8')
        assert get_recipe(tmp_path / f'{p}.yaml') == r
        read = yaml.safe_load(to_yaml(r))
        assert set(read) == {'name', 'base', 'out', 'seed', *groups()}
        assert set(flatten(read)) == set(settings())
        assert all(' # ' in line for line in to_yaml(r).splitlines() if line)


def test_a_recipe_survives_json():
    for p in presets():
        r = get_recipe(p)
        again = get_recipe(p, **json.loads(json.dumps(asdict(r))))
        assert again == r and json.dumps(asdict(again)) == json.dumps(asdict(r))
        assert get_recipe(p, **json.loads(json.dumps(flatten(r)))) == r


def test_every_field_is_documented():
    assert set(explain()) == set(settings()) and all(explain().values())


@pytest.mark.parametrize(
    'kw,msg',
    [
        (dict(lr='x'), 'a number'),
        (dict(learning_rate=1), 'unknown recipe field'),
        (dict(batchs=1), "did you mean 'batch'"),
        (dict(bits=5), 'use one of'),
        (dict(engine='zero4'), 'use one of'),
        (dict(gpu=2), "did you mean 'gpus'"),
        (dict(block='1.5'), 'whole number'),
        (dict(seed=None), 'cannot be empty'),
    ],
)
def test_bad_fields(kw, msg):
    with pytest.raises(LlamaZhError, match=msg):
        get_recipe('mini', **kw)


def test_yaml(tmp_path):
    (tmp_path / 'a.yaml').write_text(
        'base_recipe: mini\nlr: 3e-4\nmax_steps: none\ncorpus: x.txt\n'
    )
    r = get_recipe(tmp_path / 'a.yaml', batch=3)
    assert (r.name, r.data.corpus, r.vocab.segment) == ('a', ('x.txt',), 'words')
    assert (r.pretrain.lr, r.pretrain.max_steps, r.pretrain.batch) == (3e-4, None, 3)
    for text, msg in (
        ('a: [', 'line'),
        ('- x', 'field: value'),
        ('base_recipe: minni', "did you mean 'mini'"),
        ('lrr: 1', 'unknown recipe field'),
    ):
        (tmp_path / 'b.yaml').write_text(text)
        with pytest.raises(LlamaZhError, match=msg):
            get_recipe(tmp_path / 'b.yaml')


def test_python(tmp_path):
    f = tmp_path / 'a.py'
    f.write_text(
        "n = 3\nrecipe = dict(base_recipe='mini', batch=n, global_batch=8*n, report_to='none')"
    )
    r = get_recipe(f, lr=1e-4)
    assert (r.name, r.compute.report_to, r.vocab.segment) == ('a', 'none', 'words')
    assert (r.pretrain.batch, r.pretrain.global_batch, r.pretrain.lr) == (3, 24, 1e-4)
    f.write_text(
        "from llama_zh_nb.core.settings import DataArgs, Recipe\nrecipe = Recipe(name='b', data=DataArgs(corpus=['x.txt']))"
    )
    assert get_recipe(f).name == 'b' and get_recipe(f).data.corpus == ('x.txt',)
    for text, msg in (
        ('x = 1', 'nothing called recipe'),
        ('recipe = 3', 'found int'),
        ('recipe = 1/0', 'ZeroDivisionError'),
        ('recipe = dict(lrr=1)', 'unknown recipe field'),
    ):
        f.write_text(text)
        with pytest.raises(LlamaZhError, match=msg):
            get_recipe(f)


def test_global_batch():
    assert (
        get_recipe('mini', batch=2, global_batch=6).pretrain.global_batch == 6
        and get_recipe('mini').pretrain.global_batch is None
        and get_recipe('mini').compute.report_to == 'auto'
    )
    for kw in (
        dict(batch=4, global_batch=6),
        dict(global_batch=0),
        dict(sft_batch=4, sft_global_batch=6),
    ):
        with pytest.raises(LlamaZhError, match='a multiple of (sft_)?batch'):
            get_recipe('mini', **kw)


def test_environment(monkeypatch, tmp_path):
    monkeypatch.setenv('LLAMA_ZH_RECIPE', 'llama2-7b-16gb')
    monkeypatch.setenv('LLAMA_ZH_RUNS', str(tmp_path / 'r'))
    r = get_recipe()
    assert r.name == 'llama2-7b-16gb' and run_dir(r) == tmp_path / 'r' / 'llama2-7b-16gb'
    monkeypatch.delenv('LLAMA_ZH_RUNS')
    (tmp_path / 'p' / 'nbs').mkdir(parents=True)
    (tmp_path / 'p' / 'settings.ini').touch()
    monkeypatch.chdir(tmp_path / 'p' / 'nbs')
    assert run_dir(r) == tmp_path / 'p' / 'runs' / 'llama2-7b-16gb'


def test_run_json_survives_many_writers(tmp_path):
    code = "import sys; from llama_zh_nb.core.run_log import record\nfor i in range(20): record(sys.argv[1], 's'+sys.argv[2], **{f'm{i}': i})"
    ps = [subprocess.Popen([sys.executable, '-c', code, str(tmp_path), str(k)]) for k in range(3)]
    assert [p.wait() for p in ps] == [0, 0, 0]
    st = json.loads((tmp_path / 'run.json').read_text())['stages']
    assert all(len(st[f's{k}']['metrics']) == 20 for k in range(3))


def test_stage_measures_and_records_only_success(tmp_path):
    with stage(tmp_path, 'ok') as m:
        m['x'] = 1
    with pytest.raises(ZeroDivisionError), stage(tmp_path, 'bad') as m:
        raise ZeroDivisionError
    st = read_run(tmp_path)['stages']
    assert (
        list(st) == ['ok']
        and st['ok']['metrics'] == {'x': 1}
        and st['ok']['seconds'] >= 0
        and st['ok']['peak_mib'] > 0
    )


def test_estimate_of_unknown_base():
    with pytest.raises(LlamaZhError, match='cannot tell the shape'):
        estimate(get_recipe('mini', base='somebody/some-model'))


def test_questions_name_the_bad_line(tmp_path):
    (tmp_path / 'q.jsonl').write_text('{"question": "a"}\n{}\n')
    with pytest.raises(LlamaZhError, match='line 2'):
        questions(get_recipe('mini', questions=str(tmp_path / 'q.jsonl'), out=str(tmp_path)))
