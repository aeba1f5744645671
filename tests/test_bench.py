import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def run(*arguments):
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_microbenchmark_appends_rows(tmp_path):
    out = tmp_path / "results" / "rows.jsonl"
    for _ in range(2):
        run("-m", "bench", "--sids", "64", "--table-rows", "500", "--repeats", "3", "--out", str(out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) % 2 == 0
    assert all(row["p20"] <= row["ms"] <= row["p80"] and row["machine"]["versions"] for row in rows)


def test_the_gpu_suite_says_that_there_is_no_gpu():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    lines = run("bench/gpu.py").splitlines()
    assert [line.split()[0] for line in lines] == ["info", "parity", "tests", "benchmarks"]
    assert all(line.endswith("skipped: torch finds no GPU") for line in lines)
