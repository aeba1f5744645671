"""`prefixmem verify --compile` around the compiler: what is saved, and the processes of other releases of triton."""

import os
import signal
import subprocess
import sys
import time

import pytest

from prefixmem_fast._choices import DTYPES, TARGETS
from prefixmem_fast.checks import compile_report, counting, other_triton
from prefixmem_fast.cli import main


@pytest.fixture
def compiled(monkeypatch):
    """What is asked of the compiler, in place of its work."""
    asked = []

    def report(targets, dtypes, launchers, progress):
        asked.append((targets, dtypes, launchers))
        return compile_report.CompileReport({"triton": "3.6.0"}, [], [], [])

    monkeypatch.setattr(compile_report, "compile_report", report)
    return asked


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], "compile_triton_3.6.0.json"),
        (["--targets", ",".join(reversed(TARGETS)), "--dtypes", "all"], "compile_triton_3.6.0.json"),
        (["--targets", "sm_90,sm_90"], "compile_triton_3.6.0_part.json"),
        (["--dtypes", "float16"], "compile_triton_3.6.0_part.json"),
        (["--launchers", "sgd_bwd,sgd_bwd"], "compile_triton_3.6.0_part.json"),
    ],
)
def test_a_part_never_replaces_a_whole_report(tmp_path, compiled, arguments, name):
    assert main(["verify", "--compile", "--save", str(tmp_path / "new" / "folder"), *arguments]) == 0
    assert [file.name for file in (tmp_path / "new" / "folder").iterdir()] == [name]
    ((targets, dtypes, launchers),) = compiled
    assert len(targets) in (1, len(TARGETS))
    assert len(dtypes) in (1, len(DTYPES))
    assert launchers in (None, ("sgd_bwd",))


def test_a_folder_that_cannot_be_written_is_refused_before_compiling(tmp_path, compiled, capsys):
    (tmp_path / "file").touch()
    for given in (tmp_path / "file", tmp_path / "file" / "in", "/proc/none"):
        assert main(["verify", "--compile", "--save", str(given)]) == 2
        error = capsys.readouterr().err
        assert f"--save = {str(given)!r} is no folder that can be written" in error
        assert error.count("\n") == 1
    assert compiled == []


def test_a_report_names_the_triton_that_ran(monkeypatch):
    """Which may be another one than the metadata's."""
    import triton

    monkeypatch.setattr(triton, "__version__", "9.8.7+git1234")
    assert compile_report._versions()["triton"] == "9.8.7"


def test_a_row_with_spills_is_called_what_it_is():
    text = compile_report.as_text(compile_report.CompileReport({"triton": "3.6.0"}, [], [], []))
    assert text.endswith("0 kernels compiled, 0 with spills (on gfx: or local memory)")


@pytest.fixture
def releases(tmp_path, monkeypatch):
    """Two of them, and what the process of each gives."""
    codes = {}
    monkeypatch.chdir(tmp_path)
    for name in ("old", "new"):
        for part in (tmp_path / name / "triton", tmp_path / name / "triton" / "compiler"):
            part.mkdir(parents=True)
            (part / "__init__.py").touch()
    monkeypatch.setattr(other_triton, "run_with", lambda folder, arguments: codes[folder.name])
    return codes


@pytest.mark.parametrize(
    ("old", "new", "code", "words"),
    [
        (0, 0, 0, []),
        (0, -11, 1, ["with the triton of new crashed: Segmentation fault (11)"]),
        (-9, 0, 1, ["with the triton of old crashed: Killed (9)"]),
        (1, 2, 2, ["the triton of old ended with exit code 1", "the triton of new ended with exit code 2"]),
        (130, 1, 130, []),
        (-2, 1, 130, ["prefixmem verify: interrupted"]),
    ],
)
def test_the_release_that_failed_is_named(capsys, releases, old, new, code, words):
    releases.update(old=old, new=new)
    assert main(["verify", "--compile", "--triton", "old,new"]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))


def test_one_json_object_is_of_one_release(capsys, releases):
    releases.update(old=0, new=0)
    assert main(["verify", "--compile", "--json", "--triton", "old, new"]) == 2
    assert "--triton = 'old, new' names 2 releases; name one, or leave --json out" in capsys.readouterr().err
    assert main(["verify", "--compile", "--json", "--triton", "old,old"]) == 0


CHILD = """
import time
from prefixmem_fast.cli import main, info

def wait(options):
    print("ready", flush=True)
    time.sleep(60)

info.run = wait
raise SystemExit(main(["info"]))
"""
DEAF = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
PARENT = """
import signal, subprocess, sys
from prefixmem_fast.cli import main, verify

signal.signal(signal.SIGINT, signal.default_int_handler)
verify._CHILD_SECONDS = 1.0
run = lambda: subprocess.run([sys.executable, "-c", sys.argv[1]]).returncode
verify.run = lambda options: verify._of_child(run, "of a test")
raise SystemExit(main(["verify"]))
"""


@pytest.mark.parametrize(
    ("child", "to_all", "said"),
    [
        (CHILD, True, "prefixmem info: interrupted\n"),
        (CHILD, False, "prefixmem verify: interrupted\n"),
        (DEAF, True, "prefixmem verify: interrupted\n"),
    ],
    ids=["by a terminal", "the parent alone", "a child that does not hear"],
)
def test_an_interruption_is_told_once(child, to_all, said):
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, child],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (130, said)


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_whoever_counts_traffic_itself_is_interrupted_at_once(monkeypatch, interpret):
    handlers = []
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    monkeypatch.setattr(
        counting, "count_traffic", lambda as_json: handlers.append(signal.getsignal(signal.SIGINT)) or 0
    )
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["verify", "--traffic"]) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert (handlers == [signal.default_int_handler]) == (interpret == "1")
