# A clone needs no more than `make quickstart`.
#   PYTHON   makes the environment (3.11 or newer)
#   VENV     the folder that holds it
#   PY       an interpreter that already has everything: then nothing is installed
#   JOBS     test processes
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
WORKDIR = runs/digits

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

.PHONY: help install install-dev quickstart report bench test test-slow check format clean

help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

ifdef PY
install install-dev:
	@echo "PY is given, nothing is installed: $$($(PY) --version), $(PY)"
else
PY := $(VENV)/bin/python
# The names of the stamps carry a checksum: what is installed is what the files ask for,
# whatever their dates.
hash = $(shell cat $(1) | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.installed-$(call hash,requirements.txt)
STAMP_DEV := $(VENV)/.installed-dev-$(call hash,requirements.txt requirements-dev.txt)
PIP_INSTALL = $(PY) -m pip install --disable-pip-version-check --progress-bar off

install: $(STAMP)  ## environment with what running needs
install-dev: $(STAMP_DEV)  ## and with what testing needs

# An environment that does not start (half made, moved, its Python gone) is made again.
USABLE := $(shell "$(PY)" -c \
  'import sys, pip; print(sys.version_info >= (3, 11) and "yes")' 2>/dev/null)
ifneq ($(USABLE),yes)
.PHONY: $(PY) $(STAMP) $(STAMP_DEV)
endif

$(PY):
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("elit_jax needs Python 3.11 or newer and $(PYTHON) is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(if $(wildcard $(VENV)/pyvenv.cfg),--clear) "$(VENV)"

$(STAMP): | $(PY)
	$(PIP_INSTALL) -r requirements.txt
	@touch "$@"

$(STAMP_DEV): | $(PY)
	$(PIP_INSTALL) -r requirements.txt -r requirements-dev.txt
	@touch "$@"
endif

quickstart: install  ## train and evaluate the digits model
	$(PY) main.py --config=configs/digits.py --workdir=$(WORKDIR) --mode=train
	$(PY) main.py --config=configs/digits.py --workdir=$(WORKDIR) --mode=eval
	@echo "Next: make report (metrics over budgets, steps and guidance scales, in $(WORKDIR)/sweep)"

report: install  ## a page on that model: budgets, steps, guidance, reuse and schedules
	$(PY) main.py --config=configs/digits.py --workdir=$(WORKDIR) --mode=train
	$(PY) main.py --config=configs/digits.py --workdir=$(WORKDIR) --mode=calibrate
	$(PY) main.py --config=configs/digits.py --workdir=$(WORKDIR) --mode=sweep

BENCH = $(PY) -m benchmarks.run --model=SiT-S/2 --batch=8 --remat=dots --steps=10 --rounds=3 --slow-rounds=2
# Huge pages, one arena, and freed memory is kept for the next step: the arrays of a CPU
# run are large. Not for what compiles much: its threads would wait for the one arena.
bench: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000
bench: install  ## time, FLOPs and memory by budget; beside torch where it is installed
	$(BENCH) --out=runs/bench/plain.json
	$(BENCH) --split=paper --budgets=k1,k4,k16 --out=runs/bench/paper.json

PYTEST = $(PY) -m pytest -q -n $(JOBS) --dist worksteal

test: install-dev  ## everything but the slow tests
	$(PYTEST) -m "not slow"

test-slow: install-dev  ## the slow tests only
	$(PYTEST) -m slow --timeout 1800

check: install-dev  ## format, lint, types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

format: install-dev  ## format, and mend what ruff can mend
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean:  ## remove caches and builds; runs and the environment stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
