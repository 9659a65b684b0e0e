# Two commands on a fresh machine: `make demo` and `make test`. Each builds .venv first where it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Touched once everything is installed, so that a build that was cut short is taken up again.
STAMP := $(VENV)/.installed
OUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test fast check bench docs wheel-check
.DELETE_ON_ERROR:

help:
	@echo "make demo   train the bundled model on tic-tac-toe on a CPU, and leave a report"
	@echo "make test   check, then run the tests"
	@echo "make fast   check, then the tests that take seconds"
	@echo "make check  lint, format and types"
	@echo "make bench  measure kernels and sandbox on this machine"
	@echo "make docs   build the documentation site in site/"
	@echo "make wheel-check  build a wheel, and try it in a fresh environment away from the checkout"

demo: $(STAMP)
	@$(BIN)/etpo train --dataset tic-tac-toe --steps 500 --seed 0 --device cpu --out $(OUT)
	@echo "report: $(OUT)/report.html"

test: check
	HF_HUB_OFFLINE=1 $(BIN)/pytest --import-mode=importlib

fast: check
	HF_HUB_OFFLINE=1 $(BIN)/pytest --import-mode=importlib -m "not slow"

bench: $(STAMP)
	$(BIN)/etpo bench kernels --shapes nano
	$(BIN)/etpo bench sandbox

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -P -m mkdocs build --strict

wheel-check:
	tests/wheel_check.sh $(PYTHON)

docs/options.md: engine/config.py engine/options.py cli/options.py engine/learners/__init__.py engine/rates.py $(STAMP)
	$(BIN)/python -P -m etpo.cli.options > $@

$(STAMP): pyproject.toml constraints.txt
	@echo "building $(VENV): PyTorch and the other dependencies, a few minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	@touch $@
