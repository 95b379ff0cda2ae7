# `make demo` and `make test`: each makes the virtual environment .venv, installs what is missing
# exactly once (again when pyproject.toml or setup.py change), and runs.
#
#   make demo                          the shipped clip through the model, then a report in out/
#   make demo CLIP=holiday.mov OUT=o   any clip that FFmpeg reads
#   make test                          the whole test suite; needs no GPU
#   make test PYTEST_FLAGS="-k silu"   a part of it, in one process
#   make test-gpu                      the tests that need a GPU, GPU_JOBS processes on one card
#   make sanitize                      compute-sanitizer over every hand-written kernel
#
# TORCH is what pip is told to install as PyTorch. On a Linux machine without an NVIDIA GPU
# TORCH="torch --index-url ..." with PyTorch's CPU index saves some gigabytes.
# PIP_FLAGS is passed to every `pip install`.

VENV ?= .venv
TORCH ?= torch==2.13.0
PIP_FLAGS ?=
CLIP ?=
OUT ?= out
# One process a core; more than four only cost memory (each imports torch).
PYTEST_FLAGS ?= --numprocesses=auto --maxprocesses=4
IS_NEW_ENOUGH = import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c '$(IS_NEW_ENOUGH)' 2>/dev/null && echo $$p && break; done)
PIP = $(VENV)/bin/python -P -m pip install -q $(PIP_FLAGS)

.PHONY: help demo test test-gpu sanitize lint types clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

demo: $(VENV)/installed
	@$(VENV)/bin/mirage demo $(if $(CLIP),"$(CLIP)") --output-folder "$(OUT)"

test: $(VENV)/installed-test
	@$(VENV)/bin/pytest $(PYTEST_FLAGS)

# Most of the time is compilation, on the CPU. A kernel that hangs holds its process: only a thread
# can end that, and xdist starts another (see tests/conftest.py).
GPU_JOBS ?= 6
test-gpu: $(VENV)/installed-test
	@$(VENV)/bin/pytest -m gpu --numprocesses=$(GPU_JOBS) --timeout=60 --timeout-method=thread \
		--max-worker-restart=20 $(GPU_FLAGS)

sanitize: $(VENV)/installed-test
	@$(VENV)/bin/python -P tests/sanitize.py

lint: $(VENV)/installed-test
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

types: $(VENV)/installed-test
	@$(VENV)/bin/mypy

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "make: no Python >= 3.11 found (tried python3, python3.11" \
		"to python3.14); install one, or name it: make PYTHON=/path/to/python3"; exit 2; }
	@echo "making $(VENV) with $(PYTHON)"
	@$(PYTHON) -P -m venv $(VENV)

# torch first and alone: a bare requirement would let pip replace the chosen build.
$(VENV)/installed: pyproject.toml setup.py | $(VENV)/bin/python
	@echo "installing $(TORCH), mirage-hello and what it needs into $(VENV) (once, minutes)"
	@$(PIP) $(TORCH)
	@$(PIP) -e .
	@$(VENV)/bin/python -P tools/install_cuda.py $(PIP_FLAGS)
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	@echo "installing the test tools into $(VENV)"
	@$(PIP) -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) $(OUT)
