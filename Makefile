# Two commands from a clean clone: make setup && make demo.  make help lists the rest.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
UV     := $(VENV)/bin/uv

.PHONY: help setup options demo test test-fast test-all lint bench cuda bench-gpu clean

help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/'

setup: $(VENV)/.ready  ## make .venv with pdserve, SGLang and all tools, at the versions of constraints.txt

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check uv==0.13.8
	$(UV) pip install --quiet --python $(PY) --constraint constraints.txt --editable '.[dev]'
	-$(PY) -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1  # servers start sooner where Python writes no bytecode
	touch $@

options:  ## write configs/*.toml and docs/options.md from the settings
	$(PY) -m pdserve.cli.reference

demo: setup  ## start 1 prefill + 1 decode server with the embedded model and ask one question
	$(PY) -m pdserve.cli.demo

test: setup  ## everything that runs without a GPU, real SGLang servers included
	$(PY) -m pytest -n 2 --dist loadfile --ignore tests/engine
	$(PY) -m pytest tests/engine

test-fast: setup  ## the inner loop: no process, no SGLang, no torch
	$(PY) -m pytest --fast -n 2 --dist loadfile

test-all: setup  ## test, and every combination of what its tests cover once
	$(PY) -m pytest -n 2 --dist loadfile --ignore tests/engine -m "not gpu"
	$(PY) -m pytest tests/engine -m "not gpu"

lint: setup  ## ruff and mypy --strict
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: setup  ## measure start-up, idle cost, transfers, page allocation and the balancer; each prints a table, then one JSON line
	$(PY) bench/startup.py
	$(PY) bench/churn.py
	$(PY) bench/transfer.py
	$(PY) bench/transfer_e2e.py
	$(PY) bench/balancer.py

cuda: setup  ## compile the CUDA kernels for sm_80, sm_90 and sm_100 into build/cuda (needs nvcc, no GPU)
	$(PY) -m pdserve.kv.kernels --out build/cuda --archs 80,90,100
	$(PY) cuda/dev/ladder.py --compile-only

bench-gpu: setup  ## on a GPU: kernel tests, sanitizers, ladder, bench
	PYTHON=$(PY) bench/gpu/run.sh

clean:  ## remove the virtual environment and every cache of the checkout
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info build dist
