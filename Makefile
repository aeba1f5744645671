PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The GPU suite runs with the machine's own torch where that python has all it needs, else in the virtual environment.
GPU_NEEDS := torch, triton, pytest, hypothesis, tqdm, numpy
GPU_PYTHON = $(shell $(PYTHON) -c "import $(GPU_NEEDS)" 2>/dev/null && echo $(PYTHON) || echo $(BIN)/python)

.PHONY: test demo bench gpu lint format clean

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 tests
	@$(MAKE) --no-print-directory lint

demo: $(VENV)/ready
	$(BIN)/prefixmem info
	OMP_NUM_THREADS=1 $(BIN)/prefixmem demo

bench: $(VENV)/ready
	$(BIN)/python -m bench run --seconds 300 --report

gpu:
	@test "$(GPU_PYTHON)" = "$(PYTHON)" || { echo "$(PYTHON) cannot import all of $(GPU_NEEDS): using $(VENV)"; $(MAKE) $(VENV)/ready; }
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
