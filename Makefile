# `make demo` and `make test` do their own set-up; `make help` lists the targets.
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
GPU_CHECK_ARGS ?=

# Threads that wait for each other sleep instead of spinning. On a busy machine spinning threads take
# the cores from the ones they wait for: measured, decoding fell from 20 to 1 tokens a second.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup native demo test lint format bench gpu-check wheel clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) native  ## make .venv with the pinned packages, and build the native CPU kernel

# The package itself runs on Python 3.10, too; constraints.txt does not.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the pinned versions need Python 3.11 or newer, found " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The builder compiles only what changed. It exits with 2 where there is no compiler: then everything
# still runs, on the reference backend, which is slow.
native: $(STAMP)
	@$(BIN)/python kernel_hub/build.py || \
	  { test $$? -eq 2 && echo "note: no compiler, so the slow reference backend will serve"; }

demo: setup  ## a real model on a long text: dense against BLASST against BSFA
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

test: setup  ## the whole test suite
	$(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

lint: setup  ## ruff, mypy, the import contract, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs -r $(BIN)/clang-format --dry-run --Werror

format: setup  ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs -r $(BIN)/clang-format -i

bench: setup  ## the benchmarks that run on a CPU
	$(BIN)/python -m benchmarks.cpu_attention $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.decode

# Not in .venv: it takes the torch and Triton that the machine has, as a fresh one has no internet.
gpu-check:  ## on a machine with a GPU: prove the kernels right, then time them, within 9 minutes
	$(PYTHON) benchmarks/gpu_check.py $(GPU_CHECK_ARGS)

wheel: setup  ## a wheel with the native kernel in it, in dist/
	$(BIN)/python -m build --wheel

clean:  ## remove the environment and everything built
	rm -rf $(VENV) dist build kernel_hub/*/build .mypy_cache .pytest_cache .ruff_cache
