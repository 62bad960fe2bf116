# `make` lists the targets. Everything happens in one virtual environment, .venv, that the first target makes.

PYTHON ?= python3
# Two workers suit two cores; `make test JOBS=8` on a bigger machine.
JOBS ?= 2
# The tested torch. For the CPU build, 200 MB in place of gigabytes: TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH := torch==2.13.0
TORCH_INDEX ?=

CONSTRAINTS := constraints.txt
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Workers that each start a thread per core fight; tests must not reach for the hub.
QUIET := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-distributed test-chaos test-lowest check fmt docs bench gpu-check clean
.DELETE_ON_ERROR:

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-18s %s\n", $$1, $$2}'

demo: $(VENV)/installed ## distil a teacher into a student on this machine's CPU, without a download; prints where the report lies
	$(BIN)/trl-distill run recipes/quickstart --accelerate_config cpu

test: $(VENV)/installed-dev ## the default test suite
	$(QUIET) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-slow: $(VENV)/installed-dev ## the tests marked slow: real models and real text, where they are on this disk
	$(QUIET) $(BIN)/python -m pytest -m 'slow and not gpu'

test-distributed: $(VENV)/installed-dev ## the tests that start several processes
	$(QUIET) $(BIN)/python -m pytest -m 'distributed and not gpu'

test-chaos: $(VENV)/installed-dev ## kill every stage at random moments, 100 times in all, and compare what it makes in the end
	$(QUIET) $(BIN)/python -m pytest -m chaos

test-lowest: ## the default test suite with the lowest versions that pyproject.toml declares, in .venv-lowest
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

check: $(VENV)/installed-dev ## lint, format, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(QUIET) $(BIN)/python -m pytest -q tests/invariant/test_import_rules.py

fmt: $(VENV)/installed-dev ## format the code, mend what the linter can, and write the tables of options in docs/stages/
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python docs/option_tables.py

docs: $(VENV)/installed-docs ## build the documentation into site/, strictly: a broken link or reference fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "site/index.html"

bench: $(VENV)/installed-dev ## run every benchmark in its quick form
	@for benchmark in $(wildcard benchmarks/*.py); do echo "== $$benchmark"; $(BIN)/python $$benchmark --quick || exit 1; done

gpu-check: $(VENV)/installed-dev ## on a machine with a GPU: tests, exactness, ceilings and all tables, in nine minutes, to benchmarks/results/gpu.*
	$(BIN)/python benchmarks/gpu_check.py --output benchmarks/results/gpu

clean: ## remove the virtual environment and caches; results (runs/) stay
	rm -rf $(VENV) .venv-lowest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis htmlcov .coverage

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and by itself: so a wheel that lies on this disk, or another index, can serve it.
$(VENV)/installed: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) -c $(CONSTRAINTS) -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(PIP) -c $(CONSTRAINTS) -e '.[docs]'
	@touch $@
