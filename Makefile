PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup dev first reproduce report test test-fast torture lint docs notebooks bench retest

setup: $(VENV)/.installed
dev: $(VENV)/.dev

# Reproducing needs less than developing, and is sooner installed. Only what is imported is compiled, once for all
# processes: all that is installed would take a minute.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e ".[static]"
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -c "from mdm_interp.experiments.analysis import discover; discover()"
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# A small model trained in seconds, and a page that shows it from inside.
first: setup
	$(BIN)/mdm-interp explore examples/first_run.yaml --out explorer.html

# Options go in ARGS, for instance: make reproduce ARGS=--full
reproduce: setup
	$(BIN)/mdm-interp reproduce $(ARGS)

# Every figure from the results that are there, without a model.
report: setup
	$(BIN)/mdm-interp report $(ARGS)

# In the order of their names, as otherwise the files with few tests, some of them long, would all come last. A process
# that dies ends all: pytest-xdist would wait for ever for what it had left.
test: dev
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --max-worker-restart=0 $(ARGS)

# Without what opens a browser, trains models or builds environments.
test-fast: dev
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --max-worker-restart=0 -m "not slow and not browser and not gpu" $(ARGS)

# What becomes of faults and bad inputs, tried a hundred times and at every write; half an hour on two cores. Writes
# docs/reliability.md.
torture: dev
	$(BIN)/python -m pytest -n auto --dist load -m promise --torture --write-reliability $(ARGS)

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: dev
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going docs docs/_build/html

# Execute the notebooks, and keep what they show.
notebooks: dev
	$(BIN)/python examples/execute.py

bench: setup
	$(BIN)/python -m benchmarks $(ARGS)
	$(BIN)/python -m docs.benchmark_tables

# The quick grid twice, with two instruction sets: which verdicts move is written to docs/retest.md.
retest: setup
	$(BIN)/python -m benchmarks.retest $(ARGS)
