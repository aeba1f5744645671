PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A machine with its own torch, pytest and GPU runs the GPU suite as it is; any other takes the virtual environment.
GPU_PYTHON = $(shell $(PYTHON) -c "import torch, triton, pytest, hypothesis, tqdm" 2>/dev/null && echo $(PYTHON) || echo $(BIN)/python)

.PHONY: test demo bench gpu lint format clean

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

demo: $(VENV)/ready
	$(BIN)/prefixmem info
	$(BIN)/prefixmem demo

bench: $(VENV)/ready
	$(BIN)/python -m bench

gpu:
	@test "$(GPU_PYTHON)" = "$(PYTHON)" || $(MAKE) $(VENV)/ready
	$(GPU_PYTHON) bench/gpu.py

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(VENV)/ready: setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,bench]'
	touch $@
