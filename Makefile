# From a bare Python 3.11 or later: every target makes .venv from constraints.txt if needed, and needs no network after that.
.DEFAULT_GOAL := help
PY := .venv/bin/python
RECIPE ?= mini
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.NOTPARALLEL:
.PHONY: help venv tutorial test test-all style notebooks-clean notebooks-run docs lab readme clean

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

venv:  ## make .venv and install, if not yet done
	@tools/env.sh

tutorial: venv  ## run the fourteen stages, end to end, on mini -> runs/mini/report.html
	@echo "== the stages, notebook by notebook, recipe $(RECIPE)"
	@$(PY) tools/run_notebooks.py --stages --recipe $(RECIPE) --report

test: venv style notebooks-clean notebooks-run  ## all checks: style, modules and notebooks agree, every notebook runs, tests
	@tools/browser.sh
	@echo "== tests"
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20 tests

test-all: venv style notebooks-clean notebooks-run  ## the same and the tests marked slow
	@tools/browser.sh
	@echo "== tests, the slow ones too"
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20 tests --slow

style: venv
	@echo "== ruff, over notebooks, tests, benchmarks and tools"
	@.venv/bin/ruff format --quiet --diff nbs tests benchmarks tools || { echo 'Type: .venv/bin/ruff format nbs tests benchmarks tools'; exit 1; }
	@.venv/bin/ruff check --quiet nbs tests benchmarks tools
	@# what a notebook's other cells bring or use does not count in its module
	@.venv/bin/ruff check --quiet --isolated --select F401,F821 --exclude _modidx.py llama_zh_nb

notebooks-clean: venv
	@echo "== modules equal notebooks, notebooks are clean"
	@$(PY) tools/check_clean.py

notebooks-run: venv
	@echo "== every notebook and the tests in it, in a fresh run folder"
	@$(PY) tools/run_notebooks.py --recipe mini --runs runs/test --fresh --jobs 2 --report

docs: venv  ## build the site into _docs/, with Quarto where it is installed, else with Sphinx
	@$(PY) tools/docs.py

lab: venv  ## open the notebooks in JupyterLab
	@$(PY) -m jupyterlab nbs

readme: venv  ## make README.md and README_ZH.md from nbs/index.ipynb and nbs/index_zh.ipynb
	@$(PY) tools/readme.py

clean:  ## remove what builds and runs left: .venv, runs/, the site, caches
	rm -rf .venv runs logs nbs/logs _docs _proc build dist *.egg-info .pytest_cache nbs/nbdev.yml
	find . -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
