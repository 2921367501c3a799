# Every target sets up what it needs. PYTHON chooses the Python of a new .venv.
PYTHON ?= python3
JOBS ?= $(shell nproc)
CXX_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.inc' 'tests/*.h' 'tests/*.cpp')
PY_FILES = kt_vllm tests tools examples benchmarks setup.py
BIN = .venv/bin
# Make's own jobs would only fight over the cores with those of cmake and pip.
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help venv build demo test pytest full sanitize tsan fuzz lint format clean

help:  ## this list
	@awk -F ':.*##  *' '/^[a-z]+:.*##/ {printf "make %-9s %s\n", $$1, $$2}' Makefile

venv:  ## .venv with vLLM's CPU platform, kt_vllm and its C++ extension; does only what changed
	@$(PYTHON) tools/bootstrap.py

# $(call ctest,build folder,cmake options,targets (all of them),ctest options)
define ctest
	@$(BIN)/cmake -S . -B $(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	    -DKT_BUILD_TESTS=ON $(2) --log-level=WARNING
	@$(BIN)/cmake --build $(1) --parallel $(JOBS) $(if $(3),--target $(3)) -- --quiet
	@$(BIN)/ctest --test-dir $(1) --output-on-failure --no-tests=error $(4)
endef

# In the folder where setup.py has built the extension: the core is there already.
NATIVE = build/native-$$($(BIN)/python -c 'import sys; print(sys.implementation.cache_tag)')-release
build: venv  ## the C++ core and its tests, and runs them
	$(call ctest,$(NATIVE),)

CHECKED = -DKT_BUILD_PYTHON=OFF -DCMAKE_BUILD_TYPE=RelWithDebInfo
sanitize: venv  ## the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer (build/sanitize)
	$(call ctest,build/sanitize,$(CHECKED) -DKT_SANITIZE=address$(comma)undefined -DKT_WERROR=ON)

# Threads meet in these only. No errors from warnings: under this sanitizer GCC 12 takes zeroed vectors for uninitialised.
TSAN_TESTS = test_thread_pool test_parking test_work_queue test_expert_loader test_dense_reader test_executor \
    test_handover
tsan: venv  ## the C++ tests of threads under ThreadSanitizer (build/tsan)
	$(call ctest,build/tsan,$(CHECKED) -DKT_SANITIZE=thread,$(TSAN_TESTS),\
	    -R '^($(subst $(space),|,$(TSAN_TESTS)))$$')

FUZZ_SECONDS ?= 60
fuzz: venv  ## libFuzzer on block formats and kernels for FUZZ_SECONDS (build/fuzz); needs clang++
	@command -v clang++ >/dev/null || { echo "make fuzz needs clang++ and finds none: install clang and its compiler-rt," \
	    "or give the same program random inputs: make sanitize; build/sanitize/fuzz_decode -runs=100000"; exit 1; }
	@$(BIN)/cmake -S . -B build/fuzz -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DCMAKE_CXX_COMPILER=clang++ \
	    -DKT_BUILD_TESTS=ON -DKT_BUILD_PYTHON=OFF -DKT_FUZZ=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo --log-level=WARNING
	@$(BIN)/cmake --build build/fuzz --parallel $(JOBS) --target fuzz_decode -- --quiet
	@build/fuzz/fuzz_decode -max_total_time=$(FUZZ_SECONDS) -max_len=4096

demo: venv  ## serves the tiny model, asks it two things, stops it
	@$(BIN)/python examples/demo.py

pytest: venv  ## the Python tests alone; choose with ARGS="-m 'not e2e' -k name"
	@$(BIN)/python -m pytest $(ARGS)

full: venv  ## what make test leaves out: every model family with every mix of types, eager and compiled, through vLLM (an hour)
	@$(BIN)/python -m pytest -m full $(ARGS)

# Three files at a time where vLLM runs: more are no faster on two cores. The others time things.
test: build sanitize  ## everything this machine can run
	@$(BIN)/python -m pytest -m 'not e2e or alone'
	@$(BIN)/python -m pytest -m 'e2e and not alone' --numprocesses 3 --dist loadfile

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
space := $(subst ,, )
