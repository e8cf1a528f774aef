# make demo, make test and make lint set up all they need in .venv; PYTHON names another interpreter.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CXX ?= g++
export PIP_DISABLE_PIP_VERSION_CHECK := 1

NATIVE_SOURCES := custom_ops/index_cpu.cc custom_ops/rows_cpu.cc
NATIVE_TESTS := $(addprefix tests/native/,kernels_test.cc half_test.cc index_test.cc rows_test.cc)
NATIVE_DEPS := $(NATIVE_SOURCES) $(NATIVE_TESTS) $(wildcard custom_ops/*.h tests/native/*.h)
SANITIZE := -std=c++17 -O1 -g -Wall -Wextra -Werror -fsanitize=address,undefined -fno-sanitize-recover=all
CXX_FILES := $(wildcard custom_ops/*.h custom_ops/*.cc custom_ops/*.cu custom_ops/*.cuh tests/native/*.h tests/native/*.cc)

.PHONY: demo test coverage lint bench sanitize bench-native clean
.DELETE_ON_ERROR:

demo: $(VENV)/.built
	$(PY) tools/demo.py

test: $(VENV)/.built
	$(PY) -m pytest

coverage: $(VENV)/.built
	$(PY) -m coverage run -m pytest -q
	$(PY) -m coverage combine --quiet
	$(PY) -m coverage report

bench: $(VENV)/.built
	$(PY) tools/bench/bench_plan.py
	$(PY) tools/bench/bench_rows.py

lint: $(VENV)/.ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

$(VENV)/.ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade "pip>=23" "setuptools>=64,<80" wheel
	$(PY) -m pip install --quiet -r requirements.txt
	@touch $@

# Without a C++ compiler this installs the package in plain Paddle, which says so when it is used.
$(VENV)/.built: $(VENV)/.ready setup.py pyproject.toml $(wildcard custom_ops/*)
	PYTHONWARNINGS=ignore $(PY) -m pip install --quiet --no-build-isolation --no-deps --editable .
	@$(PY) -W ignore -c "import paddle_vl_sp; print('paddle_vl_sp:', paddle_vl_sp.backend())"
	@touch $@

# The C++ kernels under the address and undefined-behaviour sanitizers, with the AVX2 clones and without.
sanitize: build/native/kernels_test build/native/kernels_test_baseline
	build/native/kernels_test
	build/native/kernels_test_baseline

build/native/kernels_test: $(NATIVE_DEPS)
	@mkdir -p $(@D)
	$(CXX) $(SANITIZE) $(NATIVE_TESTS) $(NATIVE_SOURCES) -o $@

build/native/kernels_test_baseline: $(NATIVE_DEPS)
	@mkdir -p $(@D)
	$(CXX) $(SANITIZE) -DVLSP_BASELINE_ONLY $(NATIVE_TESTS) $(NATIVE_SOURCES) -o $@

bench-native: build/native/kernels_test build/native/kernels_bench
	build/native/kernels_test
	build/native/kernels_bench

build/native/kernels_bench: tests/native/kernels_bench.cc $(NATIVE_DEPS)
	@mkdir -p $(@D)
	$(CXX) -O3 -std=c++17 tests/native/kernels_bench.cc $(NATIVE_SOURCES) -o $@

clean:
	rm -rf build $(VENV) paddle_vl_sp/_ops*.so
