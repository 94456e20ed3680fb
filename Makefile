# Two commands on a fresh machine: `make demo` and `make test`. Both create .venv with the versions in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# `make gpu` is for machines that have one.
.PHONY: demo test gpu lint format clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# With the Python and the torch that the machine has: .venv's torch knows no GPU.
gpu:
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu
	PYTHONPATH=src $(PYTHON) benchmarks/kernels.py --bits 4
	PYTHONPATH=src $(PYTHON) benchmarks/kernels.py --bits 2 3 8 --models 8B
	PYTHONPATH=src $(PYTHON) benchmarks/experts.py
	PYTHONPATH=src $(PYTHON) benchmarks/generate.py
	PYTHONPATH=src $(PYTHON) benchmarks/solver.py
	PYTHONPATH=src $(PYTHON) benchmarks/large.py

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,demo]"
	touch $@

clean:
	rm -rf $(VENV) .cache build src/optq.egg-info
