# Two commands for a fresh machine: `make demo` and `make test`. Each makes .venv if there is none.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch>=2.10
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := $(VENV)/.demo
SOURCES := pyproject.toml setup.py $(shell find csrc buildtools -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu*')

.DEFAULT_GOAL := help
.PHONY: help install demo test bench docs docs-serve lint types format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(STAMP)  ## make the virtual environment and install the package with all extras

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v else \
	    "salkernels needs Python 3.10 or newer, got %d.%d; set PYTHON=python3.11" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(STAMP): $(SOURCES) | $(BIN)/python
	# The demo's CPU build of torch does not fit the torchvision that the tests use.
	! $(BIN)/python -m pip list 2>/dev/null | grep -q '^torch  *[0-9.]*+cpu' || \
	    test ! -e $(DEMO) || $(BIN)/python -m pip uninstall --quiet --yes torch
	# torch first: the build then uses it, and does not fetch another for itself
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

$(DEMO): $(SOURCES) scripts/install_demo.sh | $(BIN)/python
	scripts/install_demo.sh $(VENV) "$(TORCH)"
	touch $@

demo: $(if $(wildcard $(STAMP)),$(STAMP),$(DEMO))  ## phantom data -> SAL pre-training -> fine-tuning with and without -> table, figures
	@echo '== Two to five minutes on two CPU cores; runs/demo can be deleted afterwards'
	$(BIN)/salkernels-train demo

test: $(STAMP)  ## run the tests; TESTS=tests/training runs a part of them
	$(BIN)/python -m pytest $(TESTS)

bench: $(STAMP)  ## time the loss against its peers (about 15 minutes on a quiet machine)
	$(BIN)/python -m pip install --quiet -e ".[bench]"
	$(BIN)/python -m benchmarks --suites paper desk sweeps
	$(BIN)/python -m benchmarks overhead
	$(BIN)/python -m benchmarks training

# Not --quiet: what is not logged is not counted as a warning either.
docs: $(STAMP)  ## build the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(STAMP)  ## show the documentation at http://127.0.0.1:8000 while you write
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

lint: $(STAMP)  ## check format and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)  ## check types
	$(BIN)/mypy

format: $(STAMP)  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the virtual environment and what the tools left behind
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
