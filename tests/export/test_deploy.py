"""Container files: read closely, and, in the slow suite, their steps taken one by one in a new folder."""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
import venv

import pytest
import yaml
from helpers.containers import check_compose, check_dockerfile, docker_steps, is_sent

FILES = ['Dockerfile', 'Dockerfile.cuda']


@pytest.mark.parametrize('name', FILES)
def test_dockerfiles_have_no_fault(root, name):
    assert check_dockerfile(root / name) == []
    steps = docker_steps(root / name)
    assert [
        s
        for s in steps
        if s.op == 'RUN' and 'pip install' in s.arg and '-c constraints.txt' not in s.arg
    ] == []
    cmd = json.loads(steps[-1].arg)
    assert cmd[:2] == ['llama-zh', 'serve'] and cmd[cmd.index('--host') + 1] == '0.0.0.0'
    comment = root.joinpath(name).read_text().split('CMD ["llama-zh"')[0].rstrip().splitlines()[-2:]
    assert all(line.startswith('#') for line in comment), (
        'why it listens on every address is said there'
    )
    assert '/healthz' in next(s.arg for s in steps if s.op == 'HEALTHCHECK')


def test_extras_and_modules_of_the_images_exist(root):
    from configparser import ConfigParser

    cfg = ConfigParser(interpolation=None)
    cfg.read(root / 'settings.ini', encoding='utf-8')
    have = {k.removesuffix('_requirements') for k in cfg['DEFAULT'] if k.endswith('_requirements')}
    for name in FILES:
        extras = next(
            s.arg
            for s in docker_steps(root / name)
            if s.op == 'ARG' and s.arg.startswith('EXTRAS=')
        ).partition('=')[2]
        assert set(extras.split(',')) <= have


def test_compose_file(root):
    assert check_compose(root / 'compose.yaml') == []
    c = yaml.safe_load((root / 'compose.yaml').read_text())['services']
    assert set(c) == {'server', 'page'} and all(
        p.startswith('127.0.0.1:') for s in c.values() for p in s['ports']
    )
    assert 'http://server:8000/v1' in c['page']['command']


def test_the_copied_files_and_no_others_reach_the_builder(root):
    rules = (root / '.dockerignore').read_text().splitlines()
    files = [p.relative_to(root).as_posix() for p in root.glob('*') if p.is_file()] + [
        p.relative_to(root).as_posix()
        for d in ('llama_zh_nb', 'nbs', 'tests')
        for p in (root / d).rglob('*')
        if p.is_file()
    ]
    got = {f for f in files if is_sent(f, rules)}
    assert {
        'setup.py',
        'settings.ini',
        'constraints.txt',
        'llama_zh_nb/core/errors.py',
        'llama_zh_nb/data/mini/params.json',
    } <= got
    assert not any(
        f.startswith(('runs/', 'nbs/', 'tests/', '.')) or '__pycache__' in f for f in got
    )


def test_faults_are_found(root, tmp_path):
    for f in (
        *FILES,
        'constraints.txt',
        'settings.ini',
        'setup.py',
        'MANIFEST.in',
        'README.md',
        'LICENSE',
        '.dockerignore',
    ):
        shutil.copy(root / f, tmp_path)
    (tmp_path / 'llama_zh_nb').mkdir()
    assert check_dockerfile(tmp_path / 'Dockerfile') == []
    text = (tmp_path / 'Dockerfile').read_text()
    for old, new, says in (
        ('USER app', 'USER root', 'root'),
        ('EXPOSE 8000', 'EXPOSE 8001', 'ports'),
        ('python:3.11-slim', 'python:latest', 'version'),
        ('"0.0.0.0"', '"127.0.0.1"', '0.0.0.0'),
        ('COPY constraints.txt', 'ADD constraints.txt', 'ADD'),
        ('COPY llama_zh_nb', 'COPY nothing', 'not there'),
        ('pip install -c constraints.txt setuptools', 'pip install setuptools', 'pip install'),
    ):
        assert old in text
        (tmp_path / 'Dockerfile').write_text(text.replace(old, new))
        assert any(says in f for f in check_dockerfile(tmp_path / 'Dockerfile')), (old, new)
    (tmp_path / '.dockerignore').write_text('*.txt\n')
    (tmp_path / 'Dockerfile').write_text(text)
    assert any('keeps constraints.txt away' in f for f in check_dockerfile(tmp_path / 'Dockerfile'))


def test_instructions_are_read(root, tmp_path):
    ops = [s.op for s in docker_steps(root / 'Dockerfile.cuda')]
    assert (ops[0], ops[-1]) == ('FROM', 'CMD')
    with pytest.raises(ValueError, match='no such file'):
        docker_steps(root / 'nowhere')
    (tmp_path / 'Dockerfile').write_text('FROM python:3.11-slim \\\n')
    with pytest.raises(ValueError, match='goes on after the end'):
        docker_steps(tmp_path / 'Dockerfile')


def test_what_dockerignore_keeps_away():
    names = 'a.md', 'README.md', 'docs/a.md', 'setup.py'
    assert [is_sent(n, ['*.md', '!README.md']) for n in names] == [False, True, True, True]
    names = 'a.pyc', 'x/y/a.pyc', 'runs/mini/a', 'myruns'
    assert [is_sent(n, ['**/*.pyc', 'runs']) for n in names] == [False, False, False, True]


BAD = """FROM python
ENV API_KEY=abc
COPY model.bin src /app/
RUN pip install torch
EXPOSE 8000
HEALTHCHECK CMD curl http://127.0.0.1:8080/healthz
CMD ["llama-zh", "serve", "/m", "--port", "8000"]
"""


def test_a_file_with_all_that_can_be_wrong(tmp_path):
    (tmp_path / 'model.bin').write_text('x')
    (tmp_path / '.dockerignore').write_text('*.bin\n')
    (tmp_path / 'Dockerfile').write_text(BAD)
    assert len(check_dockerfile(tmp_path / 'Dockerfile')) == 8


@pytest.mark.parametrize(
    'old, new, says',
    [
        ('8000:8000', '8000:9000', 'port 9000 is published'),
        ('127.0.0.1:7860', '7860', 'open to the whole'),
        ('//server:8000', '//serve:8000', 'no service here'),
    ],
)
def test_faults_of_a_compose_file_are_found(root, tmp_path, old, new, says):
    for f in FILES:
        shutil.copy(root / f, tmp_path)
    text = (root / 'compose.yaml').read_text()
    (tmp_path / 'compose.yaml').write_text(text.replace(old, new, 1))
    assert any(says in fault for fault in check_compose(tmp_path / 'compose.yaml'))


def test_what_is_no_compose_file(tmp_path):
    (tmp_path / 'compose.yaml').write_text('services: [')
    with pytest.raises(ValueError, match='not a compose file'):
        check_compose(tmp_path / 'compose.yaml')


# --- the steps themselves -------------------------------------------------------------------------------------------------------


def reachable(url):
    try:
        urllib.request.urlopen(url + '/torch/', timeout=5).read(1)
        return True
    except Exception:
        return False


class Image:
    "A folder that stands for the image's file system; a virtual environment stands for its Python"

    def __init__(self, home, context):
        self.home, self.context, self.cwd, self.user, self.ran = home, context, '/', 'root', []
        venv.create(home / 'venv', with_pip=True)
        self.env = {
            k: v
            for k, v in os.environ.items()
            if k not in ('PYTHONPATH', 'VIRTUAL_ENV', 'PIP_CONSTRAINT')
        } | {'PATH': f'{home / "venv" / "bin"}:{os.environ["PATH"]}', 'HOME': str(home)}
        self.rules = (context / '.dockerignore').read_text().splitlines()

    def at(self, path):
        return (
            self.home / 'fs' / (path if path.startswith('/') else f'{self.cwd}/{path}').strip('/')
        )

    def sh(self, cmd, **kw):
        return subprocess.run(
            ['sh', '-ec', cmd], cwd=self.at('.'), env=self.env | kw, capture_output=True, text=True
        )

    def copy(self, words):
        to = self.at(words[-1])
        to.mkdir(parents=True, exist_ok=True)
        for w in words[:-1]:
            src = self.context / w
            if src.is_file():
                shutil.copy(src, to)
                continue
            for f in (
                f
                for f in src.rglob('*')
                if f.is_file() and is_sent(f.relative_to(self.context).as_posix(), self.rules)
            ):  # a folder's content is copied, as Docker does
                (to / f.relative_to(src)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(f, to / f.relative_to(src))

    def step(self, s):
        if s.op in ('ARG', 'ENV'):
            for w in s.arg.split():
                k, _, v = w.partition('=')
                self.env[k] = (
                    '' if k == 'TORCH_INDEX' and not reachable(v) else os.path.expandvars(v)
                )
        elif s.op == 'WORKDIR':
            self.cwd = s.arg
            self.at('.').mkdir(parents=True, exist_ok=True)
        elif s.op == 'COPY':
            self.copy(s.arg.split())
        elif s.op == 'USER':
            self.user = s.arg
        elif s.op == 'RUN' and 'useradd' not in s.arg:  # the only step that needs root
            p = self.sh(s.arg)
            self.ran.append(s.arg)
            assert p.returncode == 0, (
                f'line {s.line}: {s.arg}\n{p.stdout[-1500:]}\n{p.stderr[-1500:]}'
            )


@pytest.fixture(scope='module')
def image(root, tmp_path_factory):
    home = tmp_path_factory.mktemp('image')
    if shutil.disk_usage(home).free < 8e9:
        pytest.skip('needs 8 GB of disk')
    im = Image(home, root)
    for s in docker_steps(root / 'Dockerfile'):
        im.step(s)
    yield im
    shutil.rmtree(home, ignore_errors=True)


@pytest.mark.slow
def test_every_step_of_the_cpu_image(image):
    assert len([r for r in image.ran if 'pip install' in r]) == 2 and image.user == 'app'
    check = image.sh('pip check')
    assert check.returncode == 0, check.stdout
    where = image.sh(
        'cd / && python -c "import llama_zh_nb, torch; print(llama_zh_nb.__file__, torch.cuda.is_available())"'
    ).stdout
    assert 'site-packages' in where and str(image.home) in where
    assert 'weights get' in image.sh('llama-zh --help').stdout
    lock = dict(
        line.strip().split('==')
        for line in (image.context / 'constraints.txt').read_text().splitlines()
        if '==' in line and line[0] != '#'
    )
    frozen = dict(
        line.split('==') for line in image.sh('pip freeze').stdout.splitlines() if '==' in line
    )
    assert not {
        k: v
        for k, v in frozen.items()
        if k in lock and lock[k].split(';')[0] != v.partition('+')[0]
    }


@pytest.mark.slow
def test_the_images_command_answers(image, root, tmp_path):
    if ' serve' not in image.sh('llama-zh --help').stdout:
        pytest.skip('this version has no serve command yet')
    model = next(
        (
            p
            for p in (root / 'runs' / 'test' / 'mini' / 'chat', root / 'runs' / 'mini' / 'chat')
            if (p / 'config.json').exists()
        ),
        None,
    )
    if model is None:
        pytest.skip('no chat model: run make tutorial')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    steps = docker_steps(root / 'Dockerfile')
    cmd = [
        w.replace('/models/chat', str(model)).replace('8000', port)
        for w in json.loads(steps[-1].arg)
    ]
    health = json.loads(next(s.arg for s in steps if s.op == 'HEALTHCHECK').partition('CMD ')[2])
    p = subprocess.Popen(
        cmd,
        cwd=tmp_path,
        env=image.env | {'OMP_NUM_THREADS': '2'},
        executable=shutil.which('llama-zh', path=image.env['PATH']),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for _ in range(120):
            ok = (
                subprocess.run(
                    [w.replace('8000', port) for w in health],
                    env=image.env,
                    executable=image.home / 'venv' / 'bin' / 'python',
                    capture_output=True,
                ).returncode
                == 0
            )
            if ok or p.poll() is not None:
                break
            time.sleep(1)
        assert ok, (
            p.stderr.read()[-2000:] if p.poll() is not None else 'not healthy after two minutes'
        )
        body = json.dumps(
            dict(model=model.name, messages=[dict(role='user', content='你好')], max_tokens=8)
        ).encode()
        r = urllib.request.urlopen(
            urllib.request.Request(
                f'http://127.0.0.1:{port}/v1/chat/completions',
                body,
                {'Content-Type': 'application/json'},
            ),
            timeout=60,
        )
        assert json.load(r)['choices'][0]['message']['role'] == 'assistant'
    finally:
        p.terminate()
        p.wait(30)
