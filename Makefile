PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/digits
ORACLE ?= .venv-oracle
PARITY ?= runs/parity
SEED ?= 0
COUNT ?= 20
EACH ?= 2

.PHONY: help setup run test lint slow faults bench errors oracle golden parity clean

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
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not faults"

slow: setup  ## tests that train for minutes, and more cases of the others
	$(BIN)/python -m pytest -m slow

faults: setup  ## kill, interrupt, fill and corrupt runs, many times
	$(BIN)/python -m pytest -m faults
	$(BIN)/python -m pytest tests/faults -m "not faults"

bench: setup oracle  ## timings and memory on this machine, written to benchmarks/results (an hour)
	PYTHONPATH=. $(BIN)/python benchmarks/step_time.py
	PYTHONPATH=. $(BIN)/python benchmarks/memory.py
	PYTHONPATH=. $(BIN)/python benchmarks/load_memory.py
	PYTHONPATH=. $(BIN)/python benchmarks/networks.py --oracle $(ORACLE)/bin/python

$(ORACLE)/.ready:
	$(PYTHON) -m venv $(ORACLE)
	$(ORACLE)/bin/pip install --quiet torch==2.13.0  # the CPU build of your platform is enough: set PIP_INDEX_URL to choose it
	$(ORACLE)/bin/pip install --quiet diffusers==0.42.1 transformers==5.23.0 safetensors accelerate peft protobuf scipy sentencepiece torchsde
	$(ORACLE)/bin/pip install --quiet --no-deps k-diffusion einops dctorch torchdiffeq
	@touch $@

oracle: $(ORACLE)/.ready  ## a virtual environment with PyTorch and diffusers, to compare with

golden: oracle  ## the files of PyTorch's runs that the tests read
	HF_HUB_OFFLINE=1 $(ORACLE)/bin/python tests/parity/schedulers.py --out tests/parity/golden
	$(ORACLE)/bin/python tests/parity/optimizers.py --out tests/parity/golden
	HF_HUB_OFFLINE=1 $(ORACLE)/bin/python tests/parity/record.py --out tests/parity/golden/networks
	HF_HUB_OFFLINE=1 $(ORACLE)/bin/python tests/parity/tokens.py --out tests/parity/golden/tokenizers
	HF_HUB_OFFLINE=1 $(ORACLE)/bin/python tests/parity/lora.py --out tests/parity/golden/adapters
	HF_HUB_OFFLINE=1 $(ORACLE)/bin/python tests/parity/lora_pipeline.py --out tests/parity/golden/adapters/lora_pipeline.npz
	HF_HUB_OFFLINE=1 $(ORACLE)/bin/python tests/parity/ip_adapter.py --out tests/parity/golden/adapters
	HF_HUB_OFFLINE=1 $(ORACLE)/bin/python tests/parity/pipelines.py --out tests/parity/golden/pipelines
	HF_HUB_OFFLINE=1 $(ORACLE)/bin/python tests/parity/published.py --out tests/parity/golden/published.json
	HF_HUB_OFFLINE=1 $(ORACLE)/bin/python tests/parity/safety.py --out tests/parity/golden/safety.npz
	HF_HUB_OFFLINE=1 $(ORACLE)/bin/python tests/parity/official_dit.py --out tests/parity/golden/official_dit.npz
	HF_HUB_OFFLINE=1 $(ORACLE)/bin/python tests/parity/originals.py --out tests/parity/golden/originals

parity: setup oracle  ## compare COUNT random configurations of each scheduler and EACH of each family of networks, drawn from SEED, with PyTorch
	rm -rf $(PARITY)
	HF_HUB_OFFLINE=1 $(ORACLE)/bin/python tests/parity/schedulers.py --out $(PARITY)/schedulers --seed $(SEED) --count $(COUNT)
	HF_HUB_OFFLINE=1 $(ORACLE)/bin/python tests/parity/record.py --out $(PARITY)/networks --seed $(SEED) --count $(EACH)
	HF_HUB_OFFLINE=1 $(ORACLE)/bin/python tests/parity/official_dit.py --out $(PARITY)/official_dit --seed $(SEED) --count $(EACH)
	HF_HUB_OFFLINE=1 $(ORACLE)/bin/python tests/parity/lora.py --out $(PARITY)/adapters --seed $(SEED) --count $(EACH)
	HF_HUB_OFFLINE=1 $(ORACLE)/bin/python tests/parity/ip_adapter.py --out $(PARITY)/ip_adapter --seed $(SEED) --count $(EACH)
	HF_HUB_OFFLINE=1 $(ORACLE)/bin/python tests/parity/pipelines.py --out $(PARITY)/pipelines --seed $(SEED) --count $(EACH)
	DIFFJAX_PARITY=$(PARITY) $(BIN)/python -m pytest -n 2 tests/adapters tests/convert tests/models tests/pipelines -k live
	HF_HUB_OFFLINE=1 $(ORACLE)/bin/python tests/parity/read_back.py --out $(PARITY)/networks

errors: setup  ## what samplers, guidance and inverse problems lose on exact denoisers, beside the peers (half an hour)
	$(BIN)/python benchmarks/nfe_vs_error.py --oracle $(ORACLE)/bin/python
	$(BIN)/python benchmarks/overhead.py --oracle $(ORACLE)/bin/python
	$(BIN)/python benchmarks/fit_steps.py
	$(BIN)/python benchmarks/guidance_bias.py
	$(BIN)/python benchmarks/inverse_problems.py

lint: setup  ## ruff
	$(BIN)/ruff check .

clean:  ## remove what make made, except runs/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .jax_cache
