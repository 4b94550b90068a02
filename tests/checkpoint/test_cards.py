"""Model cards say where a model comes from, in YAML that the Hub can read; nothing is sent that was not shown and asked for."""

import json
import re
import shutil

import pytest
from helpers.tiny import ZH, make, small

from llama_zh_nb.checkpoint import cards
from llama_zh_nb.checkpoint.cards import (
    about,
    check_card,
    origin,
    push_to_hub,
    upload_plan,
    write_card,
)
from llama_zh_nb.core.errors import LlamaZhError

torch = pytest.importorskip('torch')
hub = pytest.importorskip('huggingface_hub')
yaml = pytest.importorskip('yaml')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    from llama_zh_nb.pretrain import pretrain

    d = tmp_path_factory.mktemp('cards')
    base = make(d / 'base')
    pretrain(base, ZH, d / 'out', **small())
    (d / 'corpus').mkdir()
    (d / 'corpus' / 'train.jsonl').write_text('{"text": "春天"}\n')
    (d / 'corpus' / 'report.json').write_text(json.dumps(dict(train=1, chars=2)))
    write_card(
        d / 'out',
        base,
        data=dict(Chinese=d / 'corpus'),
        licence='llama2',
        base_name='meta-llama/Llama-2-7b-hf',
        name='thin',
        metrics={'C-Eval': 0.25},
    )
    return d / 'out'


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / 'thin')


# ---- the card


def test_the_card_is_what_the_hub_reads(trained):
    text, d = (trained / 'README.md').read_text(encoding='utf-8'), check_card(trained / 'README.md')
    front = yaml.safe_load(text.split('---\n')[1])
    assert (
        front['license'] == 'llama2'
        and front['base_model'] == 'meta-llama/Llama-2-7b-hf'
        and front['library_name'] == 'transformers'
        and front['language'] == ['zh', 'en']
    )
    got = {r.metric_type: r.metric_value for r in d.eval_results}
    last = json.loads((trained / 'history.json').read_text())['rows'][-1]
    assert got == {
        'zh_bpc': round(last['zh_bpc'], 4),
        'en_bpb': round(last['en_bpb'], 4),
    }  # measured, not remembered
    for s in (
        'Llama 2 Community License',
        '## Recipe',
        'lora+new',
        '## Data',
        'corpus',
        '## How to load',
        'AutoModelForCausalLM',
        '## Hashes',
        'C-Eval',
        'packed: documents',
        'transformers',
    ):
        assert s in text
    assert (
        cards.fingerprint(trained) in text
        and about(trained.parent / 'corpus')[0]['sha256'][:16] in text
    )
    assert 'Copyright (c) Meta' in (trained / 'NOTICE').read_text()  # the licence asks for it
    assert str(trained.parent) not in text


def test_which_text_a_figure_was_measured_on(trained, tmp_path):
    d = shutil.copytree(trained, tmp_path / 'run' / 'chat')
    h = json.loads((d / 'history.json').read_text())

    def card():
        return write_card(d, licence='llama2', name='thin').read_text(encoding='utf-8')

    before = card()
    assert (
        'Measured during training, on the held-out documents that training was given' in before
        and 'at the end, on all' not in before
        and 'held-out Chinese, a part' in before
    )
    metrics = dict(
        bpc_zh=1.25,
        bpb_en=1.125,
        history=h['rows'],
        accuracy=dict(asked=dict(right=7, n=9, share=7 / 9)),
    )
    (tmp_path / 'run' / 'run.json').write_text(
        json.dumps(dict(stages=dict(sft=dict(metrics=metrics))))
    )
    text = card()
    assert (
        'on all held-out text of the run' in text
        and '| 1.25 |' in text
        and '7 of 9' in text
        and 'Measured during training' in text
    )
    assert {
        r.metric_type: r.metric_value for r in check_card(d / 'README.md').eval_results
    } == dict(zh_bpc=1.25, en_bpb=1.125) and 'a part' not in text.split('---')[1]
    (tmp_path / 'run' / 'run.json').write_text(
        json.dumps(dict(stages=dict(sft=dict(metrics=metrics | dict(history=[dict(loss=1)])))))
    )
    assert card() == before  # figures of another training are not this one's
    (d / 'history.json').write_text(
        json.dumps(dict(h, info=h['info'] | dict(heldout=dict(zh=60, en=12))))
    )
    assert 'on the first 60 documents (zh), 12 documents (en)' in card()


def test_the_adapter_has_its_own(trained):
    d = check_card(trained / 'adapter' / 'README.md')
    assert d.library_name == 'peft' and 'PeftModel' in (
        trained / 'adapter' / 'README.md'
    ).read_text(encoding='utf-8')


def test_the_loading_lines_run(trained, monkeypatch):
    code = re.search(
        r'```python\n(.*?)```', (trained / 'README.md').read_text(encoding='utf-8'), re.S
    )[1].replace('"thin"', repr(str(trained)))
    exec(code.replace('max_new_tokens=100', 'max_new_tokens=2'), {})


def test_where_a_base_comes_from(tmp_path, shared):
    assert origin(make(tmp_path / 'x')) == dict(name=None, licence=None)
    assert origin(tmp_path / 'x', licence='cc-by-4.0')['licence'] == 'cc-by-4.0'
    (tmp_path / 'x' / 'README.md').write_text('---\nlicense: llama2\nlanguage: [en]\n---\n# Llama')
    assert origin(tmp_path / 'x')['licence'] == 'llama2'
    (tmp_path / 'x' / 'LICENSE').write_text('  Apache License\n  Version 2.0')
    assert origin(tmp_path / 'x')['licence'] == 'apache-2.0'
    from llama_zh_nb.checkpoint.meta import packaged

    (tmp_path / 'm').mkdir()
    shutil.copyfile(packaged('mini') / 'tokenizer.model', tmp_path / 'm' / 'tokenizer.model')
    assert origin(tmp_path / 'm') == dict(name='mini', licence='apache-2.0')
    for positions, name in (
        (4096, 'Llama-2'),
        (2048, None),
    ):  # the first Llama has the same pieces and another licence
        shutil.copyfile(
            shared / 'data' / 'tokenizers' / 'chinese_llama2_55296.model',
            tmp_path / 'm' / 'tokenizer.model',
        )
        (tmp_path / 'm' / 'config.json').write_text(
            json.dumps(dict(max_position_embeddings=positions))
        )
        assert origin(tmp_path / 'm')['name'] == name


@pytest.mark.parametrize(
    'text,why',
    [
        ('# no front matter', 'no YAML'),
        ('---\nlanguage: [zh\n---\n', 'cannot be read'),
        ('---\nlicense: llama2\n---\nsee /home/me/runs/7b', 'folder of this machine'),
    ],
)
def test_bad_cards(tmp_path, text, why):
    (tmp_path / 'README.md').write_text(text)
    with pytest.raises(LlamaZhError, match=why):
        check_card(tmp_path / 'README.md')


def test_a_licence_the_hub_does_not_list(folder):
    write_card(folder, licence='my-own', name='thin')
    d = check_card(folder / 'README.md')
    assert (d.license, d.license_name) == ('other', 'my-own')


def test_a_merged_model_has_a_card(trained, tmp_path):
    from llama_zh_nb.checkpoint.merge import merge_lora

    m = merge_lora(trained.parent / 'base', trained / 'adapter', tmp_path / 'merged')
    text = (m.path / 'README.md').read_text(encoding='utf-8')
    assert '# merged' in text and m.plan.used[0]['sha256'] in text


# ---- sending


class Api:
    "Stands where HfApi does"

    there, calls = None, []

    def __init__(self, token):
        assert token == 'hf_x'

    def repo_info(self, repo):
        if self.there is None:
            raise hub.errors.RepositoryNotFoundError('404', response=_response(404))
        return self.there

    def create_repo(self, repo, private):
        self.calls.append(('create', repo, private))

    def create_commit(self, repo, ops, commit_message):
        self.calls.append(('commit', repo, {o.path_in_repo: o.path_or_fileobj for o in ops}))
        return type('Commit', (), dict(commit_url=f'https://huggingface.co/{repo}/commit/1'))


def _response(code):
    import httpx

    return httpx.Response(code, request=httpx.Request('GET', 'https://huggingface.co'))


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(hub, 'HfApi', Api)
    monkeypatch.setattr(hub.constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(hub, 'get_token', lambda: 'hf_x')
    monkeypatch.setattr(Api, 'calls', [])
    monkeypatch.setattr(Api, 'there', None)
    return monkeypatch


def test_nothing_is_sent_unasked(folder, online):
    p = push_to_hub(folder, 'me/thin')
    assert Api.calls == [] and 'nothing was sent; with --yes' in repr(p) and 'private' in repr(p)
    assert 'PUBLIC' in repr(push_to_hub(folder, 'me/thin', private=False))


def test_what_is_shown_is_what_goes(folder, online):
    (folder / 'checkpoint-4').mkdir()
    (folder / 'optimizer.pt').write_bytes(b'x')
    (folder / 'notes.txt').write_text('mine')
    shown = push_to_hub(folder, 'me/thin', adapter=True)
    sent = push_to_hub(folder, 'me/thin', adapter=True, yes=True)
    (_, _, private), (_, _, files) = Api.calls
    assert (
        private is True and set(files) == {n for n, _ in shown.files} and 'commit/1' in repr(sent)
    )
    assert {
        'model.safetensors',
        'config.json',
        'tokenizer.json',
        'README.md',
        'NOTICE',
        'adapter/adapter_model.safetensors',
    } <= set(files)
    assert not {'optimizer.pt', 'notes.txt', 'history.json', 'train.json'} & set(files) and {
        'optimizer.pt',
        'notes.txt',
        'checkpoint-4',
    } <= set(shown.stay)
    assert (
        str(folder.parent.parent) not in files['adapter/adapter_config.json'].decode()
    )  # this machine's folder stays here
    assert json.loads(files['adapter/adapter_config.json'])['base_model_name_or_path'] == 'base'


def test_a_public_repository_is_not_taken_for_a_private_one(folder, online):
    online.setattr(Api, 'there', type('R', (), dict(private=False)))
    with pytest.raises(LlamaZhError, match='exists and is public'):
        push_to_hub(folder, 'me/thin', yes=True)
    assert Api.calls == []
    push_to_hub(folder, 'me/thin', private=False, yes=True)
    assert [c[0] for c in Api.calls] == ['commit']


def test_one_plain_message(folder, online):
    import httpx

    def failing(e):
        def f(*a, **k):
            raise e

        return f

    for e, why in (
        (httpx.ConnectError('x'), 'cannot be reached'),
        (hub.errors.HfHubHTTPError('403', response=_response(403)), 'no write permission'),
        (hub.errors.HfHubHTTPError('500', response=_response(500)), 'answered 500'),
        (OSError('x'), 'cannot be reached'),
    ):
        online.setattr(Api, 'create_commit', failing(e))
        with pytest.raises(LlamaZhError, match=why):
            push_to_hub(folder, 'me/thin', yes=True)
    online.setattr(hub, 'get_token', lambda: None)
    with pytest.raises(LlamaZhError, match='no Hugging Face token'):
        push_to_hub(folder, 'me/thin', yes=True)
    online.setattr(hub.constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(LlamaZhError, match='OFFLINE'):
        push_to_hub(folder, 'me/thin', yes=True)


@pytest.mark.parametrize(
    'repo',
    [
        'thin',
        'a/b/c',
        '/thin',
        'me/',
        'me/thin model',
        'me/thin--b',
        'me/' + 'x' * 100,
        'https://huggingface.co/me/thin',
        None,
    ],
)
def test_names_that_are_none(repo, online):
    with pytest.raises(LlamaZhError, match='is not the name of a repository'):
        cards.check_push(repo)
    assert Api.calls == []


def test_asked_before_training(online, tmp_path, capsys):
    cards.check_push('me/thin')
    assert Api.calls == [] and 'goes to me/thin (private)' in capsys.readouterr().out
    with pytest.raises(LlamaZhError, match='licence is not known'):
        cards.check_push('me/thin', base=make(tmp_path / 'b'))
    online.setattr(Api, 'there', type('R', (), dict(private=False)))
    with pytest.raises(LlamaZhError, match='exists and is public'):
        cards.check_push('me/thin')
    cards.check_push('me/thin', private=False)
    online.setattr(hub, 'get_token', lambda: None)
    with pytest.raises(LlamaZhError, match='no Hugging Face token'):
        cards.check_push('me/thin')


def test_sent_after_training(folder, online, capsys):
    sent = cards.push_after(folder, 'me/thin')
    out = capsys.readouterr().out
    assert (
        'commit/1' in sent.url
        and out.index('would go to me/thin (private)') < out.index('sent: ')
        and 'with --yes' not in out
    )
    assert [c[0] for c in Api.calls] == ['create', 'commit'] and Api.calls[0][2] is True
    online.setattr(hub, 'get_token', lambda: None)
    assert cards.push_after(folder, 'me/thin') is None  # no reason to lose a training
    out = capsys.readouterr().out
    assert (
        'not sent: no Hugging Face token' in out and f'llama-zh push {folder} me/thin --yes' in out
    )


def test_what_is_not_ready_does_not_go(folder):
    with pytest.raises(LlamaZhError, match='owner/name'):
        upload_plan(folder, 'thin')
    write_card(folder, base=folder, name='thin')
    (folder / 'README.md').write_text(
        (folder / 'README.md').read_text(encoding='utf-8').replace('license: llama2\n', ''),
        encoding='utf-8',
    )
    with pytest.raises(LlamaZhError, match='names no licence'):
        upload_plan(folder, 'me/thin')
    (folder / 'README.md').unlink()
    with pytest.raises(LlamaZhError, match='no model card'):
        upload_plan(folder, 'me/thin')


def test_data_that_is_not_there_is_refused(tmp_path):
    for name in ('/nope', 'nope/train.jsonl', tmp_path / 'nope'):
        with pytest.raises(LlamaZhError, match='no such file'):
            about([name])
    assert about(['河水东流，两岸多柳。'])[0]['documents'] == 1
