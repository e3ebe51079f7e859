# Everything runs in .venv beside this file, from any working directory: `make -C PATH demo` or `make -f PATH/Makefile demo`.
ROOT := $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))
PYTHON ?= python3
VENV := $(ROOT)/.venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
SOURCES := $(wildcard $(ROOT)/csrc/*/*)

.PHONY: install demo test lint bench docs clean
.DEFAULT_GOAL := install

install: $(STAMP)

$(STAMP): $(ROOT)/setup.py $(ROOT)/pyproject.toml $(ROOT)/requirements/constraints.txt $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fewstep needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make install PYTHON=python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(ROOT)/requirements/constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint $(ROOT)/requirements/constraints.txt torch
	cd $(ROOT) && $(BIN)/python -m pip install --quiet --constraint requirements/constraints.txt --no-build-isolation --editable '.[test]'
	touch $@

demo: install
	cd $(ROOT) && $(BIN)/fewstep demo

test: install
	cd $(ROOT) && $(BIN)/python -m pytest $(ARGS)

lint: install
	cd $(ROOT) && $(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

bench: install
	cd $(ROOT) && $(BIN)/fewstep bench

docs: install
	cd $(ROOT) && $(BIN)/python -m pip install --quiet --constraint requirements/constraints.txt pdoc && $(BIN)/python -m pdoc --output-directory build/docs fewstep fewstep_kernels

clean:
	rm -rf $(VENV) $(ROOT)/build $(ROOT)/*.egg-info
