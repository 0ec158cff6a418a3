# One grammar: `make VERB`, with IN, OUT, SCALE and ARGS where the verb takes them.
#
#   make upscale                        an example photograph, through the whole pipeline
#   make upscale IN=photo.jpg SCALE=4   a photograph of yours
#   make serve                          the server, with a page to try it on
#   make test                           the whole test suite; the next three are its parts
#   make test-unit                      functions alone: no net, no process, no server
#   make test-integration               nets, the database and HTTP, in one process
#   make test-end-to-end                processes, browsers, real clients, whole upscales
#   make coverage                       the whole test suite, and which lines it ran
#   make check                          style, types, import direction, dependencies
#   make bench                          the three below, one after the other
#   make bench-speed                    speed and memory, beside other ways and the device's limit
#   make bench-card                     all that a graphics card takes; it says so without one
#   make bench-modes                    canvas and redraw mode beside each other
#   make bench-quality                  picture quality beside other upscalers
#   make cluster-demo                   a Ray cluster on this machine, parts of which are killed
#   make train                          the packaged model and its three prescalers, from scratch
#   make docs                           the generated pages of docs/, and all of them as a site
#   make lock                           the lock files of requirements/, from pyproject.toml
#   make hooks                          the checks, before every commit

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# What users run first shows pip's bars: torch takes minutes.
PIP_SHOWN := $(BIN)/python -m pip install --disable-pip-version-check
IN ?= examples/cat.jpg
SCALE ?= 2
OUT ?= out
ARGS ?=
TEST_ARGS ?=
# Tests run side by side, each process on one thread, and two processes more than there are cores,
# since tests of servers wait for half of their time. A file stays in one process, which shares its server,
# browser or nets; tests/conftest.py says in which order they come.
JOBS ?= $(shell $(PYTHON) -c 'import os; print((os.cpu_count() or 1) + 2)')
# What is compiled is kept, also where the environment says otherwise: a test process takes a quarter
# less to begin, and so does every program that a test starts.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help upscale serve test test-unit test-integration test-end-to-end coverage check bench
.PHONY: bench-speed bench-card bench-modes bench-quality cluster-demo train docs lock hooks clean

help:
	@sed -n 's/^#   //p' Makefile

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "tegula needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)

# The versions that the tests pass with, by those who use tegula taken without the hashes, since
# what they install is a part of what is locked. A Python without a lock file takes the newest.
$(VENV)/constraints.txt: requirements/lock.py $(wildcard requirements/*.txt) | $(BIN)/python
	$(BIN)/python requirements/lock.py --versions > $@

$(VENV)/.tegula: pyproject.toml $(VENV)/constraints.txt
	@echo 'Installing tegula and torch into $(VENV), once; with CUDA it is several gigabytes.'
	$(PIP_SHOWN) --constraint $(VENV)/constraints.txt --editable .
	touch $@

$(VENV)/.tegula-server: pyproject.toml $(VENV)/constraints.txt
	@echo 'Installing tegula, its server and torch into $(VENV), once; with CUDA it is several gigabytes.'
	$(PIP_SHOWN) --constraint $(VENV)/constraints.txt --editable '.[server]'
	touch $@ $(VENV)/.tegula

# Everything locked first, checked against its hashes; then tegula itself, and the torch that this
# machine's index holds for it.
$(VENV)/.tegula-dev: pyproject.toml $(VENV)/constraints.txt
	lock=$$($(BIN)/python requirements/lock.py --file) && \
	if [ -n "$$lock" ]; then $(PIP) --no-deps --require-hashes --requirement "$$lock"; \
	else $(PIP) --no-deps --requirement requirements/alone.in; fi
	$(PIP) --constraint $(VENV)/constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/.tegula

upscale: $(VENV)/.tegula
	$(BIN)/tegula upscale '$(IN)' --output '$(OUT)/' --scale $(SCALE) --compare --overwrite $(ARGS)

serve: $(VENV)/.tegula-server
	$(BIN)/tegula serve --demo $(ARGS)

test: $(VENV)/.tegula-dev
	$(PYTEST) $(TEST_ARGS)

test-unit: $(VENV)/.tegula-dev
	$(PYTEST) tests/unit $(TEST_ARGS)

test-integration: $(VENV)/.tegula-dev
	$(PYTEST) tests/integration $(TEST_ARGS)

test-end-to-end: $(VENV)/.tegula-dev
	$(PYTEST) tests/end_to_end $(TEST_ARGS)

coverage: $(VENV)/.tegula-dev
	$(PYTEST) --cov --cov-report=term:skip-covered $(TEST_ARGS)

check: $(VENV)/.tegula-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/deptry src

bench: bench-speed bench-modes bench-quality

bench-speed: $(VENV)/.tegula-dev
	$(BIN)/python -m bench.speed $(ARGS)

bench-card: $(VENV)/.tegula-dev
	$(BIN)/python -m bench.card $(ARGS)

bench-modes: $(VENV)/.tegula-dev
	$(BIN)/python -m bench.modes $(ARGS)

bench-quality: $(VENV)/.tegula-dev
	$(BIN)/python -m bench.quality $(ARGS)

cluster-demo: $(VENV)/.tegula-dev
	$(BIN)/python -W ignore -m bench.cluster --out '$(OUT)/cluster-demo.png' $(ARGS)

train: $(VENV)/.tegula-dev
	$(BIN)/python -m train $(ARGS)

docs: $(VENV)/.tegula-dev
	$(BIN)/python -m docs.generate
	$(BIN)/python -m bench.speed.page
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# uv resolves for Pythons that are not on this machine.
lock: $(BIN)/python
	$(PIP) 'uv>=0.5' packaging
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python requirements/lock.py

hooks: $(VENV)/.tegula-dev
	$(BIN)/pre-commit install

clean:
	rm -rf $(VENV) out build dist site htmlcov .coverage
