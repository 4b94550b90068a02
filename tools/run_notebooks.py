"""Run notebooks in order, each in a fresh kernel, on what the ones before have made.

Behind `make tutorial` (the stages and the report) and `make test` (the other notebooks too).
Executed copies go to <run folder>/notebooks/; the first error stops the run and is shown with its notebook and cell.
What has run and has not changed since is left out, so a run that was stopped goes on where it was: --fresh begins anew.
With `--jobs N` the notebooks behind the stages run N folders at a time: each reads what the stages have made.
Cells marked `#| slow` or `#| eval: false` are left as saved, and so are whole notebooks that say `#| slow` in one of their first three cells.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from notebooks import NBS, ROOT, all_notebooks, name, stages

SLOW = re.compile(r'^#\|\s*(slow|eval:\s*false)\s*$', re.M | re.I)
ANSI = re.compile(r'\x1b\[[0-9;]*m')
SIGN_OF_LIFE = 30  # seconds between two lines about a notebook that is still running


@dataclass
class Job:
    "One notebook to execute"

    path: Path
    copy: Path  # where the executed copy goes
    number: int
    of: int
    timeout: int | None  # seconds that a cell may take; None: as long as it needs


def is_slow(cell):
    return cell.cell_type == 'code' and bool(SLOW.search(cell.source))


def runnable(paths):
    "Without the notebooks that are slow as a whole"
    import nbformat

    return [p for p in paths if not any(map(is_slow, nbformat.read(p, as_version=4).cells[:3]))]


def clock(seconds):
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'


class Progress:
    "One line a notebook; on a terminal it moves with each cell, elsewhere it shows a sign of life every half minute"

    def __init__(self, job, cells, alone=True):
        self.head = f'[{job.number:2d}/{job.of}] {name(job.path):<26}'
        self.cells, self.cell, self.start = cells, 0, time.time()
        self.moves = alone and sys.stdout.isatty()
        self.ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def line(self, more=''):
        took = clock(time.time() - self.start)
        return f'{self.head} cell {self.cell:3d}/{self.cells}  {took}{more}'

    def _watch(self):
        while not self.ended.wait(1 if self.moves else SIGN_OF_LIFE):
            self.show(' ...')

    def show(self, more=''):
        print(
            '\r' + self.line(more) if self.moves else self.line(more),
            flush=True,
            end='' if self.moves else '\n',
        )

    def at(self, cell):
        self.cell = cell
        if self.moves:
            self.show()

    def end(self, word):
        self.ended.set()
        print(('\r' if self.moves else '') + self.line('  ' + word), flush=True)


def peak_mb(pid):
    "Peak resident memory of a process in MB, 0 where the system does not tell"
    try:
        status = Path(f'/proc/{pid}/status').read_text()
    except OSError:
        return 0
    found = re.search(r'VmHWM:\s+(\d+)', status)
    return int(found[1]) // 1024 if found else 0


@contextmanager
def saving(notebook, path):
    "Write `notebook` to `path` at the end, whole, even after an error"
    import nbformat

    try:
        yield
    finally:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f'.{path.name}.partial-{os.getpid()}')
        nbformat.write(notebook, partial)
        partial.replace(path)


def execute(job, alone=True):
    "Execute one notebook; its peak memory in MB, or exit with the error shown"
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    notebook = nbformat.read(job.path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=job.timeout,
        kernel_name='python3',
        resources={'metadata': {'path': str(job.path.parent)}},  # as JupyterLab opens it
        extra_arguments=['--log-level=ERROR'],
    )
    progress, peak = Progress(job, len(notebook.cells), alone), 0
    try:
        with saving(notebook, job.copy), client.setup_kernel():
            for i, cell in enumerate(notebook.cells):
                progress.at(i + 1)
                if cell.cell_type == 'code' and not is_slow(cell):
                    client.execute_cell(cell, i)
            peak = peak_mb(client.km.provisioner.pid)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        progress.end('failed')
        text = str(error) if sys.stdout.isatty() else ANSI.sub('', str(error))
        where = f'{job.path.relative_to(ROOT)}, cell {progress.cell} of {progress.cells}'
        sys.exit(f'\nerror in {where}:\n\n{text.strip()}\n\nAs far as it came: {job.copy}')
    progress.end('done' + (f', peak {peak} MB' if peak else ''))
    return peak


def is_noise(output):
    "Progress bars, and warnings that name this machine's files or come from libraries"
    if output.get('name') != 'stderr':
        return False
    noise = r'\[transformers\]|W\d{4} |\s*(\x1b\[A)?\s*$|.*\r'
    return sys.prefix in output.text or bool(re.match(noise, output.text))


def save_back(job):
    "Put the outputs of an executed copy into nbs/, keeping those of the cells that were not run"
    import nbformat

    notebook = nbformat.read(job.copy, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == 'code':
            cell.outputs = [o for o in cell.outputs if not is_noise(o)]
    nbformat.write(notebook, job.path)
    clean = Path(sys.executable).parent / 'nbdev_clean'
    subprocess.run([clean, '--fname', job.path], cwd=ROOT, check=True)


class Done:
    "Which notebooks have run, and what they were when they did: `<run folder>/notebooks/done.json`"

    def __init__(self, folder, recipe):
        self.file, self.recipe = folder / 'done.json', recipe
        self.sums = json.loads(self.file.read_text()) if self.file.exists() else {}

    def sum(self, path):
        "Of a notebook's cells, the recipe, and every module of ours"
        digest = hashlib.sha256(self.recipe.encode())
        for module in sorted((ROOT / 'llama_zh_nb').rglob('*.py')):
            digest.update(module.read_bytes())
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        digest.update(json.dumps([c['source'] for c in cells]).encode())
        return digest.hexdigest()

    def has(self, job):
        return job.copy.exists() and self.sums.get(name(job.path)) == self.sum(job.path)

    def add(self, job):
        self.sums[name(job.path)] = self.sum(job.path)
        self.file.write_text(json.dumps(self.sums, indent=1))

    def forget(self, jobs):
        "A stage runs anew: what was made from it counts no longer"
        for job in jobs:
            self.sums.pop(name(job.path), None)


def run_stages(jobs, done, save):
    "The pipeline in order; yields peaks in MB"
    for i, job in enumerate(jobs):
        if done.has(job) and not save:
            print(f'[{job.number:2d}/{job.of}] {name(job.path):<26} done before', flush=True)
            continue
        done.forget(jobs[i:])
        yield execute(job)
        done.add(job)
        if save:
            save_back(job)


def run_folder(jobs, save):
    "The notebooks of one folder, one after the other; their peaks in MB"
    # two kernels with a thread for every core each would wait for one another
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    peaks = []
    for job in jobs:
        peaks.append(execute(job, alone=False))
        if save:
            save_back(job)
    return peaks


def run_sub_packages(jobs, at_a_time, save):
    "The other notebooks, `at_a_time` folders at the same time; yields peaks in MB"
    lanes = [list(folder) for _, folder in groupby(jobs, lambda job: job.path.parent)]
    with ProcessPoolExecutor(at_a_time) as pool:
        running = [pool.submit(run_folder, lane, save) for lane in lanes]
        try:
            for lane in as_completed(running):
                yield from lane.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def chosen(paths, wanted):
    "Those whose names begin like one of `wanted`, as `06` or `documents/`; all if none is wanted"
    wanted = [w.removeprefix('nbs/').removesuffix('.ipynb') for w in wanted]
    return [p for p in paths if not wanted or name(p).startswith(tuple(wanted))]


def arguments():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('notebooks', nargs='*', help='only these: names or beginnings of names')
    p.add_argument(
        '--stages', action='store_true', help='the stages alone, and not the sub-packages'
    )
    p.add_argument('--recipe', default='mini', help='recipe: a preset or a YAML file')
    p.add_argument('--runs', type=Path, default=ROOT / 'runs', help='holds the run folders')
    p.add_argument('--fresh', action='store_true', help='empty the run folder first')
    p.add_argument('--report', action='store_true', help='finish with run.json and report.html')
    p.add_argument('--save', action='store_true', help='put the outputs into nbs/ (maintainers)')
    p.add_argument('--jobs', type=int, default=1, help='folders at a time, behind the stages')
    p.add_argument('--timeout', type=int, default=None, help='seconds that a cell may take')
    return p.parse_args()


def main():
    a = arguments()
    # text progress bars are what we want here
    os.environ.setdefault('PYTHONWARNINGS', 'ignore:IProgress not found')
    os.environ.update(LLAMA_ZH_RUNS=str(a.runs.resolve()), LLAMA_ZH_RECIPE=a.recipe)
    from llama_zh_nb.recipes import get_recipe, run_dir

    run = Path(run_dir(get_recipe(a.recipe))).resolve()
    if a.fresh:
        shutil.rmtree(run, ignore_errors=True)
    copies = run / 'notebooks'
    copies.mkdir(parents=True, exist_ok=True)

    paths = runnable(chosen(stages() if a.stages else all_notebooks(), a.notebooks))
    if not paths:
        sys.exit(f'error: no notebook of nbs/ is called {" or ".join(a.notebooks)}')
    jobs = [
        Job(p, copies / p.relative_to(NBS), i, len(paths), a.timeout)
        for i, p in enumerate(paths, 1)
    ]
    start, done = time.time(), Done(copies, a.recipe)
    pipeline = [j for j in jobs if j.path.parent == NBS]
    peaks = list(run_stages(pipeline, done, a.save))
    took = clock(time.time() - start)
    peaks += run_sub_packages(jobs[len(pipeline) :], a.jobs, a.save)
    total = clock(time.time() - start)
    print(
        f'{len(jobs)} notebooks in {total} (stages {took}), '
        f'peak memory {max(peaks, default=0)} MB; executed copies: {copies}/'
    )
    if a.report:
        command = Path(sys.executable).parent / 'llama-zh'
        subprocess.run([command, 'report', run], check=True)


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('\nstopped; the same command goes on from here')
