# One grammar: `make VERB`, with IN, OUT, SCALE and ARGS where the verb takes them.
#
#   make upscale                        an example photograph, through the whole pipeline
#   make upscale IN=photo.jpg SCALE=4   a photograph of yours
#   make test                           the whole test suite
#   make check                          style, types, import direction, dependencies
#   make bench                          speed and memory of the engine
#   make bench-quality                  picture quality beside other upscalers
#   make train                          the packaged model, from scratch
#   make docs                           the generated pages of docs/

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
IN ?= examples/cat.jpg
SCALE ?= 2
OUT ?= out
ARGS ?=
TEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help upscale test check bench bench-quality train docs clean

help:
	@sed -n 's/^#   //p' Makefile

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "tegula needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.tegula: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.tegula-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@ $(VENV)/.tegula

upscale: $(VENV)/.tegula
	$(BIN)/tegula upscale '$(IN)' --output '$(OUT)/' --scale $(SCALE) --compare --overwrite $(ARGS)

test: $(VENV)/.tegula-dev
	$(BIN)/python -m pytest $(TEST_ARGS)

check: $(VENV)/.tegula-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/deptry src

bench: $(VENV)/.tegula-dev
	$(BIN)/python -m bench.engine $(ARGS)
	$(BIN)/python -m bench.modes

bench-quality: $(VENV)/.tegula-dev
	$(BIN)/python -m bench.quality $(ARGS)

train: $(VENV)/.tegula-dev
	$(BIN)/python -m train $(ARGS)

docs: $(VENV)/.tegula-dev
	$(BIN)/python -m docs.generate

clean:
	rm -rf $(VENV) out build dist
