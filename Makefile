# Every target sets up what it needs in a local virtual environment.
PYTHON ?= python3
VENV ?= .venv
DEMO_OUT ?= out/demo
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Versions to hold to, as a pip constraints file; empty for the newest that fit.
CONSTRAINTS ?=
CONSTRAIN := $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
# Files or folders of tests. Of all of them `make test` runs the quick ones, see tests/conftest.py.
TESTS ?= tests
SELECT ?= $(if $(filter-out tests,$(TESTS)),,--quick)

.PHONY: help demo test test-all check bench gallery fuzz sanitize gpu gpu-kit aot clean

help:
	@echo "make demo   train a Growing NCA on the packaged target and show it (under 4 minutes)"
	@echo "make test   whether an install can be trusted (under 6 minutes); test-all: all tests"
	@echo "make check  formatting, lint and types"
	@echo "make bench  against the reference, CAX and PyTorch on this machine; writes results"
	@echo "            (the CAX of today: PYTHON=python3.12 VENV=.venv-bench)"
	@echo "make gallery  train the presets small and medium of every system (hours); to docs/gallery"
	@echo "make fuzz   10,000 random shapes and rules on the native kernels; can be interrupted"
	@echo "make sanitize  the native kernels' tests with AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make gpu    all that needs a GPU, the most valuable first, with the Python that has its JAX"
	@echo "make gpu-kit  what make gpu would compile on a machine with a GPU, or lacks there; no GPU"
	@echo "make aot    registers, spills, shared memory, instructions of the Triton kernels; no GPU"
	@echo "make clean  remove virtual environments and caches"

# One stamp for each set of extras. The install compiles the native kernels, if it can.
CPU_SOURCES := $(wildcard nca_kernels/backends/cpu/src/*)
$(VENV)/installed-%: pyproject.toml $(CPU_SOURCES)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing nca-kernels[$*] into $(VENV) ..."
	@$(PIP) $(CONSTRAIN) --editable ".[$*]"
	@touch $@

demo: $(VENV)/installed-models
	$(BIN)/nca demo --out $(DEMO_OUT) $(if $(wildcard $(DEMO_OUT)/config.json),--resume)

# Installed without what they ask for: JAX's CUDA plugin, which describes Triton's kernels to XLA,
# does so without a GPU, too, and of jax-nca one module is enough. Where one cannot be had, the
# tests that need it skip and say so.
$(VENV)/no-deps: $(VENV)/installed-models,test
	@version=$$($(BIN)/python -c "import jax; print(jax.__version__)"); \
	  for package in jax-cuda13-plugin==$$version jax-nca==0.1.2; do \
	    $(PIP) --no-deps $$package || echo "no $$package"; done
	@touch $@

test: $(VENV)/installed-models,test $(VENV)/no-deps
	$(BIN)/python -m pytest $(TESTS) $(SELECT) -n 2 --dist worksteal $(PYTEST_ARGS)

test-all: test
	$(MAKE) test SELECT=--rest

check: $(VENV)/installed-models,test,check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed-models,test,peers $(VENV)/no-deps
	$(BIN)/python -m benchmarks.large --save
	$(BIN)/nca bench --save --report $(BENCH_ARGS)

gallery: $(VENV)/installed-models,test
	$(BIN)/python -m benchmarks.gallery $(GALLERY_ARGS)

# Without the compiler's optimizations: every case is compiled, and runs for a moment.
QUICK := XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
FUZZ := $(abspath out/fuzz-cpu.json)

fuzz: $(VENV)/installed-models,test
	@mkdir -p $(dir $(FUZZ))
	$(QUICK) $(BIN)/python -m tests.tools.fuzz cpu --cases 10000 --json $(FUZZ)

SANITIZED := $(abspath $(VENV))/sanitized
$(SANITIZED)/libnca_cpu.so: $(VENV)/installed-models,test $(CPU_SOURCES)
	@$(PIP) cmake
	$(BIN)/cmake -S nca_kernels/backends/cpu/src -B $(SANITIZED) -DNCA_SANITIZE=address,undefined \
	  -DNCA_EMULATE_AMX=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	$(BIN)/cmake --build $(SANITIZED)

# Python itself leaks on purpose: only the kernels' accesses are checked.
sanitize: $(SANITIZED)/libnca_cpu.so
	LD_PRELOAD="$(foreach name,asan ubsan stdc++,$$($(CXX) -print-file-name=lib$(name).so))" \
	  ASAN_OPTIONS=detect_leaks=0 NCA_CPU_LIBRARY=$< $(QUICK) \
	  $(BIN)/python -m pytest tests/nca_kernels/backends/cpu \
	  -k "not transformations and not threads and not without_tile" $(PYTEST_ARGS)

# A machine with a GPU often has its own JAX and no network: nothing is installed there. What it
# lacks, and kernels that are compiled already, come in a kit.
GPU_OUT ?= out/gpu
GPU_KIT ?= out/gpu-kit
gpu:
	@$(PYTHON) -c "import jax" 2>/dev/null || { \
	  echo "$(PYTHON) has no JAX: name the Python whose JAX sees the GPU, make gpu PYTHON=..." >&2; exit 2; }
	PYTHONPATH=".$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m benchmarks.gpu --out $(GPU_OUT) \
	  $(if $(wildcard $(GPU_KIT)/kit.json),--kit $(GPU_KIT)) $(GPU_ARGS)

# With the Python and the Triton of the machine with the GPU: CONSTRAINTS names their versions.
gpu-kit: $(VENV)/installed-models,test $(VENV)/no-deps
	$(BIN)/python -m benchmarks.gpu.kit --out $(GPU_KIT) $(KIT_ARGS)

# What the Triton kernels take, compiled ahead of time; needs no GPU.
aot: $(VENV)/installed-models,test $(VENV)/no-deps
	$(BIN)/python -m benchmarks.aot --save

clean:
	rm -rf .venv* .pytest_cache .mypy_cache .ruff_cache .benchmarks out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
