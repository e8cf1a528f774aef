# make demo, make test and make lint set up all they need in .venv; PYTHON names another interpreter.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CXX ?= g++
export PIP_DISABLE_PIP_VERSION_CHECK := 1
WHEEL := $(PY) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist

NATIVE_SOURCES := custom_ops/index_cpu.cc custom_ops/rows_cpu.cc
NATIVE_TESTS := $(addprefix tests/native/,kernels_test.cc half_test.cc index_test.cc rows_test.cc)
NATIVE_DEPS := $(NATIVE_SOURCES) $(NATIVE_TESTS) $(wildcard custom_ops/*.h tests/native/*.h)
SANITIZE := -std=c++17 -O1 -g -Wall -Wextra -Werror -fsanitize=address,undefined -fno-sanitize-recover=all
CXX_FILES := $(wildcard custom_ops/*.h custom_ops/*.cc custom_ops/*.cu custom_ops/*.cuh tests/native/*.h tests/native/*.cc tests/gpu/emulator/*.h tests/gpu/emulator/*.cc tests/gpu/device_double/*.h tests/gpu/device_double/*.cc tests/gpu/device_double/paddle/*.h tests/gpu/device_double/paddle/common/*.h)

.PHONY: demo test coverage lint bench wheel sanitize bench-native clean
.DELETE_ON_ERROR:

demo: $(VENV)/.built
	$(PY) tools/demo.py

test: $(VENV)/.built
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

coverage: $(VENV)/.built
	$(PY) -m coverage run -m pytest -q
	$(PY) -m coverage combine --quiet
	$(PY) -m coverage report

bench: export PYTHONWARNINGS = ignore
bench: $(VENV)/.built
	$(PY) tools/bench/bench_plan.py
	$(PY) tools/bench/bench_rows.py
	$(PY) tools/bench/bench_merge.py

lint: $(VENV)/.ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

CHECK_PYTHON := import sys; v = sys.version_info[:2]; \
	(3, 10) <= v <= (3, 12) or sys.exit("this is Python %d.%d, and Paddle and PaddleFormers need 3.10 to 3.12: name one by PYTHON=, as in make demo PYTHON=python3.11" % v)

$(VENV)/.ready: requirements.txt
	@$(PYTHON) -c '$(CHECK_PYTHON)'
	@echo "installing Paddle, PaddleFormers and what the tests need into $(VENV): about 2 GB, some minutes, once"
	@{ $(PY) -m pip --version && [ "$$($(PY) -V)" = "$$($(PYTHON) -V)" ]; } > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --quiet --upgrade "pip>=23" "setuptools>=64,<80" wheel
	$(PY) -m pip install --quiet -r requirements.txt
	@touch $@

SAY_BACKEND := import sys, paddle_vl_sp; b = paddle_vl_sp.backend(); print('paddle_vl_sp:', b); sys.exit(b.name != 'op')

# Without a C++ compiler plain Paddle is used, and the next make tries again.
$(VENV)/.built: $(VENV)/.ready setup.py pyproject.toml $(wildcard custom_ops/*)
	@command -v $(CXX) > /dev/null || echo "no C++ compiler ($(CXX)): plain Paddle will be used; apt install g++, then make again"
	@echo "installing paddle_vl_sp into $(VENV), and compiling its operators: one to two minutes"
	PYTHONWARNINGS=ignore $(PY) -m pip install --quiet --no-build-isolation --no-deps --editable .
	@PADDLE_VL_SP_LOG=error $(PY) -W ignore -c "$(SAY_BACKEND)" && touch $@ || true

# Into dist: the source archive, a wheel without operators, and one with those for the Paddle of .venv. Both wheels are
# built from the archive, in a folder of its own, so that nothing that lies in this tree gets into them.
wheel: $(VENV)/.ready
	rm -rf dist
	PADDLE_VL_SP_BUILD=skip $(PY) setup.py -q sdist
	PADDLE_VL_SP_BUILD=skip $(WHEEL) dist/*.tar.gz
	PADDLE_VL_SP_BUILD=require $(WHEEL) dist/*.tar.gz
	@ls -l dist

# The C++ kernels under the address and undefined-behaviour sanitizers: with the AVX2 clones, and without, where arrays
# of every size are written past the cache.
sanitize: build/native/kernels_test build/native/kernels_test_baseline
	build/native/kernels_test
	build/native/kernels_test_baseline

build/native/kernels_test: $(NATIVE_DEPS)
	@mkdir -p $(@D)
	$(CXX) $(SANITIZE) $(NATIVE_TESTS) $(NATIVE_SOURCES) -o $@

build/native/kernels_test_baseline: $(NATIVE_DEPS)
	@mkdir -p $(@D)
	$(CXX) $(SANITIZE) -DVLSP_BASELINE_ONLY -DVLSP_STREAM_FROM=1 $(NATIVE_TESTS) $(NATIVE_SOURCES) -o $@

bench-native: build/native/kernels_test build/native/kernels_bench
	build/native/kernels_test
	build/native/kernels_bench

build/native/kernels_bench: tests/native/kernels_bench.cc $(NATIVE_DEPS)
	@mkdir -p $(@D)
	$(CXX) -O3 -std=c++17 tests/native/kernels_bench.cc $(NATIVE_SOURCES) -o $@

clean:
	rm -rf build dist $(VENV) paddle_vl_sp/_ops*.so
