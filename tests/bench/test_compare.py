"""When B counts as slower than A."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import compare as compare_module
from bench.cli import main
from bench.compare import compare
from bench.rows import append_rows, latest

ROOT = Path(__file__).parents[2]
MACHINE = {"gpus": [], "cpu": "a CPU", "threads": 2}


def row(p50, spread=0.05, provider="prefixmem_fast", metric="step", unit="ms", run="1", **workload):
    return {
        "benchmark": "training",
        "provider": provider,
        "workload": workload,
        "metric": metric,
        "unit": unit,
        "p50": p50,
        "p20": p50 * (1 - spread),
        "p80": p50 * (1 + spread),
        "run": run,
    }


def verdicts(a, b):
    return [figure.slower for figure in compare(a, b)]


def test_fifteen_percent_beyond_the_spread_is_slower():
    assert verdicts([row(1.0)], [row(1.30)]) == [True]
    assert verdicts([row(1.0)], [row(1.14, spread=0)]) == [False]
    assert verdicts([row(1.0)], [row(0.5)]) == [False]
    assert verdicts([row(1.0, spread=0.2)], [row(1.3, spread=0.2)]) == [False], "the quantiles overlap"


def test_memory_and_launches_have_no_spread():
    assert verdicts(
        [row(100, 0, metric="peak memory", unit="MiB")], [row(116, 0, metric="peak memory", unit="MiB")]
    ) == [True]
    assert verdicts(
        [row(1, 0, metric="launches", unit="launches")], [row(2, 0, metric="launches", unit="launches")]
    ) == [True]


def test_only_our_own_main_figures_count():
    peer = row(1.0, provider="plain PyTorch")
    assert compare([peer], [{**peer, "p50": 9.0}]) == []
    phases = [row(1.0, metric="forward"), row(5.0, metric="step")]
    assert [figure.what for figure in compare(phases, phases)] == ["training, prefixmem_fast, step: "]
    assert compare([row(1.0, sids=1)], [row(1.0, sids=2)]) == []


def write(path, rows, machine=MACHINE):
    for measured in rows:
        append_rows(path, {"run": measured["run"], "machine": machine}, [measured])
    return str(path)


def test_files_are_compared_by_their_last_run(tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", [row(9.0, run="0"), row(1.0, run="1")])
    b = write(tmp_path / "b.jsonl", [row(1.01)])
    assert main(["compare", a, b]) == 0
    assert "0 of 1 figures are slower" in capsys.readouterr().err
    slow = write(tmp_path / "slow.jsonl", [row(1.5)])
    assert main(["compare", a, slow]) == 1
    assert capsys.readouterr().out.startswith("SLOWER   +50%  1 to 1.5 ms")
    assert main(["compare", a, slow, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["slower"] is True


def test_the_last_run_of_a_workload_stands_for_it():
    """Also where it measured fewer providers than the one before."""
    old, other = row(9.0, run="0"), row(5.0, run="0", provider="prefixmem_fast, gone")
    elsewhere, new = row(3.0, run="0", sids=7), row(1.0, run="1")
    assert latest([old, other, elsewhere, new]) == [elsewhere, new]


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", [row(1.0)])
    other = write(tmp_path / "b.jsonl", [row(1.0)], {**MACHINE, "threads": 1})
    assert main(["compare", a, other]) == 2
    assert "not to be compared" in capsys.readouterr().err
    nothing = write(tmp_path / "c.jsonl", [row(1.0, sids=3)])
    assert main(["compare", a, nothing]) == 2
    assert "no figure of prefixmem_fast in common" in capsys.readouterr().err
    assert main(["compare", a, "HEAD"]) == 2
    assert "two files of rows, or two git revisions" in capsys.readouterr().err


def git(folder, *arguments):
    command = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org", *arguments]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


SLOW = """
from prefixmem_fast.operation import token_memory as _fast


def token_memory(*arguments, **options):
    import time

    time.sleep(0.05)
    return _fast(*arguments, **options)
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """This tree as a commit, then one whose token streams wait: tagged fast and slow."""
    folder = tmp_path_factory.mktemp("revisions") / "checkout"
    folder.mkdir()
    for name in ("prefixmem_fast", "kernels", "bench"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "fast")
    git(folder, "tag", "fast")
    with (folder / "prefixmem_fast" / "__init__.py").open("a") as package:
        package.write(SLOW)
    git(folder, "commit", "-q", "-a", "-m", "slow")
    git(folder, "tag", "slow")
    return folder


@pytest.mark.slow
def test_revisions_run_in_turns(repository):
    """The wait of 50 ms is found in B, and in B alone: each side ran its own library."""
    command = [sys.executable, "-m", "bench", "compare", "fast", "slow"]
    command += ["--names", "tokens", "--quick", "--rounds", "3", "--json"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-2000:]
    (figure,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert figure["what"].startswith("tokens, prefixmem_fast, forward")
    assert figure["a"] < 50 <= figure["b"]


@pytest.mark.parametrize(("rounds", "code"), [(1, 0), (2, 0), (3, 1)])
def test_a_verdict_takes_three_rounds(rounds, code, repository, monkeypatch, capsys):
    def run(command, **options):
        """Rows of a library that takes twice the time in B, in place of its run."""
        if command[1:4] != ["-m", "bench", "run"]:
            return real(command, **options)
        out = Path(command[command.index("--out") + 1])
        append_rows(out, {"run": "1", "machine": MACHINE}, [row(2.0 if out.stem == "b" else 1.0)])
        return subprocess.CompletedProcess(command, 0)

    real = subprocess.run
    monkeypatch.setattr(compare_module.subprocess, "run", run)
    monkeypatch.setattr(compare_module, "__file__", str(repository / "bench" / "compare.py"))
    assert main(["compare", "fast", "slow", "--rounds", str(rounds), "--json"]) == code
    printed = capsys.readouterr()
    assert json.loads(printed.out)["slower"] is (True if rounds == 3 else None)
    assert ("no verdict: --rounds" in printed.err) == (rounds < 3)


def test_an_unknown_revision_is_refused(repository, capsys):
    assert main(["compare", "HEAD", "no-such-revision"]) == 2
    assert "'no-such-revision' is neither" in capsys.readouterr().err
