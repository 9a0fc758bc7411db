PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/digits

.PHONY: help setup run test lint slow faults bench clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[test,tensorboard]"
	@touch $@

setup: $(VENV)/.ready  ## make the virtual environment

run: setup  ## train on scikit-learn's digits, evaluate, draw
	$(BIN)/python -m diffjax train --config=configs/digits.py --workdir=$(WORKDIR)
	$(BIN)/python -m diffjax eval --workdir=$(WORKDIR)

test: setup  ## lint and the fast tests
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 -m "not slow and not faults"

slow: setup  ## tests that train for minutes
	$(BIN)/python -m pytest -m slow

faults: setup  ## kill and corrupt runs, many times
	$(BIN)/python -m pytest -m faults

bench: setup  ## timings on this machine, written to benchmarks/results
	PYTHONPATH=. $(BIN)/python benchmarks/step_time.py

lint: setup  ## ruff
	$(BIN)/ruff check .

clean:  ## remove what make made, except runs/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .jax_cache
