"""The plan of the package: four layers with imports only down, ordinary imports, one place for a name."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / 'llama_zh_nb'
# stages in the order in which the pipeline runs; a stage may use an earlier one
STAGES = (
    'recipes weights corpus vocab embeddings pretrain sft quantize rag chat serve evaluate'.split()
)
FACE = '__init__'  # offers names by their addresses, loaded on first use


def layer(module):
    "0: core, 1: another sub-package, 2: a stage, 3: app; the package's face stands above all"
    top = module.split('.')[0]
    if module == FACE:
        return 4
    if top in ('core', 'app'):
        return 3 * (top == 'app')
    return 2 if module in STAGES else 1


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' and len(parts) > 1 else parts)


@pytest.fixture(scope='module')
def trees():
    "{module: syntax tree} of all modules, packages without code left out"
    paths = [p for p in sorted(PACKAGE.rglob('*.py')) if p.name != '_modidx.py']
    trees = {name_of(p): ast.parse(p.read_text(encoding='utf-8')) for p in paths}
    assert len(trees) > 50 and set(STAGES) < set(trees)
    return trees


def known(dotted, names):
    "The longest beginning of `dotted` that is a module"
    parts = dotted.split('.')
    while parts and '.'.join(parts) not in names:
        parts.pop()
    return '.'.join(parts)


def imports(module, tree, names):
    "Modules of the package that `module` imports, at the top or inside a function"
    package = module.split('.')[:-1] if module != FACE else []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
                root = '.'.join([*base, *(node.module or '').split('.')]).strip('.')
            elif (node.module or '').split('.')[0] == PACKAGE.name:
                root = '.'.join(node.module.split('.')[1:])
            else:
                continue
            targets = ['.'.join(filter(None, (root, a.name))) for a in node.names]
        elif isinstance(node, ast.Import):
            own = [a.name for a in node.names if a.name.startswith(PACKAGE.name + '.')]
            targets = [name.split('.', 1)[1] for name in own]
        else:
            continue
        yield from (t for t in (known(t, names) for t in targets) if t and t != module)


@pytest.fixture(scope='module')
def arrows(trees):
    return {m: set(imports(m, t, trees)) for m, t in trees.items()}


def test_arrows_only_go_down(arrows):
    climbing = [
        f'{a} -> {b}' for a, targets in arrows.items() for b in targets if layer(b) > layer(a)
    ]
    late = [
        f'{a} -> {b}'
        for a, targets in arrows.items()
        for b in targets
        if a in STAGES and b in STAGES and STAGES.index(b) > STAGES.index(a)
    ]
    assert climbing + late == []


def circle(arrows):
    "A circle of modules, or nothing"
    done, path = set(), []

    def visit(m):
        if m in path:
            return path[path.index(m) :] + [m]
        if m in done:
            return None
        path.append(m)
        found = next(filter(None, map(visit, sorted(arrows[m]))), None)
        path.pop()
        done.add(m)
        return found

    return next(filter(None, map(visit, arrows)), None)


def test_no_circle(arrows):
    assert circle(arrows) is None


def test_a_circle_is_found():
    assert circle({'a': {'b'}, 'b': {'c'}, 'c': {'b'}}) == ['b', 'c', 'b']


def begins_with_us(node):
    "Is it a string, plain or put together, that names a module of ours?"
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[0]
    value = getattr(node, 'value', None)
    return isinstance(value, str) and (
        value == PACKAGE.name or value.startswith(f'{PACKAGE.name}.')
    )


def hidden_imports(tree):
    "Calls of an importing function with one of our own modules as a string"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args or not begins_with_us(node.args[0]):
            continue
        function = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
        if function in ('need', 'import_module', '__import__'):
            yield node.lineno


def test_no_import_through_a_string(trees):
    found = {m: list(hidden_imports(t)) for m, t in trees.items() if m != FACE}
    assert {m: lines for m, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    'code',
    [
        "need('llama_zh_nb.vocab')",
        "importlib.import_module(f'llama_zh_nb.{name}')",
        "__import__('llama_zh_nb.sft')",
    ],
)
def test_hidden_imports_are_found(code):
    assert list(hidden_imports(ast.parse(code))) == [1]


def test_one_place_for_a_public_name(trees):
    places = defaultdict(set)
    for module, tree in trees.items():
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith('_'):
                continue
            if 'patch' not in [getattr(d, 'id', '') for d in node.decorator_list]:  # a method
                places[node.name].add(module)
    assert {name: sorted(m) for name, m in places.items() if len(m) > 1} == {}
