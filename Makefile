# Needs Python >= 3.10 and make. Everything else goes into .venv, set up on first use and again when pyproject.toml
# changes. Options of a program go into ARGS:  make demo ARGS="--data mnist --root DIR"
PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test check docs format benchmarks clean

help:
	@echo "make demo        train a network, watch it, take it apart, and write a page about it"
	@echo "make test        run the tests and the examples in docstrings"
	@echo "make check       format, lint, types, and the documentation without a warning"
	@echo "make docs        the documentation, into output/docs"
	@echo "make format      put the sources into the form that 'make check' asks for"
	@echo "make benchmarks  run every benchmark that was not run yet (long); ARGS=--smoke only shows that each runs"
	@echo "make clean       remove .venv and what tools left behind"

demo: $(READY)
	$(BIN)/python -m examples.quickstart $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/sphinx-build -q -W --keep-going -b html docs output/docs

docs: $(READY)
	$(BIN)/sphinx-build -W --keep-going -b html docs output/docs
	@echo "file://$(CURDIR)/output/docs/index.html"

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmarks: $(READY)
	$(BIN)/python -m benchmarks $(ARGS)
	@$(if $(findstring --smoke,$(ARGS)),,$(BIN)/python -m benchmarks.report)

# The stamp is written last, so that an interrupted set-up is taken up again; pip leaves alone what is there already.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
		f"{sys.executable} is Python {sys.version.split()[0]}: 3.10 or later is needed; try make PYTHON=python3.12")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { echo \
		"$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis output
