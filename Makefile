# Everything lives in .venv, with the exact versions of requirements/*.lock; nothing is installed elsewhere.
# Another Python than python3: make PYTHON=python3.12 test

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# Without compiling ahead: only what is imported is ever compiled, and that saves a minute of the installation.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: help setup demo test test-all lint lock

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

setup: $(VENV)/run.stamp  ## install the package, as edited here, and what it needs

demo: setup  ## train, evaluate and export the embedded default, offline, in runs/demo
	rm -rf runs/demo
	$(BIN)/keras-gemma-ft train --config=tiny --workdir=runs/demo
	$(BIN)/keras-gemma-ft evaluate --workdir=runs/demo
	$(BIN)/keras-gemma-ft export --workdir=runs/demo --format=hf,peft

test: lint  ## lint, types and all tests that are not heavy
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not heavy"

test-all: lint  ## the heavy tests, too
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(VENV)/test.stamp  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock:  ## resolve the versions in requirements/*.lock anew (needs uv)
	requirements/make_lock.sh

$(VENV)/run.stamp: requirements/run.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is not: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -r requirements/run.lock
	$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/test.stamp: requirements/test.lock $(VENV)/run.stamp
	$(INSTALL) -r requirements/test.lock
	@touch $@
