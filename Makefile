# Two commands that need nothing but python3 with venv: each makes .venv, installs, and runs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test docs clean

demo: .venv/installed
	$(BIN)/aiosgd run --epochs 40 --learning-rate 0.1 --set optimizer.momentum=0.9 --title demo

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n 2 -m "not proof and not extra" --cov=aiosgd --cov-branch --cov-report= --cov-fail-under=95
	$(BIN)/python -m pytest -q -n 2 -m proof

# warnings are errors; the pages are in site/, and load nothing from elsewhere
docs: .venv/installed-site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --clean

.venv/installed-site: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[site]'
	@touch .venv/installed $@

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/installed-dev: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch .venv/installed $@

clean:
	rm -rf .venv build dist site *.egg-info
