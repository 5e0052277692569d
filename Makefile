# Commands that need nothing but python3 with venv: each makes its environment, installs, and runs.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS_BIN := .venv-extras/bin

# what `make test-extras` installs, and what must then import; torch first, from a version of its own
EXTRAS := dashboard,jax,kubernetes,lossless,mlflow,notebook,plots,ray,site,tensorboard,torch,wandb
EXTRAS_FIRST := torch==2.13.0
EXTRAS_IMPORTS := jax kubernetes_validate matplotlib mkdocs mlflow nbclient ray starlette tensorboard torch \
    uvicorn wandb yaml zstandard

# test processes; more than the cores of a small machine, for many tests wait for node processes
JOBS ?= 3
PYTEST := python -m pytest -q -n $(JOBS) --dist worksteal
PIP := python -m pip install --quiet --disable-pip-version-check

# hundreds of short processes start here: without bytecode, each compiles the whole package again
unexport PYTHONDONTWRITEBYTECODE

.PHONY: clean demo docs lint proofs test test-base test-extras

demo: .venv/installed
	$(BIN)/aiosgd run --epochs 40 --learning-rate 0.1 --set optimizer.momentum=0.9 --title demo

test: lint test-base proofs

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-base: .venv/installed-dev
	$(BIN)/$(PYTEST) -m "not proof and not extra" --cov=aiosgd --cov-branch --cov-report= --cov-fail-under=95

# measuring coverage doubles the time of what only computes
proofs: .venv/installed-dev
	$(BIN)/$(PYTEST) -m "proof and not extra"

test-extras: .venv-extras/installed
	$(EXTRAS_BIN)/python -c 'import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]' $(EXTRAS_IMPORTS)
	$(EXTRAS_BIN)/python -m pytest -q -n 2 --dist loadfile -m extra

# warnings are errors; the pages are in site/, and load nothing from elsewhere
docs: .venv/installed-site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --clean

.venv/installed-site: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/$(PIP) -e '.[site]'
	@touch .venv/installed $@

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/$(PIP) -e .
	@touch $@

.venv/installed-dev: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/$(PIP) -e '.[dev]'
	@touch .venv/installed $@

.venv-extras/installed: pyproject.toml Makefile
	$(PYTHON) -m venv .venv-extras
	$(EXTRAS_BIN)/$(PIP) $(EXTRAS_FIRST)
	$(EXTRAS_BIN)/$(PIP) -e '.[dev,$(EXTRAS)]'
	@touch $@

clean:
	rm -rf .venv .venv-extras build dist site *.egg-info
