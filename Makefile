# Every target sets up what it needs. PYTHON chooses the Python of a new .venv.
PYTHON ?= python3
JOBS ?= $(shell nproc)
CXX_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.inc' 'tests/*.h' 'tests/*.cpp')
PY_FILES = kt_vllm tests tools examples benchmarks setup.py
BIN = .venv/bin
# Make's own jobs would only fight over the cores with those of cmake and pip.
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help venv build demo test pytest sanitize lint format clean

help:  ## this list
	@awk -F ':.*##  *' '/^[a-z]+:.*##/ {printf "make %-9s %s\n", $$1, $$2}' Makefile

venv:  ## .venv with vLLM's CPU platform, kt_vllm and its C++ extension; does only what changed
	@$(PYTHON) tools/bootstrap.py

# $(call ctest,build folder,cmake options)
define ctest
	@$(BIN)/cmake -S . -B $(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	    -DKT_BUILD_TESTS=ON -DKT_BUILD_PYTHON=OFF -DKT_WERROR=ON $(2) --log-level=WARNING
	@$(BIN)/cmake --build $(1) --parallel $(JOBS) -- --quiet
	@$(BIN)/ctest --test-dir $(1) --output-on-failure --no-tests=error
endef

build: venv  ## the C++ core and its tests (build/tests), and runs them
	$(call ctest,build/tests,-DCMAKE_BUILD_TYPE=Release)

sanitize: venv  ## the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer (build/sanitize)
	$(call ctest,build/sanitize,-DCMAKE_BUILD_TYPE=RelWithDebInfo -DKT_SANITIZE=address$(comma)undefined)

demo: venv  ## serves the tiny model, asks it two things, stops it
	@$(BIN)/python examples/demo.py

pytest: venv  ## the Python tests alone; choose with ARGS="-m 'not e2e' -k name"
	@$(BIN)/python -m pytest $(ARGS)

test: build sanitize pytest  ## everything this machine can run; ends with pytest's count

lint: venv  ## ruff, mypy and clang-format, changing nothing
	@$(BIN)/ruff check $(PY_FILES)
	@$(BIN)/ruff format --check $(PY_FILES)
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: venv  ## rewrites what lint would complain about, where that is safe
	@$(BIN)/ruff check --fix $(PY_FILES)
	@$(BIN)/ruff format $(PY_FILES)
	@$(BIN)/clang-format -i $(CXX_FILES)

clean:  ## removes what was built, keeps .venv
	rm -rf build dist *.egg-info kt_vllm/_native*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find kt_vllm tests tools examples -name __pycache__ -prune -exec rm -rf {} +

comma := ,
