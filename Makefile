# Everything a developer types. Each target sets up its own environment (.venv, pinned) once.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
RUN_STAMP := $(VENV)/.ready-to-run
DEV_STAMP := $(VENV)/.ready-to-develop

.DEFAULT_GOAL := help
.PHONY: help train test check format lint types test-slow fuzz test-mac bench clean

help: ## Say what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1	/' | expand -t 18

train: $(RUN_STAMP) ## Train the default model on MNIST (ARGS="--epochs 1" adds options)
	$(BIN)/ane-trainer train mnist $(ARGS)

test: $(DEV_STAMP) ## Run the tests (ARGS="-k word" adds options)
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

check: lint types test ## Everything that must be green: ruff, mypy strict, the tests

lint: $(DEV_STAMP) ## Ruff's rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV_STAMP) ## mypy, strict
	$(BIN)/mypy

format: $(DEV_STAMP) ## Put the code into ruff's form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test-slow: $(DEV_STAMP) ## The tests that take minutes: full training runs
	$(BIN)/python -m pytest -m "slow and not mac" $(ARGS)

fuzz: $(DEV_STAMP) ## A million mutated MIL texts, then the property tests with many more examples
	$(BIN)/python -m tests.ane.mil.text.fuzz_parser --inputs 1000000
	$(BIN)/python -m pytest -n $(JOBS) -m "hypothesis and not mac" --hypothesis-profile=fuzz $(ARGS)

test-mac: $(DEV_STAMP) ## The tests that need the engine of an Apple silicon Mac
	$(BIN)/python -m pytest -m mac $(ARGS)

bench: $(DEV_STAMP) ## Speed of the simulator against PyTorch, as ratios
	$(BIN)/python -m bench

clean: ## Remove the environment and caches; runs/ and downloaded data stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: needs Python 3.11 to 3.14; none found. Install one, or: make PYTHON=/path/to/python3" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(RUN_STAMP): requirements/base.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/base.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

$(DEV_STAMP): requirements/dev.txt $(RUN_STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	@touch $@
