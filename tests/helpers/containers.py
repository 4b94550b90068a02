"""Container files read as a careful colleague would, without an engine: what hadolint does not see, such as ports that differ, sources that are not sent, and an address that nobody outside can reach."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import yaml


class Step(NamedTuple):
    "An instruction of a Dockerfile."

    op: str  # FROM, RUN, COPY, ...
    arg: str  # the rest, lines joined
    line: int


def docker_steps(path):
    "The instructions of a Dockerfile, comments left out and continued lines joined: a list of `Step`"
    path = Path(path)
    if not path.is_file():
        raise ValueError(f'{path}: no such file')
    steps, held, start = [], '', 0
    for i, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
        if line.lstrip().startswith('#') or not line.strip():
            continue
        start = start if held else i
        held = f'{held} {line.strip()}'.strip()
        if held.endswith('\\'):
            held = held[:-1].rstrip()
            continue
        op, _, arg = held.partition(' ')
        if not re.fullmatch('[A-Za-z]+', op) or not arg:
            raise ValueError(f'{path}, line {start}: {held[:40]!r} is no instruction')
        steps.append(Step(op.upper(), arg.strip(), start))
        held = ''
    if held:
        raise ValueError(f'{path}: line {start} goes on after the end')
    if not steps:
        raise ValueError(f'{path}: no instruction in it')
    return steps


def _pattern(rule):
    "A line of .dockerignore as a regular expression: `**` any depth, `*` within a name"
    parts = re.findall(r'\*\*/|\*\*|\*|\?|[^*?]+', rule.strip('/'))
    wild = {'**/': '(?:.*/)?', '**': '.*', '*': '[^/]*', '?': '[^/]'}
    return re.compile(''.join(wild.get(p) or re.escape(p) for p in parts) + '(?:/.*)?$')


def is_sent(name, rules):
    "Does a file reach the builder? The last line of .dockerignore that fits decides, `!` takes a file back in"
    sent = True
    for rule in map(str.strip, rules):
        if rule and not rule.startswith('#') and _pattern(rule.removeprefix('!')).match(name):
            sent = rule.startswith('!')
    return sent


def _with(steps, op):
    return [s for s in steps if s.op == op]


def check_dockerfile(path):
    "Faults that can be seen without building; the folder that the file lies in is the one that is sent"
    path, found = Path(path), []
    steps, ignore = docker_steps(path), path.parent / '.dockerignore'
    rules = ignore.read_text(encoding='utf-8').splitlines() if ignore.is_file() else []
    for s in steps:
        if s.op == 'FROM' and (':' not in s.arg or ':latest' in s.arg):
            found.append((s, f'{s.arg} has no fixed version'))
        if s.op == 'ADD':
            found.append((s, 'COPY says what it does, ADD also unpacks and downloads'))
        if s.op == 'COPY':
            found += [(s, fault) for fault in _copy_faults(path, s, rules)]
        if s.op == 'RUN':
            found += [(s, fault) for fault in _run_faults(s.arg)]
        if s.op in ('ENV', 'ARG') and re.search(r'(KEY|TOKEN|PASSWORD|SECRET)\w*=\S', s.arg):
            found.append((s, 'a secret would stay in the image'))
    out = [f'{path.name}, line {s.line}: {fault}' for s, fault in found]
    users = _with(steps, 'USER')
    if not users or users[-1].arg in ('root', '0'):
        out.append(f'{path.name}: runs as root; end with USER and another name')
    for op in ('EXPOSE', 'HEALTHCHECK', 'CMD'):
        if not _with(steps, op):
            out.append(f'{path.name}: no {op}')
    if commands := _with(steps, 'CMD'):
        out += _port_faults(path, steps, commands[-1])
    return out


def _copy_faults(path, step, rules):
    "Sources that are not there or are kept away"
    if '--from=' in step.arg:
        return
    if step.arg.startswith('['):
        words = json.loads(step.arg)
    else:
        words = [w for w in step.arg.split() if not w.startswith('--')]
    for source in words[:-1]:
        if not (path.parent / source).exists():
            yield f'{source} is not there'
        elif not is_sent(source.rstrip('/'), rules):
            yield f'.dockerignore keeps {source} away'


def _run_faults(command):
    "What a RUN line lacks"
    if 'apt-get install' in command:
        if '--no-install-recommends' not in command:
            yield 'apt-get install without --no-install-recommends'
        if 'rm -rf /var/lib/apt/lists' not in command:
            yield 'the lists of apt stay in the layer'
        if 'apt-get update' not in command:
            yield 'apt-get install without apt-get update in the same step'
    if 'pip install' in command and '-c ' not in command and '==' not in command:
        yield 'pip install without -c constraints.txt: another version every month'
    if re.search(r'\bsudo\b|curl [^|]*\| *(ba)?sh', command):
        yield 'no sudo and no script from the net in a build'


def _port(text):
    "The port that a command or a health check names"
    found = re.search(r'--port"?,? *"?(\d+)|127\.0\.0\.1:(\d+)', text)
    return found and (found[1] or found[2])


def _port_faults(path, steps, command):
    "EXPOSE, HEALTHCHECK and CMD must name one port, and CMD the address that the outside can reach"
    try:
        words = json.loads(command.arg)
    except ValueError:
        yield f'{path.name}, line {command.line}: CMD as one string runs in a shell, which keeps signals from the server: write a list'
        return
    named = {
        op: _port(_with(steps, op)[-1].arg) for op in ('HEALTHCHECK', 'CMD') if _with(steps, op)
    }
    exposed = _with(steps, 'EXPOSE')
    named['EXPOSE'] = exposed[-1].arg if exposed else None
    if len(set(named.values())) > 1:
        yield f'{path.name}: different ports: ' + ', '.join(f'{k} {v}' for k, v in named.items())
    if '0.0.0.0' not in words:
        yield f'{path.name}, line {command.line}: the server listens inside the container only; give --host 0.0.0.0'


def check_compose(path):
    "Faults of a compose file: ports, addresses, and what it waits for"
    path = Path(path)
    if not path.is_file():
        raise ValueError(f'{path}: no such file')
    try:
        services = yaml.safe_load(path.read_text(encoding='utf-8'))['services']
    except (yaml.YAMLError, KeyError, TypeError) as e:
        raise ValueError(f'{path} is not a compose file: {str(e).splitlines()[0]}') from None
    image = []
    for service in services.values():
        file = path.parent / str(service.get('build', '.')) / 'Dockerfile'
        if not image and file.is_file():
            image = docker_steps(file)
    defaults = [json.loads(s.arg) for s in _with(image, 'CMD')]
    commands = {k: s.get('command') or (defaults or [[]])[0] for k, s in services.items()}
    healthy = ' '.join(s.arg for s in _with(image, 'HEALTHCHECK'))
    return [
        f'{name}: {fault}'
        for name, service in services.items()
        for fault in _service_faults(name, service, services, commands, healthy)
    ]


def _service_faults(name, service, services, commands, healthy):
    words = commands[name]
    port = words[words.index('--port') + 1] if '--port' in words else None
    for published in map(str, service.get('ports', [])):
        inside = published.split(':')[-1]
        if inside != port:
            yield f'port {inside} is published, but the command listens on {port}'
        if not published.startswith('127.0.0.1:'):
            yield f'{published} is open to the whole network'
    for host, at in re.findall(r'https?://([\w.-]+):(\d+)', ' '.join(words)):
        if host not in services:
            yield f'asks {host}, which is no service here'
        elif at not in commands[host]:
            yield f'asks {host} on {at}, where it does not listen'
    for other in service.get('depends_on', {}):
        if other not in services:
            yield f'waits for {other}, which is no service here'
    if 'healthcheck' in service:
        if port not in str(service['healthcheck'].get('test', '')):
            yield f'its healthcheck asks another port than {port}'
    elif port not in healthy:
        yield f"the image's healthcheck asks another port than {port}"
