# Each target does its own set-up: a virtual environment in .venv, packages pinned by constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: sweep test fast clean
sweep: .venv/.run
	$(BIN)/joulemoe sweep tune_spaces/quickstart.yaml --out results

test: .venv/.dev
	scripts/check

fast: .venv/.dev
	$(BIN)/python -m pytest -m "not slow"

.venv/.venv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "joulemoe needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	touch $@

.venv/.run: .venv/.venv pyproject.toml constraints.txt
	@echo "Installing joulemoe into .venv (a few minutes the first time) ..."
	$(PIP) torch==2.13.0
	$(PIP) -e .
	touch $@

.venv/.dev: .venv/.run
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf .venv results build *.egg-info
