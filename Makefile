# `make demo` and `make test` each work as the first command after a clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

DEMOS := demo demo-vision demo-speech

.PHONY: $(DEMOS) test test-all test-reliability test-t5x test-tpu lint format clean

# By default glibc returns large buffers to the kernel after each step and asks for them in the next.
# Two devices of one CPU share a batch better than two threads share each of its small products.
$(DEMOS): export MALLOC_MMAP_MAX_ := 0
$(DEMOS): export MALLOC_TRIM_THRESHOLD_ := 1000000000000
$(DEMOS): export MALLOC_TOP_PAD_ := 268435456
$(DEMOS): export GLIBC_TUNABLES := glibc.malloc.hugetlb=1
$(DEMOS): export XLA_FLAGS := --xla_force_host_platform_device_count=2
demo: $(INSTALLED)
	$(BIN)/coda compare --gin_file=runs/demo.gin

demo-vision: $(INSTALLED)
	$(BIN)/coda compare --gin_file=runs/demo_vision.gin

demo-speech: $(INSTALLED)
	$(BIN)/coda compare --gin_file=runs/demo_speech.gin

test: $(INSTALLED)
	$(BIN)/python -m pytest

# Every combination, and the light installation, which needs the network.
test-all: $(INSTALLED)
	$(BIN)/python -m pytest -m ""

# docs/reliability.md: damaged files by kind, limits of memory, runs that are killed.
test-reliability: $(INSTALLED)
	$(BIN)/python -m pytest -m "" tests/test_damaged_files.py tests/objectives/test_beam_bounds.py \
	  tests/data/test_image_files.py tests/data/test_headers.py tests/data/test_audio_containers.py \
	  tests/data/test_memory.py tests/data/test_cache.py tests/data/test_hostile_vocabularies.py \
	  tests/training/test_run_directory.py tests/training/test_run_checkpoints.py

# T5X_PATH: a folder with clones of google-research/t5x, google/airio and google-research/jestimator.
test-t5x: $(INSTALLED)
	@test -d "$(T5X_PATH)/t5x/t5x" || { echo "make test-t5x T5X_PATH=FOLDER, with clones of \
	google-research/t5x, google/airio and google-research/jestimator in FOLDER"; exit 1; }
	$(BIN)/python -m pip install --quiet --editable '.[dev,t5x]'
	PYTHONPATH=$(T5X_PATH)/t5x:$(T5X_PATH)/airio:$(T5X_PATH)/jestimator $(BIN)/python -m pytest -k t5x

# What TPUs would take, by their compiler: libtpu comes from PyPI and needs no TPU.
test-tpu: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[dev,tpu]'
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 1 tests/test_tpu_bars.py tests/test_tpu_pods.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): setup.py requirements-light.txt pyproject.toml coda_jax/__init__.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache $(VENV)
