# make run | test | lint: each makes what it needs in .venv and is quick when nothing changed.
#   make run ARGS="--preset=smoke"       arguments for run.py
#   make test ARGS="-k lasso"            arguments for pytest
#   make test ARGS="-m slow"             the slow tests, which are left out otherwise
#   make test PYTHON=python3.12          the interpreter that .venv is made with

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# A test spends most of its time compiling, which takes one core: one process per core, up to four.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1); echo $$((n < 4 ? n : 4)))

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: run test lint clean help

run: $(STAMP)  ## Attribute images with the default experiment
	@$(PY) run.py $(ARGS)

test: $(STAMP)  ## Run the tests
	@$(PY) -m pytest -q -n $(JOBS) --dist loadfile $(ARGS)

lint: $(STAMP)  ## Check format, imports, style and types
	@$(PY) -m black --quiet --check --diff --line-length 100 flipad_jax experiments tests benchmarks run.py
	@$(PY) -m isort --quiet --check --diff flipad_jax experiments tests benchmarks run.py
	@$(PY) -m flake8 flipad_jax experiments tests benchmarks run.py
	@$(PY) -m mypy

clean:  ## Remove .venv and caches; runs/ stays
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .hypothesis
	@find flipad_jax experiments tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## Show this
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 16

$(STAMP): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flipad_jax needs Python 3.11 or later; give one with PYTHON=...")'
	@echo "Installing into $(VENV); the first time this takes a few minutes."
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install -qq --disable-pip-version-check --editable '.[test]'
	@touch $@
