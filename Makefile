# Creates an environment in .venv, installs, builds and runs. Needs python3 (>= 3.10, with venv and headers), a C++17
# compiler and make; everything else comes from the package index that pip is configured for.
#
# Variables, e.g. `make test PYTHON=python3.12`:
#   PYTHON       the interpreter. One that has torch >= 2.6 keeps it; any other gets torch from the package index.
#   TORCH_INDEX  a further index for torch. On Linux, PyPI's torch brings the CUDA libraries (several GB);
#                TORCH_INDEX=https://download.pytorch.org/whl/cpu has the small build for the CPU.
#   VENV         where the environment goes.
#   STEPS        what `make results` measures: names of bench/run_all.sh; everything without it.
#   PYTHONS      the interpreters that `make wheels` builds for: all python3.10 to python3.14 on the PATH without it.
#   PROCESSORS   what `make wheels` builds for: x86_64 without it, or aarch64.
#   SECONDS      how long `make fuzz` runs each target.
#   TEST_JOBS    processes that share the test files; 0: no such process, as a debugger needs it.
#   QCOMM_CUDA   AUTO, ON or OFF; CMAKE_ARGS: further arguments for CMake. Both count when something is built:
#                after changing one of them, `make clean`.
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
SECONDS ?= 60
# Tests of several ranks mostly wait, so two share a processor well.
TEST_JOBS ?= 2

BIN := $(VENV)/bin
# The build's tools are in the environment (no build isolation), so that a build after an edit takes seconds.
TOOLS := pip setuptools pybind11 cmake ninja clang-format mypy ruff
PIP := PIP_CONSTRAINT=$(VENV)/constraints.txt PIP_PREFER_BINARY=1 $(BIN)/python -m pip --disable-pip-version-check
ENVIRONMENT := $(VENV)/.environment-stamp
BUILT := $(VENV)/.built-stamp
SOURCES := setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)

.DEFAULT_GOAL := help
.PHONY: help build train test test-frameworks lint fuzz wheels cuda-check cuda-ptx cuda-model bench-ci results clean distclean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' Makefile
	@echo "Variables (PYTHON, TORCH_INDEX, ...) are described at the top of the Makefile."

build: $(BUILT)  ## create the environment and build

train: $(BUILT)  ## train a ResNet with two processes, compressed and not (under 5 minutes)
	$(BIN)/qcomm train $(TRAIN_ARGS)

test: $(BUILT)  ## run the tests and the docstrings' examples
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile $(TEST_ARGS)

test-frameworks: $(BUILT)  ## install Lightning, Accelerate, transformers and torchft, and test training in them
	$(PIP) install --quiet --no-build-isolation --editable '.[train,test,lint,lightning,accelerate,transformers,torchft]'
	$(BIN)/python -m pytest tests/integrations qcomm/integrations $(TEST_ARGS)

lint: $(BUILT)  ## check style and types (tools/lint.sh --fix repairs what can be repaired)
	tools/lint.sh

fuzz:  ## fuzz the codec under sanitizers, SECONDS=60 a target; needs clang with libFuzzer, but no Python
	tools/fuzz.sh $(SECONDS)

wheels:  ## build the source distribution and manylinux wheels into dist/; needs no compiler
	$(PYTHON) tools/build_wheels.py $(if $(PROCESSORS),--processors $(PROCESSORS)) $(if $(PYTHONS),--pythons $(PYTHONS))

cuda-check:  ## compile the CUDA kernels (needs nvcc, but no GPU): registers, spills, instructions per symbol
	$(PYTHON) tools/cuda_check.py --json bench/results/cuda_build.json

cuda-ptx: $(BUILT)  ## run all compiled CUDA kernels on the host (needs nvcc, but no GPU): bytes, memory, races
	QCOMM_PTX=all $(BIN)/python -m pytest tests/codec/test_cuda_ptx.py $(TEST_ARGS)

cuda-model:  ## estimate the kernels' times on GPUs (needs nvcc and nvdisasm, but no GPU; some minutes): a model
	$(PYTHON) tools/cuda_model.py --json bench/results/cuda_model.json

bench-ci: $(BUILT)  ## run the microbenchmarks, results in build/bench-ci.json (about a minute)
	@mkdir -p build
	$(BIN)/python -m pytest bench/test_micro.py --benchmark-only --benchmark-json=build/bench-ci.json \
		--benchmark-max-time=0.3 \
		--benchmark-group-by=func --benchmark-columns=min,median,iqr,rounds

results: $(BUILT)  ## measure again what docs/measurements.md shows of networks; as root, on an idle machine (about 25 minutes)
	PYTHON=$(BIN)/python bench/run_all.sh $(STEPS)

clean:  ## remove what was built; the environment stays
	rm -rf build dist *.egg-info qcomm/_C*.so qcomm/_cuda*.so $(BUILT) .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks

distclean: clean  ## remove the environment, too
	rm -rf $(VENV)

# Threads that spin while they wait starve each other when ranks share cores.
train test test-frameworks bench-ci results: export OMP_WAIT_POLICY = passive
test test-frameworks bench-ci: export OMP_NUM_THREADS = 1

# --force-reinstall: the environment needs these tools of its own even where $(PYTHON) has others.
$(ENVIRONMENT): tools/make_environment.py constraints.txt
	$(PYTHON) tools/make_environment.py $(VENV) $(TOOLS)
	@echo "make: installing into $(VENV), once; torch is a large download where $(PYTHON) does not have it"
	@$(PIP) install --quiet --force-reinstall $(TOOLS)
	@$(PIP) install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) 'torch>=2.6'
	@touch $@

$(BUILT): $(ENVIRONMENT) pyproject.toml $(SOURCES)
	@echo "make: building"
	@PYTHONWARNINGS="ignore:Editable installation" \
		$(PIP) install --quiet --no-build-isolation --editable '.[train,test,lint]'
	@touch $@
