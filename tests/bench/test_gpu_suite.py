"""The GPU suite without a GPU: the order of its parts, their time, what they would run, and what is kept."""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import cli, gpu
from bench.cli import _changed
from bench.registry import BENCHMARKS
from bench.run import plan
from prefixmem_fast._choices import SHAPES
from prefixmem_fast.cli import parser_of

ROOT = Path(__file__).parents[2]
COMMIT = "a-revision"


@pytest.fixture
def suite(tmp_path):
    return gpu.Suite(tmp_path, tmp_path / "a-gpu.jsonl", ["--commit", COMMIT])


def test_the_gpu_suite_says_that_there_is_no_gpu():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = subprocess.run([sys.executable, "bench/gpu.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(gpu.PARTS)
    assert all(line.endswith("skipped: torch finds no GPU") for line in lines)


def test_parts_run_in_order_and_keep_their_time(tmp_path, capsys, monkeypatch):
    """With a device that is only said to be there, and processes that take half of what they are given."""
    now, ran = [1000.0], []

    def run(jobs, suite, seconds):
        ran.extend((job.name, now[0] - 1000, seconds) for job in jobs)
        for job in jobs:
            suite.add(
                job.name,
                "exit code 1" if job.name == "tests" else "ok",
                "1 of 2 shapes, 3 batches, 40 comparisons, 0 mismatches",
            )
        now[0] += seconds / 2

    monkeypatch.setattr(gpu, "_no_gpu", lambda: None)
    monkeypatch.setattr(gpu, "_gpu_name", lambda: "a-gpu")
    monkeypatch.setattr(gpu, "_run", run)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out"), "--seconds", "400"])
    assert gpu.main() == 1
    text = capsys.readouterr().out
    assert text.endswith("failed: tests\n")
    names = [name for name, _, _ in ran]
    assert f"parity: {len(ran)} specs, {3 * len(ran)} batches, {40 * len(ran)} comparisons, 0 mismatches" in text
    order = ["info", "parity, paper", "tables", "sweeps", "models", "predicted", "counters, training-sweep", "tests"]
    assert sorted(order, key=names.index) == order
    ends = {name: began + seconds for name, began, seconds in ran}
    assert all(ends[name] <= 400 for name in names)
    assert ends["tables"] == pytest.approx(0.33 * 400)
    log = (tmp_path / "out" / "gpu.log").read_text().splitlines()
    assert log[0].split() == ["exit", "code", "1", "tests"], "failures first"


def test_a_late_part_still_gets_a_second(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(gpu, "_no_gpu", lambda: None)
    monkeypatch.setattr(gpu, "_gpu_name", lambda: "a-gpu")
    monkeypatch.setattr(gpu, "_run", lambda jobs, suite, seconds: given.append(seconds))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), "--seconds", "0.001"])
    assert gpu.main() == 0
    assert set(given) == {1}


def every_job(suite):
    return [job for jobs_of, _ in gpu.PARTS.values() for jobs in jobs_of(suite, 60) for job in jobs]


def test_its_commands_are_understood(suite, monkeypatch):
    """By the parsers of what they run; benchmarks and their workloads exist."""
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    (suite.out / "compile_triton_3.6.0.json").write_text("{}")
    benches = argparse.ArgumentParser()
    cli.add_arguments(benches)
    measured, into_rows = [], []
    for job in every_job(suite):
        assert job.absent is None, job
        *before, module = job.command[: job.command.index("-m") + 2]
        arguments = job.command[len(before) + 1 :]
        assert before[-2:] == [sys.executable, "-m"]
        if module == "prefixmem_fast.cli":
            parser_of().parse_args(arguments)
        elif module == "bench":
            options = benches.parse_args(arguments)
            if str(options.out) == str(suite.rows):
                assert options.commit == COMMIT
                into_rows.append(job.name)
            if options.action == "run":
                assert _changed(plan(options.names, "cuda", False), options.set)
                measured += options.names
        else:
            assert (module, arguments[-1]) == ("pytest", str(ROOT / "tests" / "gpu"))
    assert into_rows == ["tables", "sweeps", "models", "predicted"]
    assert set(measured) == {name for name, benchmark in BENCHMARKS.items() if benchmark.workloads("cuda")}


def test_every_shape_is_checked(suite):
    assert gpu.SHAPES == SHAPES
    names = [job.name for job in every_job(suite)]
    assert len(names) == len(set(names))
    assert {f"parity, {shape}, all batches" for shape in SHAPES} < set(names)
    assert {"memcheck", "racecheck"} < set(names)


def test_the_profiled_kernels_exist(suite):
    source = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    for name in gpu.KERNELS.split("|"):
        assert f"def {name}_kernel(" in source, name


def test_without_a_static_report_there_is_nothing_to_compare(suite):
    ((job,),) = gpu._predicted(suite, 60)
    assert job.absent == "there is no static report"


def test_its_processes_run_the_checkout(suite):
    code = "from importlib.util import find_spec as f; print(f('prefixmem_fast').origin, f('bench').origin)"
    gpu._run([gpu.Job("import", [sys.executable, "-c", code])], suite, 60)
    name, verdict, text = suite.found[0]
    assert (name, verdict) == ("import", "ok")
    assert text == f"{ROOT / 'prefixmem_fast' / '__init__.py'} {ROOT / 'bench' / '__init__.py'}\n"


def test_jobs_run_side_by_side_and_are_cut_off(suite, capsys):
    code = "import sys, time; print('begun', flush=True); time.sleep(float(sys.argv[1])); sys.exit(int(sys.argv[2]))"
    job = lambda name, *values: gpu.Job(name, [sys.executable, "-c", code, *map(str, values)])  # noqa: E731
    gpu._run([job("good", 0, 0), job("bad", 0, 3), job("late", 60, 0), gpu.Job("none", [], "not there")], suite, 2)
    gpu._run([gpu.Job("nowhere", ["/nowhere"])], suite, 2)
    assert sorted(suite.failed) == ["bad", "late", "nowhere"]
    text = capsys.readouterr().out
    assert "== none: skipped: not there" in text
    assert "== bad: exit code 3" in text
    assert "== late: cut off" in text
    log = (suite.out / "gpu.log").read_text()
    assert "===== late: cut off\nbegun\n" in log, "what it wrote is kept"
    assert [path.name for path in (suite.out / "logs").iterdir()] == ["nowhere.log"], "the others are in gpu.log"


def test_ctrl_c_keeps_what_a_running_job_wrote(tmp_path, capsys, monkeypatch):
    """In gpu.log, and it ends quietly."""

    def sleep(seconds, sleep=time.sleep):
        sleep(0.05)
        if "begun" in (tmp_path / "logs" / "long.log").read_text():
            raise KeyboardInterrupt

    code = "import time; print('begun', flush=True); time.sleep(60)"
    part = lambda suite, seconds: [[gpu.Job("long", [sys.executable, "-c", code])]]  # noqa: E731
    monkeypatch.setattr(gpu, "PARTS", {"long": (part, 0.98)})
    monkeypatch.setattr(gpu, "_no_gpu", lambda: None)
    monkeypatch.setattr(gpu, "_gpu_name", lambda: "a-gpu")
    monkeypatch.setattr(gpu.time, "sleep", sleep)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), "--seconds", "30"])
    assert gpu.main() == 130
    assert capsys.readouterr().err == f"bench/gpu.py: interrupted; what there is so far is in {tmp_path}\n"
    log = (tmp_path / "gpu.log").read_text()
    assert log.splitlines()[0].split() == ["interrupted", "long"]
    assert "===== long: interrupted\nbegun\n" in log


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seconds", "nan"], "--seconds nan is not a number above 0; give one"),
        (["--seconds", "-1"], "--seconds -1.0 is not"),
        (["--seconds", "0"], "--seconds 0.0 is not"),
        (["--out", "file"], "is no folder; give a folder"),
        (["--out", "file/deep"], "is no folder; give a folder"),
        (["--out", "x" * 5000], "cannot be written (File name too long); give a folder"),
        (["--out", "/proc/gpu"], "--out /proc/gpu cannot be written"),
    ],
)
def test_bad_arguments_are_told_before_a_gpu_is_looked_for(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(gpu, "_no_gpu", lambda: pytest.fail("a GPU is looked for"))
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    assert gpu.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("bench/gpu.py: ")
    assert words in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_long_log_stays_a_file_of_its_own(suite, capsys):
    code = f"print('first'); print('x' * {2 * gpu.LONGEST_LOG}); print('last')"
    gpu._run([gpu.Job("long", [sys.executable, "-c", code])], suite, 60)
    text = suite.found[0][2]
    assert len(text) < 1.1 * gpu.LONGEST_LOG
    assert text.startswith("first")
    assert text.endswith("last\n")
    assert len((suite.out / "logs" / "long.log").read_text()) > 2 * gpu.LONGEST_LOG


def test_counters_that_the_driver_withholds_are_no_failure(suite):
    code = "import sys; print('==ERROR== ERR_NVGPUCTRPERM'); sys.exit(1)"
    gpu._run([gpu.Job("counters", [sys.executable, "-c", code])], suite, 60)
    assert suite.found[0][1] == "skipped"
    assert not suite.failed
