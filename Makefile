# Commands for working on sparseadam. Each builds the environment it needs in $(VENV) first.
#
#   make test       all tests, on the installed package
#   make test-triton
#                   the tests of the Triton backend, in its interpreter; FILES=... of some files only
#   make demo       train word vectors on WordNet's definitions, with plots, in about a minute
#   make bench      time the step against its peers; `make bench-docs` writes docs/benchmarks.md anew from all benchmarks
#   make lint       ruff, clang-format and mypy
#   make sanitize   the kernel tests under the address and undefined-behaviour sanitizers
#   make sanitize-threads, make sanitize-native
#                   the native step by itself under the thread sanitizer, and under the other two
#   make instructions
#                   count the kernel's instructions against stored figures; ARGS=--store stores them
#   make fallback   that the package installs and runs where no compiler is at hand
#   make stubs      write the type stub of the native module anew

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(shell find src csrc -type f -not -name '*.pyc') CMakeLists.txt pyproject.toml

.PHONY: test test-triton demo bench bench-docs lint sanitize sanitize-threads sanitize-native instructions fallback stubs clean
.DELETE_ON_ERROR:

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# The dependencies, torch's pinned CPU build among them, change seldom; the package itself with every edit. It is built by
# tools of the environment both times, so what the first time compiled need not be compiled again.
$(VENV)/dependencies: pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --quiet torch==2.13.0 scikit-build-core nanobind cmake ninja
	$(BIN)/pip install --quiet --no-build-isolation ".[dev,bench,recipes,works-with]"
	touch $@

$(VENV)/installed: $(VENV)/dependencies $(SOURCES)
	$(BIN)/pip install --quiet --no-deps --force-reinstall --no-build-isolation .
	touch $@

test: $(VENV)/installed
	$(BIN)/python -m pytest

# A step takes some hundred times longer so; files without a test of the backend are not looked at.
TRITON_FILES := $(shell grep -lE "backend|triton" tests/test_*.py)
FILES ?= $(TRITON_FILES)
test-triton: $(VENV)/installed
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(FILES) -k triton

demo: $(VENV)/installed
	$(BIN)/python -m recipes.word_vectors --out demo_output

bench: $(VENV)/installed
	$(BIN)/python -m sparseadam bench

bench-docs: $(VENV)/installed
	$(BIN)/python benchmarks/docs.py

lint: $(VENV)/dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h csrc/tests/*.cpp
	$(BIN)/mypy

# A second build beside the installed one. Python itself is not instrumented, so the runtime is loaded before it, and
# leaks, of which an interpreter that exits has many, are not reported.
SANITIZED := build/sanitized
sanitize: $(VENV)/installed
	rm -rf $(SANITIZED)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target $(SANITIZED) \
	  --config-settings=build-dir=build/sanitize --config-settings=cmake.build-type=RelWithDebInfo \
	  --config-settings=cmake.define.SPARSEADAM_SANITIZE=address,undefined .
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONPATH=$(SANITIZED) \
	  $(BIN)/python -m pytest -p no:cacheprovider tests/test_update.py tests/test_moments.py \
	  tests/test_coalesce.py tests/test_steady_step.py tests/test_rounding.py tests/test_options.py \
	  tests/test_replay.py -k "not resident and not reference and not compiled and not any_run"

# The native step without Python. Without OpenMP the kernel starts threads of its own: GNU's OpenMP runtime is not
# instrumented, and all that it orders would look like a race.
STEP_TEST := csrc/tests/step_test.cpp csrc/step.cpp csrc/partition.cpp csrc/row_update.cpp csrc/plain_rows.cpp \
  csrc/any_rows.cpp csrc/history.cpp csrc/catch_up.cpp csrc/catch_up_rows.cpp
STEP_TEST_FLAGS := -std=c++17 -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra -pthread -g -O1 -fno-omit-frame-pointer
sanitize-threads:
	mkdir -p build/step_test
	$(CXX) $(STEP_TEST_FLAGS) -fsanitize=thread $(STEP_TEST) -o build/step_test/threads
	TSAN_OPTIONS=halt_on_error=1 build/step_test/threads threads

sanitize-native:
	mkdir -p build/step_test
	$(CXX) $(STEP_TEST_FLAGS) -fopenmp -fsanitize=address,undefined $(STEP_TEST) -o build/step_test/native
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 build/step_test/native threads

instructions:
	CXX="$(CXX)" $(PYTHON) benchmarks/instructions.py $(ARGS)

# Built as on a machine without a compiler, installed apart, and asked to say so and to run.
FALLBACK := build/fallback
fallback: $(VENV)/installed
	rm -rf $(FALLBACK)
	CXX=/nonexistent $(BIN)/pip install --quiet --no-deps --no-build-isolation --target $(FALLBACK) \
	  --config-settings=build-dir=build/no-compiler .
	PYTHONPATH=$(FALLBACK) $(BIN)/python -m pytest -p no:cacheprovider tests/test_fallback.py tests/test_update.py

stubs: $(VENV)/installed
	$(BIN)/python -m nanobind.stubgen -m sparseadam._native -o src/sparseadam/_native.pyi

clean:
	rm -rf build dist demo_output $(VENV)
