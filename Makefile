# make demo | check | test | fuzz | bench | lint | mutations; each builds .venv first when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# A worker on each core, up to four: each holds torch, and a test computes on one thread.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadgroup

.PHONY: help install demo check test fuzz bench lint format mutations clean

help: ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED) ## build .venv with the library and the tools, at the versions of constraints.txt

$(INSTALLED): pyproject.toml constraints.txt $(wildcard native/*)
	@echo "building $(VENV): about three minutes, for torch and the C++ kernels"
	$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot build it: on Debian, apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED) ## the paper's MNIST experiment on real digits, as a page with its pictures and a verdict
	$(BIN)/batchnorm reproduce mnist

check: lint ## lint, types and the quick tests, in a minute: what nearly every bug fails, and each push runs
	$(PYTEST) -m "not slow"

test: $(INSTALLED) ## the whole test suite, in some minutes
	$(PYTEST)

fuzz: $(INSTALLED) ## a million calls that nobody would write, against the formula in float64; for hours, stop with Ctrl-C
	FUZZ_CALLS=1000000 $(BIN)/python -m pytest tests/fuzz

bench: $(INSTALLED) ## kernels, training steps and inference against torch's; writes benchmarks/RESULTS.md
	$(BIN)/batchnorm bench all --out benchmarks

lint: $(INSTALLED) ## ruff and mypy, as in CI
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

mutations: $(INSTALLED) ## break the code on purpose, a piece at a time, and see the suite turn red
	$(BIN)/python -m tests.mutations

clean: ## remove .venv and what the tools cached
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis
