"""The GPU suite without a GPU: its stages, what they would run, and that they say why they do not."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu

ROOT = Path(__file__).parents[2]


def test_the_gpu_suite_says_that_there_is_no_gpu():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = subprocess.run([sys.executable, "bench/gpu.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines][-4:] == ["tests", "sanitizer", "benchmarks", "counters"]
    assert all(line.endswith("skipped: torch finds no GPU") for line in lines)


def test_the_gpu_suite_keeps_its_time(tmp_path, capsys, monkeypatch):
    """With a device that is only said to be there: what would run, in which stages."""
    stages = []

    def stage(jobs, out, seconds):
        stages.append((jobs, seconds))
        return ["tests"] if len(stages) == 2 else []

    monkeypatch.setattr(gpu, "_no_gpu", lambda: None)
    monkeypatch.setattr(gpu, "_gpu_name", lambda: "a-gpu")
    monkeypatch.setattr(gpu, "_stage", stage)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out"), "--seconds", "400"])
    assert gpu.main() == 1
    assert capsys.readouterr().out.endswith("failed: tests\n")
    assert [len(jobs) for jobs, _ in stages] == [1, gpu.PARITY_PROCESSES + 2, 1, 1]
    (benchmarks,), seconds = stages[2]
    assert benchmarks.command[-1] == str(tmp_path / "out" / "a-gpu.jsonl")
    assert float(benchmarks.command[benchmarks.command.index("--seconds") + 1]) < seconds < 400


def test_its_processes_run_the_checkout(tmp_path, monkeypatch):
    code = "from importlib.util import find_spec as f; print(f('prefixmem_fast').origin, f('bench').origin)"
    assert gpu._stage([gpu.Job("import", [sys.executable, "-c", code])], tmp_path, 60) == []
    assert (
        tmp_path / "logs" / "import.log"
    ).read_text() == f"{ROOT / 'prefixmem_fast' / '__init__.py'} {ROOT / 'bench' / '__init__.py'}\n"


def test_stages_of_the_gpu_suite_run_side_by_side_and_are_cut_off(tmp_path, capsys, monkeypatch):
    code = "import sys, time; print('begun', flush=True); time.sleep(float(sys.argv[1])); sys.exit(int(sys.argv[2]))"
    job = lambda name, *values: gpu.Job(name, [sys.executable, "-c", code, *map(str, values)])  # noqa: E731
    jobs = [job("good", 0, 0), job("bad", 0, 3), job("late", 60, 0), gpu.Job("none", [], "not on the PATH")]
    assert sorted(gpu._stage(jobs, tmp_path, 2)) == ["bad", "late"]
    text = capsys.readouterr().out
    assert "== none: skipped: not on the PATH" in text
    assert "== bad: exit code 3" in text
    assert "== late: cut off" in text
    assert (tmp_path / "logs" / "late.log").read_text() == "begun\n", "what it wrote is kept"
