# Everything a person or a CI machine runs here. `make` alone lists the targets.
#
#   PYTHON      the interpreter the environment is made from (3.11)
#   VENV        where the environment lives
#   KEEP        with demo: leave the endpoint and its page running
#   KILLS       with chaos: how often the loop is killed
#   PICTURES    with bench-drift: a folder of pictures with their captions in metadata.jsonl
#   QUICK       with bench-replay: only try that it runs
#   PIP_FLAGS   more options for pip, such as another package index

PYTHON    ?= $(shell command -v python3.11 || command -v python3)
VENV      ?= .venv
PIP_FLAGS ?=
KEEP      ?=
KILLS     ?= 30
BIN       := $(VENV)/bin
STAMP     := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup check format test test-slow demo bench-train bench-tune bench-gate bench-drift bench-replay bench-serve soak chaos clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

setup: $(STAMP)  ## make .venv with every package at its pinned version; does nothing when that is done
	@echo "setup: $(VENV) holds the packages of constraints.txt"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	  echo "error: setup expected Python 3.11, found: '$(PYTHON)' ($$($(PYTHON) --version 2>&1));" \
	       "install python3.11 with its venv module, or name one: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  echo "setup: making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@echo "setup: installing the packages of constraints.txt (about 3 GB; 2 to 5 minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

check: $(STAMP)  ## lint, format check, types
	@echo "check: ruff, formatter, mypy"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)  ## repair what ruff can repair, and format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

test: $(STAMP)  ## run the tests of every part
	@echo "test: on the CPU, without network; the slowest tests are listed at the end"
	@$(BIN)/pytest -m "not slow" --durations=15 --durations-min=1

test-slow: $(STAMP)  ## run the tests that take minutes: searches on real workers, tracking servers, rehearsals
	@echo "test-slow: searches and runs that are killed and continued, tracking servers, rehearsals (about half an hour)"
	@$(BIN)/pytest -m slow --durations=15 --durations-min=1

demo: $(STAMP)  ## the whole story on the built-in data: search, gate, serve, drift, retrain; KEEP=1 keeps the endpoint
	@$(BIN)/fresco demo $(if $(KEEP),,--stop)

bench-train: $(STAMP)  ## training speed beside a plain loop, and ZeRO memory beside the formula
	@$(BIN)/python -m benchmarks.train

bench-tune: $(STAMP)  ## steps that the search saves beside random search, and the time between two trials
	@$(BIN)/python -m benchmarks.tune

bench-gate: $(STAMP)  ## how often the gate promotes equal recipes, and finds better ones, on real runs
	@$(BIN)/python -m benchmarks.gate

bench-drift: $(STAMP)  ## false alarms of years of daily looks, and power, of the drift monitor; PICTURES=folder with metadata.jsonl for real ones
	@$(BIN)/python -m benchmarks.drift $(if $(PICTURES),--pictures $(PICTURES))

bench-replay: $(STAMP)  ## what replay, averaging and anchors buy when the world drifts; QUICK=1 only tries that it runs
	@$(BIN)/python -m benchmarks.replay $(if $(QUICK),--quick)

bench-serve: $(STAMP)  ## images/s, latency and memory of the endpoint beside diffusers' pipeline behind Ray Serve
	@$(BIN)/python -m benchmarks.serve

soak: $(STAMP)  ## ten minutes of load, swaps, hang-ups and killed replicas: every answer right, none lost, no leak
	@$(BIN)/python -m benchmarks.soak

chaos: $(STAMP)  ## the standing loop killed at 30 random moments, on disk and on S3, ends as an undisturbed one; KILLS=3 to try it
	@$(BIN)/python -m benchmarks.chaos --kills $(KILLS)
	@$(BIN)/python -m benchmarks.chaos --kills $(KILLS) --s3

clean:  ## remove caches and build/, never a workspace
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
