PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NEWEST := .venv-newest
NEWEST_READY := $(NEWEST)/.ready
SUITE := -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

.PHONY: help demo docs test test-all test-newest lint types check format clean

help:  ## what there is to make
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

$(NEWEST_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(NEWEST)
	grep '^torch==' constraints.txt > $(NEWEST)/torch.txt
	$(NEWEST)/bin/pip install --quiet --upgrade --upgrade-strategy eager --constraint $(NEWEST)/torch.txt --editable '.[dev]'
	touch $(NEWEST_READY)

demo: $(READY)  ## halve the packaged model and let it talk; then the paper's merge, and its methods side by side
	$(BIN)/namex patch tiny --out out/half --keep 0.5
	$(BIN)/python examples/talk.py out/half
	$(BIN)/namex patch tiny --out out/tiny
	$(BIN)/python benchmarks/methods.py --quick

test: $(READY)  ## the whole suite, no network and no accelerator needed
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python $(SUITE)

test-all: $(READY)  ## the same with every model family
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python $(SUITE) -m ''

test-newest: $(NEWEST_READY)  ## the whole suite with the newest versions that pyproject.toml allows, but for torch
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(NEWEST)/bin/python $(SUITE)

lint: $(READY)  ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## mypy
	$(BIN)/mypy

docs: $(READY)  ## the documentation as a site, build/docs/docs/index.html; a warning is an error
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -qEW --keep-going -c docs . build/docs

check: lint types docs test  ## all four

format: $(READY)  ## mend what the linter can, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what make has made
	rm -rf $(VENV) $(NEWEST) out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
