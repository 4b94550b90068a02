"""An interpreter for the part of Go's text/template that Ollama's templates here use: text, variables, `if`, `else if`, `range`."""

import re

_ACTION = re.compile(r'\{\{ (.*?) \}\}', re.S)


def go_render(template, messages):
    "What Ollama gives the model for OpenAI messages, BOS in front left out"
    nodes, _ = _parse(_ACTION.split(template))
    turns = [dict(Role=m['role'], Content=m['content']) for m in messages]
    return _run(nodes, {}, dict(Messages=turns))


def _parse(parts, i=0):
    "Parts are text and action by turns; nodes up to the next `else` or `end`: text | (action, [(condition, body)])"
    nodes = []
    while i < len(parts):
        part, is_text, i = parts[i], i % 2 == 0, i + 1
        if is_text:
            nodes.append(part)
        elif part == 'end' or part.startswith('else'):
            return nodes, i - 1
        elif part.startswith(('if ', 'range ')):
            node, i = _parse_block(part, parts, i)
            nodes.append(node)
        else:
            nodes.append((part, None))
    return nodes, i


def _parse_block(opening, parts, i):
    "An `if` with its branches, or a `range`"
    kind, _, condition = opening.partition(' ')
    branches = []
    while True:
        body, i = _parse(parts, i)
        branches.append((condition, body))
        if i >= len(parts):
            raise ValueError(f'the template has no end for {{{{ {opening} }}}}')
        part, i = parts[i], i + 1
        if part == 'end':
            return (kind, branches), i
        condition = part.removeprefix('else').strip().removeprefix('if ').strip()


def _value(expression, variables, dot):
    "An expression: a variable, a field, a literal, `not x`, `eq a b`"
    x = expression.strip()
    if x.startswith('not '):
        return not _value(x[4:], variables, dot)
    if x.startswith('eq '):
        a, b = x[3:].split(' ', 1)
        return _value(a, variables, dot) == _value(b, variables, dot)
    if x in variables:
        return variables[x]
    if x.startswith('.'):
        return dot[x[1:]]
    if x.startswith('"'):
        return x[1:-1]
    if x in ('true', 'false'):
        return x == 'true'
    raise ValueError(f'{x!r} is not understood here')


def _run(nodes, variables, dot):
    "The text of nodes; `variables` are changed"
    out = ''
    for node in nodes:
        if isinstance(node, str):
            out += node
            continue
        action, branches = node
        if branches is None:
            assigned = re.fullmatch(r'(\$\w+) :?= (.+)', action)
            if assigned:
                variables[assigned[1]] = _value(assigned[2], variables, dot)
            else:
                out += _value(action, variables, dot)
        elif action == 'range':
            items, body = branches[0]
            for item in _value(items, variables, dot):
                out += _run(body, variables, item)
        else:
            for condition, body in branches:
                if not condition or _value(condition, variables, dot):
                    out += _run(body, variables, dot)
                    break
    return out
