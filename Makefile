# make run | test | coverage | lint: each makes what it needs in .venv and is quick when nothing changed.
#   make run ARGS="--preset=smoke"       arguments for run.py
#   make test ARGS="-k lasso"            arguments for pytest
#   make test ARGS="-m slow"             the slow tests, which are left out otherwise
#   make coverage ARGS='-m ""'           over all tests, with slow ones
#   make test PYTHON=python3.12          the interpreter that .venv is made with

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# A test spends most of its time compiling, which takes one core: one process per core, up to four.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1); echo $$((n < 4 ? n : 4)))

# Of the Google convention's rules those that our docstrings keep; that arguments exist is DOC102.
# Left out: words for what Flax calls (D102 there), for magic methods and constructors, and how the
# sections are set: no blank line between them, several arguments on a line.
DOCSTRINGS = --isolated --preview --line-length 100 --select D,DOC102,DOC202,DOC403 \
	--ignore D105,D107,D205,D209,D212,D301,D403,D410,D411,D415,D417 \
	--config 'lint.pydocstyle.convention="google"' \
	--per-file-ignores 'flipad_jax/generators/*.py:D102' \
	--per-file-ignores 'flipad_jax/embedded_features.py:D102' \
	--per-file-ignores 'flipad_jax/inception.py:D102'

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: run test coverage lint clean help

run: $(STAMP)  ## Attribute images with the default experiment
	@$(PY) run.py $(ARGS)

test: $(STAMP)  ## Run the tests
	@$(PY) -m pytest -q -n $(JOBS) --dist loadfile $(ARGS)

coverage: $(STAMP)  ## Run the tests and tell which lines no test reaches (build/coverage)
	@$(PY) -m pytest -q -n $(JOBS) --dist loadfile --cov --cov-report=term --cov-report=html $(ARGS)

lint: $(STAMP)  ## Check format, imports, style, docstrings and types
	@$(PY) -m black --quiet --check --diff --line-length 100 flipad_jax experiments tests benchmarks run.py
	@$(PY) -m isort --quiet --check --diff flipad_jax experiments tests benchmarks run.py
	@$(PY) -m ruff check --quiet $(DOCSTRINGS) flipad_jax experiments benchmarks run.py
	@$(PY) -m flake8 flipad_jax experiments tests benchmarks run.py
	@$(PY) -m mypy

clean:  ## Remove .venv and caches; runs/ stays
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
	@find flipad_jax experiments tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## Show this
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 16

$(STAMP): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flipad_jax needs Python 3.11 or later; give one with PYTHON=...")'
	@echo "Installing into $(VENV); the first time this takes a few minutes."
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install -qq --disable-pip-version-check --editable '.[test]'
	@touch $@
