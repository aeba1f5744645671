import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench.__main__ as bench
from bench import constrained
from bench.providers import OURS, PEERS, EagerTables, FbgemmTables, FusedAdagrad, FusedTable
from prefixmem_fast import reference

ROOT = Path(__file__).parents[1]


def run(*arguments):
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_training_benchmark_writes_rows(tmp_path):
    out = tmp_path / "results" / "rows.jsonl"
    table = run("-m", "bench", "--quick", "--repeats", "3", "--out", str(out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(row["machine"]["versions"] and row["commit"] for row in rows)
    names = {provider.name for provider in (*OURS, *PEERS)}
    assert {row["provider"] for row in rows} == names
    timed = [row for row in rows if "ms" in row]
    assert all(row["p20"] <= row["ms"] <= row["p80"] for row in timed)
    skipped = {row["provider"] for row in rows if "skipped" in row}
    assert skipped <= {FbgemmTables.name}
    assert {row["provider"] for row in rows if "peak_mib" in row} == names - skipped
    assert all(name in table for name in names)


def test_a_wrong_provider_gets_no_time(monkeypatch):
    class Wrong(FusedAdagrad):
        name = "wrong"

        def forward(self, codes):
            return super().forward(codes) + 1e-3

    monkeypatch.setattr(bench, "OURS", (FusedAdagrad, Wrong))
    monkeypatch.setattr(bench, "PEERS", ())
    rows = bench.run_workload(bench.Workload(500, 300), 2, "cpu")
    assert [row["skipped"] for row in rows if row["provider"] == "wrong"] == [
        "WRONG: its forward differs from the reference; not timed"
    ]
    assert any("ms" in row for row in rows if row["provider"] == FusedAdagrad.name)


def test_providers_agree_on_the_gradient():
    """One SGD step moves the tables of the peers that take any optimizer by the same sums."""
    spec = bench.Workload(500, 64).spec()
    codes = torch.randint(0, 2048, (64, 5))
    grad = torch.randn(64, 2, 256)
    weight = torch.randn(spec.total_rows, 64)
    expected = reference.prefix_memory_backward(grad, codes, spec)
    fused = FusedTable(spec, weight.clone())
    fused.backward(fused.forward(codes), grad)
    torch.testing.assert_close(fused.weight.grad.to_dense(), expected)
    eager = EagerTables(spec, weight)
    eager.backward(eager.forward(codes), grad)
    torch.testing.assert_close(torch.cat([table.weight.grad for table in eager.tables.values()]), expected)


def test_the_gpu_suite_says_that_there_is_no_gpu():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    lines = run("bench/gpu.py").splitlines()
    assert [line.split()[0] for line in lines] == ["info", "parity", "tests", "benchmarks"]
    assert all(line.endswith("skipped: torch finds no GPU") for line in lines)


def test_constrained_benchmark_writes_rows(tmp_path):
    out = tmp_path / "rows.jsonl"
    run("-m", "bench.constrained", "--quick", "--repeats", "3", "--out", str(out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["provider"].split(",")[0] for row in rows] == ["SIDLogitsProcessor"] + ["prefix_allowed_tokens_fn"] * 2
    assert all(row["p20"] <= row["ms"] <= row["p80"] and row["commit"] for row in rows)


def test_a_wrong_allowed_set_gets_no_time(monkeypatch):
    monkeypatch.setattr(constrained, "nested_dicts", lambda tokens: lambda batch, sentence: [constrained.EOS])
    rows = constrained.run(50, 2, 2, 2048, 2, "cpu")
    assert [("ms" in row, "skipped" in row) for row in rows] == [(True, False), (True, False), (False, True)]
