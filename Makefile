# Every target sets up what it needs in a local virtual environment.
PYTHON ?= python3
VENV ?= .venv
DEMO_OUT ?= out/demo
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Versions to hold to, as a pip constraints file; empty for the newest that fit.
CONSTRAINTS ?=
CONSTRAIN := $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

.PHONY: help demo test check bench gpu aot clean

help:
	@echo "make demo   train a Growing NCA on the packaged target and show it (under 6 minutes)"
	@echo "make test   all tests"
	@echo "make check  formatting, lint and types"
	@echo "make bench  against the reference, CAX and PyTorch on this machine; writes results"
	@echo "make gpu    conformance and timings on a GPU, with the Python that has its JAX"
	@echo "make aot    registers, spills and shared memory of the Triton kernels; needs no GPU"
	@echo "make clean  remove virtual environments and caches"

# One stamp for each set of extras. The install compiles the native kernels, if it can.
$(VENV)/installed-%: pyproject.toml $(wildcard nca_kernels/backends/cpu/src/*)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing nca-kernels[$*] into $(VENV) ..."
	@$(PIP) $(CONSTRAIN) --editable ".[$*]"
	@touch $@

demo: $(VENV)/installed-models
	$(BIN)/nca demo --out $(DEMO_OUT) $(if $(wildcard $(DEMO_OUT)/config.json),--resume)

# jax-triton can be imported only where JAX's CUDA plugin is, which works without a GPU. Where it
# cannot be had, the tests that need it skip and say so.
$(VENV)/cuda-plugin: $(VENV)/installed-models,test
	@version=$$($(BIN)/python -c "import jax; print(jax.__version__)"); \
	  $(PIP) --no-deps jax-cuda13-plugin==$$version || echo "no CUDA plugin of JAX $$version"
	@touch $@

test: $(VENV)/installed-models,test $(VENV)/cuda-plugin
	$(BIN)/python -m pytest tests -n 2 --dist worksteal $(PYTEST_ARGS)

check: $(VENV)/installed-models,test,check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed-models,test,peers
	$(BIN)/python -m pytest benchmarks --save $(PYTEST_ARGS)
	$(BIN)/python -m benchmarks.memory --save

# A machine with a GPU often has its own JAX and no network: nothing is installed there.
gpu:
	@$(PYTHON) -c "import jax" 2>/dev/null || { \
	  echo "$(PYTHON) has no JAX: name the Python whose JAX sees the GPU, make gpu PYTHON=..." >&2; exit 2; }
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu --save $(GPU_ARGS)

# What the Triton kernels take, compiled ahead of time; needs no GPU.
aot: $(VENV)/installed-models,test $(VENV)/cuda-plugin
	$(BIN)/python -m benchmarks.aot --save

clean:
	rm -rf .venv* .pytest_cache .mypy_cache .ruff_cache .benchmarks out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
