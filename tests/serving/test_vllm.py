"""The encoder in vLLM beside transformers: `make test-vllm` has an environment of its own for it.

Each case is an engine in a process of its own, see `vllm_run`.
"""

import importlib.util
import json
import subprocess
import sys

import pytest

from tests.helpers.imports import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed: make test-vllm"),
]
SECONDS = 900


def run(folder, **case):
    command = [sys.executable, "-m", "tests.serving.vllm_run", json.dumps(case), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


CHUNKED = {"max_num_batched_tokens": 64}
FEW_BLOCKS = {"num_gpu_blocks_override": 24}
UNCACHED = {"enable_prefix_caching": False}
GREEDY = {
    "cached prefixes": {"passes": 2},
    "no cached prefixes": {"arguments": UNCACHED},
    "chunked prefill of cached prefixes": {"passes": 2, "arguments": CHUNKED},
    "preemption": {"arguments": FEW_BLOCKS},
    "torch.compile": {"arguments": {"enforce_eager": False}},
    "worker processes": {"mp": True},
    "Llama": {"model": "llama"},
    "Qwen2": {"model": "qwen2"},
    "cross-item orders": {"encoder": "cross-item"},
    "lags and a head": {"encoder": "lagged"},
    "int8 tables": {"arguments": {"quantization": "int8"}},
    "fp8 tables": {"arguments": {"quantization": "fp8"}},
    "mapped tables": {"arguments": {"tables": "mapped"}},
    "V2, cached prefixes": {"runner": 2, "passes": 2},
    "V2, no cached prefixes": {"runner": 2, "arguments": UNCACHED},
    "V2, chunked prefill of cached prefixes": {"runner": 2, "passes": 2, "arguments": CHUNKED},
    "V2, preemption": {"runner": 2, "arguments": FEW_BLOCKS},
    "V2, lags and a head": {"runner": 2, "encoder": "lagged"},
}


@pytest.mark.parametrize("name", GREEDY)
def test_tokens_are_those_of_transformers(name, tmp_path):
    case = GREEDY[name]
    found = run(tmp_path, **case)
    assert (found["same"], found["of"]) == (60, 60)
    assert found["error"] <= 1e-5
    if not case.get("mp"):  # which runner's windows were read
        read, other = ("windows_of_step", "store") if case.get("runner") == 2 else ("store", "windows_of_step")
        assert found[read] > 0
        assert found[other] == 0
    options = case.get("arguments", {})
    assert (found["cache_hits"] > 0) == (options != UNCACHED)
    assert (found["preemptions"] > 0) == (options == FEW_BLOCKS)


@pytest.mark.parametrize("runner", [1, 2])
def test_without_w_out_tokens_are_others(runner, tmp_path):
    """The control: W_out is zeroed in what vLLM reads."""
    found = run(tmp_path, encoder="zeroed", runner=runner)
    assert found["same"] < 10


@pytest.mark.parametrize(("runner", "prompts"), [(1, 12), (2, 6)])
def test_beams_are_those_of_generate_items(runner, prompts, tmp_path):
    found = run(tmp_path, what="beams", runner=runner, prompts=prompts)
    assert found["same"] == prompts
    assert found["error"] <= 1e-5


@pytest.mark.parametrize("runner", [1, 2])
def test_samples_are_items(runner, tmp_path):
    found = run(tmp_path, what="samples", runner=runner, prompts=6)
    assert found["same"] == 6


def test_what_cannot_work_is_refused(tmp_path):
    found = run(tmp_path, what="refusals", prompts=1)
    assert found["same"] == found["of"] == 3
