# make demo   from nothing to runs/demo/report.html
# make test   what a change must pass
# Both set up what they need in .venv, once: a stamp is older than pyproject.toml or constraints.txt only when these changed.

PYTHON ?= python3
PIP = .venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: setup demo test test-slow clean

setup: .venv/core.stamp

.venv/core.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import platform, sys; sys.exit(sys.version_info < (3, 11) and "opt needs Python 3.11 or newer, and $(PYTHON) is " + platform.python_version() + "; name another one: make setup PYTHON=python3.12")'
	@echo "setting up .venv (a few minutes and 6 GB the first time)"
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@$(PIP) --editable .
	@touch $@

.venv/dev.stamp: .venv/core.stamp
	@$(PIP) --editable ".[dev]"
	@touch $@

demo: .venv/core.stamp
	@.venv/bin/python -m opt demo

test: .venv/dev.stamp
	.venv/bin/ruff check
	.venv/bin/mypy
	.venv/bin/lint-imports
	OMP_NUM_THREADS=1 .venv/bin/pytest -n 2 --dist loadfile -m "not slow"

test-slow: .venv/dev.stamp
	.venv/bin/pytest -m slow

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info
