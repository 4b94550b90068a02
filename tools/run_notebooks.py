"""Run the notebooks of the path in order, each in a fresh kernel, on what the one before made.

Behind `make tutorial` and `make test`. Executed copies go to <run folder>/notebooks/; the first error stops the run and is shown with its notebook and cell.
With `--jobs N` the chapters behind the path's own (01-08) run N at a time: each of them reads what the path has made, and nothing of another one's.
Cells marked `#| slow` or `#| eval: false` are left as saved, and so are whole notebooks that say `#| slow` in one of their first three cells.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / 'nbs'
SLOW = re.compile(r'^#\|\s*(slow|eval:\s*false)\s*$', re.M | re.I)
ANSI = re.compile(r'\x1b\[[0-9;]*m')


def is_slow(cell):
    return cell.cell_type == 'code' and bool(SLOW.search(cell.source))


def path_notebooks():
    "The notebooks to run, in the order of the site's sidebar."
    import nbformat
    import yaml

    entries = yaml.safe_load((ROOT / '_quarto.yml').read_text(encoding='utf-8'))['website'][
        'sidebar'
    ]['contents']
    flat = [
        f
        for o in entries
        for f in (o['contents'] if isinstance(o, dict) and 'section' in o else [o])
    ]
    nbs = [NBS / f for f in flat if isinstance(f, str) and re.match(r'\d\d_', f)]
    return [p for p in nbs if not any(map(is_slow, nbformat.read(p, as_version=4).cells[:3]))]


def clock(secs):
    return f'{int(secs) // 60}:{int(secs) % 60:02d}'


class Progress:
    "One line a notebook; on a terminal it moves with each cell, elsewhere it speaks up every half minute."

    def __init__(self, i, n, name, cells, alone=True):
        self.head, self.cells, self.t0, self.said = (
            f'[{i:2d}/{n}] {name:<18}',
            cells,
            time.time(),
            time.time(),
        )
        self.tty = alone and sys.stdout.isatty()

    def line(self, j, s=''):
        return f'{self.head} cell {j:3d}/{self.cells}  {clock(time.time() - self.t0)}{s}'

    def __call__(self, j):
        if self.tty:
            print('\r' + self.line(j), end='', flush=True)
        elif time.time() - self.said > 30:
            self.said = time.time()
            print(self.line(j, ' ...'), flush=True)

    def end(self, j, s):
        print(('\r' if self.tty else '') + self.line(j, '  ' + s), flush=True)


def peak_mb(pid):
    "Peak resident memory of a process in MB, where the system tells; else None."
    try:
        return int(re.search(r'VmHWM:\s+(\d+)', Path(f'/proc/{pid}/status').read_text())[1]) // 1024
    except (OSError, TypeError):
        return None


@contextmanager
def saving(nb, dest):
    "Write `nb` to `dest` at the end, whole, even after an error."
    import nbformat

    try:
        yield
    finally:
        tmp = dest.with_name(f'.{dest.name}.partial-{os.getpid()}')
        nbformat.write(nb, tmp)
        tmp.replace(dest)


def run_one(path, dest, i, n, timeout, alone=True):
    "Execute one notebook; its peak memory in MB (0 where the system does not tell), or exit with the error shown."
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    nb = nbformat.read(path, as_version=4)
    client = NotebookClient(
        nb,
        timeout=timeout,
        kernel_name='python3',
        resources={'metadata': {'path': str(NBS)}},
        extra_arguments=['--log-level=ERROR'],
    )
    show, j, mb = Progress(i, n, path.stem, len(nb.cells), alone), 0, None
    try:
        with saving(nb, dest), client.setup_kernel():
            for j, cell in enumerate(nb.cells, 1):
                show(j)
                if cell.cell_type == 'code' and not is_slow(cell):
                    client.execute_cell(cell, j - 1)
            mb = peak_mb(client.km.provisioner.pid)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as e:
        show.end(j, 'failed')
        text = str(e) if sys.stdout.isatty() else ANSI.sub('', str(e))
        sys.exit(
            f'\nerror in {path.relative_to(ROOT)}, cell {j} of {len(nb.cells)}:\n\n{text.strip()}\n\nThe notebook as far as it came: {dest}'
        )
    show.end(j, 'done' + (f', peak {mb} MB' if mb else ''))
    return mb or 0


def save_back(path, dest):
    "Put the executed outputs back into nbs/, keeping those of the cells that were not run; progress bars, and warnings that name this machine's files or come from libraries, stay out."
    import nbformat

    nb = nbformat.read(dest, as_version=4)
    noise = lambda o: (
        o.get('name') == 'stderr'
        and (
            sys.prefix in o.text
            or re.match(r'\[transformers\]|W\d{4} |\s*(\x1b\[A)?\s*$|.*\r', o.text)
        )
    )
    for c in nb.cells:
        if c.cell_type == 'code':
            c.outputs = [o for o in c.outputs if not noise(o)]
    nbformat.write(nb, path)
    subprocess.run(
        [str(Path(sys.executable).parent / 'nbdev_clean'), '--fname', str(path)],
        cwd=ROOT,
        check=True,
    )


def run_chapter(some):
    "Notebooks of one chapter, one after the other; their peaks in MB"
    os.environ.setdefault(
        'OMP_NUM_THREADS', '1'
    )  # two kernels with a thread for every core each wait for one another
    return [run_one(*a, alone=False) for a in some]


def run_all(todo, jobs, save):
    "Peaks in MB of all notebooks: the path in order, then the chapters that only read what it made, `jobs` at a time"
    chapter, peaks = lambda a: a[0].name[:2], []
    first = (
        len(todo)
        if jobs == 1
        else 1 + max((i for i, a in enumerate(todo) if '01' <= chapter(a) <= '08'), default=-1)
    )
    for a in todo[:first]:
        peaks.append(run_one(*a))
        if save:
            save_back(*a[:2])
    with ProcessPoolExecutor(jobs) as pool:
        lanes = [pool.submit(run_chapter, list(c)) for _, c in groupby(todo[first:], chapter)]
        try:
            for l in as_completed(lanes):
                peaks += l.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return peaks


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        'notebooks',
        nargs='*',
        help='only these (names or beginnings of names); default: all of the path',
    )
    p.add_argument('--recipe', default='mini', help='recipe: a preset or a YAML file')
    p.add_argument(
        '--runs', type=Path, default=ROOT / 'runs', help='folder that holds the run folders'
    )
    p.add_argument('--fresh', action='store_true', help='empty the run folder first')
    p.add_argument('--report', action='store_true', help='finish with run.json and report.html')
    p.add_argument(
        '--save', action='store_true', help='write the outputs back into nbs/ (for maintainers)'
    )
    p.add_argument('--jobs', type=int, default=1, help='chapters at a time, from 09 on')
    p.add_argument('--timeout', type=int, default=1200, help='seconds a single cell may take')
    a = p.parse_args()
    if a.save and a.jobs > 1:
        p.error(
            '--save shows times and memory: with it the notebooks run one at a time, leave --jobs out'
        )

    os.environ.setdefault(
        'PYTHONWARNINGS', 'ignore:IProgress not found'
    )  # text progress bars are what we want here
    os.environ.update(LLAMA_ZH_RUNS=str(a.runs.resolve()), LLAMA_ZH_RECIPE=a.recipe)
    from llama_zh_nb.recipes import get_recipe, run_dir

    run = Path(run_dir(get_recipe(a.recipe))).resolve()
    if a.fresh:
        shutil.rmtree(run, ignore_errors=True)
    (run / 'notebooks').mkdir(parents=True, exist_ok=True)

    todo = path_notebooks()
    if a.notebooks:
        todo = [t for t in todo if any(t.name.startswith(Path(o).name) for o in a.notebooks)]
    if not todo:
        sys.exit(f'error: no notebook of nbs/ is called {" or ".join(a.notebooks)}')
    t0, dest = time.time(), run / 'notebooks'
    todo = [(path, dest / path.name, i, len(todo), a.timeout) for i, path in enumerate(todo, 1)]
    peaks = run_all(todo, a.jobs, a.save)
    print(
        f'{len(todo)} notebooks in {clock(time.time() - t0)}, peak memory {max(peaks)} MB; executed copies: {run}/notebooks/'
    )
    if a.report:
        subprocess.run(
            [str(Path(sys.executable).parent / 'llama-zh'), 'report', str(run)], check=True
        )


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('\nstopped; what was made so far is kept and will be used next time')
