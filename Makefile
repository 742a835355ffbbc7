# make demo and make test need Python >= 3.11 and a package registry, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Files of tests side by side: two on two cores, never more than four, for each may have a Spark of its own.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile
export OMP_WAIT_POLICY := PASSIVE
export NO_ALBUMENTATIONS_UPDATE := 1

.PHONY: demo test check bench clean

demo: $(VENV)/.installed          ## install, then the embedded pool through the whole line
	$(BIN)/winnow demo --out demo-out

test: $(VENV)/.installed          ## install, then the tests
	$(BIN)/python -m pytest $(PARALLEL)

check: $(VENV)/.installed         ## what CI runs: lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PARALLEL)

bench: $(VENV)/.installed         ## ratios against the peers, printed
	$(BIN)/python -m tests.bench.score && $(BIN)/python -m tests.bench.selecting && $(BIN)/python -m tests.bench.shards

clean:
	rm -rf $(VENV) demo-out .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(f"winnow needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}. Set PYTHON=." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
