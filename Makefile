# Two commands on a fresh machine: `make demo` and `make test`. Both create .venv with the versions in constraints.txt.
# `make check` is the part of `make test` that takes minutes less, for in between.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
AT_ONCE := --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Modules are compiled when they are first imported, and not by every process anew where the machine asks for that.
unexport PYTHONDONTWRITEBYTECODE

# `make gpu` and its steps are for machines that have one.
.PHONY: demo check dist docs test test-all test-min test-latest test-versions gpu gpu-1 gpu-2 gpu-3 gpu-4 gpu-5 vllm lint format clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

# What two cores do in 12 minutes, the environment included.
test: lint
	$(BIN)/pytest $(AT_ONCE) -m "not long"

# Everything, before a release.
test-all: lint
	$(BIN)/pytest $(AT_ONCE)

# And in 3.
check: lint
	$(BIN)/pytest $(AT_ONCE) -m "not slow and not minutes and not long"

# The same tests with the oldest and the newest versions that are supported, each in an environment of its own. The
# interpreter of Triton 3.6, which torch 2.11 comes with, does not know NumPy 2.4.
test-min:
	$(MAKE) test-versions VENV=.venv-min UNPINNED="^(torch|triton|transformers|peft|huggingface_hub|sympy|numpy)==" \
		VERSIONS="torch==2.11.0 transformers==5.17.0 peft==0.20.0 'numpy<2.4'"

test-latest:
	$(MAKE) test-versions VENV=.venv-latest UNPINNED="==" VERSIONS="torch==2.13.0 'transformers>=5.24'"

test-versions: $(VENV)/.installed-versions
	$(BIN)/pytest $(AT_ONCE)

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --num-workers 2 || $(BIN)/mypy  # it gives up workers that take 3 s to start, as on a busy machine
	$(BIN)/lint-imports

# Five steps of ten minutes at most, with the Python and the torch that the machine has: .venv's torch knows no GPU.
GPU_RESULTS ?= build/gpu
gpu: STEPS := 1 2 3 4 5
gpu gpu-1 gpu-2 gpu-3 gpu-4 gpu-5:
	PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) benchmarks/gpu.py $(or $(STEPS),$(@:gpu-%=%)) --results $(GPU_RESULTS)

# What a release uploads, checked and tried in an environment of its own: RELEASE.md.
dist:
	rm -rf dist build/dist-tools build/dist-try
	$(PYTHON) -m venv build/dist-tools
	build/dist-tools/bin/python -m pip install --quiet build twine
	build/dist-tools/bin/python -m build --outdir dist .
	build/dist-tools/bin/python -m twine check --strict dist/*
	$(PYTHON) -m venv build/dist-try
	build/dist-try/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd build && dist-try/bin/optq --version && dist-try/bin/python ../tests/installed.py

# The documentation as a site, in site/: open site/index.html. Only the packages are downloaded, the first time.
docs: $(VENV)/.installed-docs
	HF_HUB_OFFLINE=1 NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	! grep -rlE '<(script|link|img|iframe)[^>]* (src|href)="?(https?:)?//' site  # nothing is loaded from elsewhere

# A real vLLM for CPUs beside ours, in .cache: 3 GB and 5 minutes the first time.
vllm: $(VENV)/.installed
	OPTQ_TEST_VLLM=$$(cd benchmarks && ../$(BIN)/python environments.py vllm) $(BIN)/pytest -m vllm

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Compiling 19,000 modules takes a minute, and the tests import a part of them. Both cores unpack what is pinned; what
# this machine's Python or system has no such version of, and what it needs besides, is for the lines after that.
$(VENV)/.installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	sed '/make docs/,$$d' constraints.txt | grep == | xargs -P 2 -n 45 $(BIN)/python -m pip install --quiet --no-compile --no-deps || true
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[dev,demo]"
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

# What is not in VERSIONS is as in constraints.txt with the oldest, and the newest that there is with the newest.
$(VENV)/.installed-versions: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	grep -vE '$(UNPINNED)' constraints.txt > $(VENV)/constraints.txt || true
	$(BIN)/python -m pip install --quiet --no-compile --constraint $(VENV)/constraints.txt $(VERSIONS) --editable ".[dev,demo]"
	touch $@

clean:
	rm -rf .venv .venv-min .venv-latest .cache build site src/optq.egg-info
