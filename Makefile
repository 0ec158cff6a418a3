# One grammar: `make VERB`, with IN, OUT, SCALE and ARGS where the verb takes them.
#
#   make upscale                        an example photograph, through the whole pipeline
#   make upscale IN=photo.jpg SCALE=4   a photograph of yours
#   make serve                          the server, with a page to try it on
#   make test                           the whole test suite
#   make check                          style, types, import direction, dependencies
#   make bench                          the three below, one after the other
#   make bench-speed                    speed and memory, beside other ways and the device's limit
#   make bench-modes                    canvas and redraw mode beside each other
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
.PHONY: help upscale serve test check bench bench-speed bench-modes bench-quality train docs clean

help:
	@sed -n 's/^#   //p' Makefile

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "tegula needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.tegula: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.tegula-server: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[server]'
	touch $@ $(VENV)/.tegula

$(VENV)/.tegula-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'spandrel>=0.4' 'brisque>=0.2,<1'
	touch $@ $(VENV)/.tegula

upscale: $(VENV)/.tegula
	$(BIN)/tegula upscale '$(IN)' --output '$(OUT)/' --scale $(SCALE) --compare --overwrite $(ARGS)

serve: $(VENV)/.tegula-server
	$(BIN)/tegula serve --demo $(ARGS)

test: $(VENV)/.tegula-dev
	$(BIN)/python -m pytest $(TEST_ARGS)

check: $(VENV)/.tegula-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/deptry src

bench: bench-speed bench-modes bench-quality

bench-speed: $(VENV)/.tegula-dev
	$(BIN)/python -m bench.speed $(ARGS)

bench-modes: $(VENV)/.tegula-dev
	$(BIN)/python -m bench.modes $(ARGS)

bench-quality: $(VENV)/.tegula-dev
	$(BIN)/python -m bench.quality $(ARGS)

train: $(VENV)/.tegula-dev
	$(BIN)/python -m train $(ARGS)

docs: $(VENV)/.tegula-dev
	$(BIN)/python -m docs.generate
	$(BIN)/python -m bench.speed.page

clean:
	rm -rf $(VENV) out build dist
