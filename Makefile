# One command for each thing a newcomer wants. Everything runs in .venv, which the first command makes.

VENV   ?= .venv
PYTHON ?= python3
JOBS   ?= 2
ARGS   ?=
# The benchmarks by name, the long one last. All of them know --threads and --rounds.
BENCHES := $(patsubst benchmarks/bench_%.py,%,$(sort $(wildcard benchmarks/bench_*.py)))
BENCH  ?= hilo depthwise_conv $(filter-out hilo depthwise_conv backbones,$(BENCHES)) backbones

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
# An editable install sees new Python code by itself; metadata and native code need a new install.
NATIVE := $(wildcard kernels/*.cpp kernels/*/*.cpp kernels/*/*.h)

# One thread a worker: several workers with an OpenMP pool each are many times slower than one thread each.
PYTEST := OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 $(BIN)/python -m pytest -n $(JOBS) --dist=worksteal

.DEFAULT_GOAL := help
.PHONY: help install train test test-fast test-slow test-exhaustive lint format bench pictures clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP)  ## make .venv with everything the commands below need

$(STAMP): pyproject.toml $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "mixerzoo needs Python 3.10 or newer; set PYTHON=")'
	@# Some distributions ship Python without ensurepip: there the outer pip fills the environment.
	$(PYTHON) -m venv $(VENV) 2>/dev/null || \
		{ $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	@echo "installing mixerzoo and its tools into $(VENV); torch is large, so the first time takes minutes"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e '.[dev]'
	@touch $@

train: $(STAMP)  ## train the default recipe on the embedded images; ARGS="model=dinat_mini optim.lr=1e-3"
	$(BIN)/python train.py $(ARGS)

test: $(STAMP)  ## run the whole test suite, in one go: workers that are started once
	$(PYTEST) -m "not exhaustive" $(ARGS)

test-fast: $(STAMP)  ## run the tests that take seconds; ARGS="-k export"
	$(PYTEST) $(ARGS)

test-slow: $(STAMP)  ## run the tests that take minutes
	$(PYTEST) -m slow $(ARGS)

test-exhaustive: $(STAMP)  ## run what the slow tests only sample: every family compiled and exported, an hour
	$(PYTEST) -m exhaustive $(ARGS)

lint: $(STAMP)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)  ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## time operators and models against their peers; BENCH=hilo ARGS="--threads 2"
	@missed=; for name in $(BENCH); do \
		echo "bench_$$name"; $(BIN)/python benchmarks/bench_$$name.py $(ARGS) || missed="$$missed $$name"; \
	done; test -z "$$missed" || { echo "missed:$$missed" >&2; exit 1; }

pictures: $(STAMP)  ## draw the pictures of docs/gallery.md again
	$(BIN)/python -m mixerzoo.vision.visualize $(ARGS)

clean:  ## remove .venv and what tools leave behind
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
