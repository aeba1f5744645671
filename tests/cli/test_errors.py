"""What a user is told: every error of input or of the machine in one line, with the exit code of its kind."""

import errno
import os
import subprocess
import sys
import warnings

import pytest
import torch

from prefixmem_fast.cli import COMMANDS, main
from prefixmem_fast.operation import BackendError
from prefixmem_fast.recommender.training.trainer import DivergedError
from tests.helpers.cases import slow
from tests.helpers.runs import write_files


def told(capsys, *arguments):
    """Exit code, and the one line on standard error."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return code, error


class SafetensorError(Exception):
    """Of the name of safetensors' own, which is no OSError."""


ERRORS = [
    (2, ValueError("a = 3\n  wrong"), "a = 3 wrong"),
    (2, TypeError("heads = 2.5"), "heads = 2.5"),
    (2, FileNotFoundError("it is not there"), "it is not there"),
    (2, NotImplementedError("Mamba keeps its past in something else"), "Mamba keeps its past"),
    (2, BackendError("no GPU"), "no GPU"),
    (2, RecursionError("too deep"), "too deep"),
    (2, MemoryError(), "out of memory: an array does not fit; give smaller tables (table_rows) or batches"),
    (2, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "out of memory: "),
    (2, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), "out of memory: "),
    (2, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "a file could not be written whole: [Errno 28]"),
    (2, RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0"), "could not be written whole"),
    (2, RuntimeError("[enforce fail at inline_container.cc:855] . PyTorchFileWriter"), "could not be written whole"),
    (2, RuntimeError("Symlink loop from 'loop'"), "give another folder"),
    (2, ValueError("x" * 5000), "(5,000 characters)"),
    (2, SafetensorError("Error while serializing: I/O error: No space left"), "make room on the disk"),
    (1, DivergedError("the run diverged"), "the run diverged"),
    (130, KeyboardInterrupt(), "interrupted"),
]


@pytest.mark.parametrize(("code", "error", "message"), ERRORS, ids=lambda value: type(value).__name__)
def test_an_error_is_one_line(capsys, monkeypatch, code, error, message):
    def fail(options):
        raise error

    monkeypatch.setattr("prefixmem_fast.cli.info.run", fail)
    monkeypatch.delenv("PREFIXMEM_TRACEBACK", raising=False)
    found = told(capsys, "info")
    assert found[0] == code
    assert found[1].startswith("prefixmem info: ")
    assert message in found[1]


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), KeyError("x"), RuntimeError("x"), AttributeError("x")])
def test_an_error_of_the_program_is_not_hidden(monkeypatch, error):
    def fail(options):
        raise error

    monkeypatch.setattr("prefixmem_fast.cli.info.run", fail)
    with pytest.raises(type(error)):
        main(["info"])


def test_where_an_error_came_from(monkeypatch):
    monkeypatch.setenv("PREFIXMEM_TRACEBACK", "1")
    with pytest.raises(ValueError, match="--cases = 0"):
        main(["verify", "--cases", "0"])


def test_a_warning_is_one_line(capsys, monkeypatch):
    def warn(options):
        warnings.warn("order is\nassumed", stacklevel=2)
        return 0

    monkeypatch.setattr("prefixmem_fast.cli.info.run", warn)
    before = warnings.showwarning
    code, line = told(capsys, "info")
    assert (code, line) == (0, "prefixmem info: warning: order is assumed\n")
    assert warnings.showwarning is before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "--out", "x", "--step", "10"],
            "prefixmem train: --step is unknown, --steps is near; prefixmem train",
        ),
        (["train", "--out", "x", "--frobnicate=1"], "prefixmem train: --frobnicate is unknown; prefixmem train --help"),
        (["train"], "prefixmem train: the following arguments are required: --out; prefixmem train --help"),
        (["verify", "--cases", "many"], "prefixmem verify: argument --cases: invalid int value"),
        (["train", "--synthetic", "--out", ""], "prefixmem train: argument --out: '' names no folder"),
        (["pretrain", "--synthetic", "--out="], "prefixmem pretrain: argument --out: '' names no folder"),
        (["evaluate", "--run", "x", "--out", ""], "prefixmem evaluate: argument --out: '' names no folder"),
        (["verify", "--compile", "--save", ""], "prefixmem verify: argument --save: '' names no folder"),
        (["info", "-steps", "3"], "prefixmem info: -steps is unknown; prefixmem info --help"),
        (["verify", "stray"], "prefixmem verify: stray is unknown; prefixmem verify --help"),
        (["fly"], "prefixmem: argument info|verify"),
        ([], "prefixmem: the following arguments are required"),
    ],
)
def test_wrong_arguments(capsys, arguments, message):
    code, line = told(capsys, *arguments)
    assert code == 2
    assert line.startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: fast", "learning_rate = 'fast'; a number was expected"),
        ("heads: 2.5", "heads = 2.5; a whole number was expected"),
        ("arm: no", "arm = False; a string was expected; YAML reads no, off, yes and on as booleans"),
        ("patience: true", "patience = True; a whole number was expected"),
        ("steps: 5\nseed: 1\nsteps: 6", "option 'steps' is there twice; name each option once"),
        ("stepz: 5", "option 'stepz' is unknown; steps is near"),
        ("grad: spares", "grad = 'spares'; allowed are dense, sparse, fused"),
        ("steps: 0", "steps = 0; give 1 or more"),
        ("seed: 4294967296", "seed = 4294967296; give less than 2^32"),
        ("learning_rate: 1" + 400 * "0", "is too large a number"),
        ("steps: 1" + 29 * "0", "is too large a number"),
        ("pack: 100000", "pack = 100000; give 4096 or less"),
        ("text: ''", "text is empty; leave it out"),
        ("active_levels: []", "active_levels is empty; leave it out"),
        ("active_levels: [0]", "active_levels = [0]; levels count from 1"),
        ("? [1]\n: 2", "neither YAML nor JSON"),
        ("a: " + "[" * 5000, "neither YAML nor JSON"),
        ("interactions: {}", "interactions = {}; a list of str or null was expected"),
    ],
)
def test_a_wrong_file_of_options(tmp_path, capsys, text, message):
    (tmp_path / "run.yaml").write_text(text)
    data = write_files(tmp_path)
    flags = ["--items", data["items"]] if "interactions" in text else ["--synthetic"]
    code, line = told(capsys, "train", "--config", tmp_path / "run.yaml", *flags, "--out", tmp_path / "run")
    assert code == 2
    assert f"config {tmp_path / 'run.yaml'}" in line
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_flag_is_not_blamed_on_the_file(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("steps: 5")
    arguments = ["train", "--config", tmp_path / "run.yaml", "--synthetic", "--out", tmp_path / "run"]
    for flags, message in (
        (["--steps", "0"], "steps = 0; give 1 or more"),
        (["--model-options", "[1]"], "model_options = '[1]'; a mapping or null was expected"),
    ):
        code, line = told(capsys, *arguments, *flags)
        assert code == 2
        assert line == f"prefixmem train: {message}\n"


def test_whole_numbers_with_an_exponent(tmp_path, capsys):
    arguments = ["train", "--synthetic", "--out", tmp_path / "run", "--eval-every", "1e2", "--log-every", "7"]
    assert told(capsys, *arguments)[1].endswith("eval_every = 100 is no multiple of log_every = 7; give one\n")
    assert "a whole number was expected" in told(capsys, *arguments, "--steps", "1.5e0")[1]


QUICK = [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)]


@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_help_waits_for_no_library(arguments):
    program = (
        "import sys\nfrom prefixmem_fast.cli import main\ntry: main(sys.argv[1:])\n"
        "finally: print('LOADED', *sorted({'torch', 'transformers', 'numpy', 'triton'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "LOADED"


@pytest.mark.parametrize("command", ["train --help | head -n 1", "info | true"])
def test_a_reader_that_leaves(command):
    program = f"{sys.executable} -m prefixmem_fast.cli {command}"
    assert subprocess.run(["bash", "-c", program], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize(
    ("command", "streams"),
    [
        ("info", ">&- 2>&-"),
        slow("info", ">&-"),
        slow("verify --backend reference --cases 1", "2>&-"),
        slow("verify --backend reference --cases 1", "2>/dev/full"),
    ],
)
def test_a_command_works_without_its_streams(command, streams):
    program = f"{sys.executable} -m prefixmem_fast.cli {command} {streams}"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_locale_without_the_letters_of_a_name():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "prefixmem_fast.cli", "evaluate", "--run", "läufe"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("prefixmem evaluate: l\\xe4ufe holds no run")


def test_going_on_with_nothing(tmp_path, capsys):
    assert told(capsys, "train", "--resume", "--out", tmp_path)[1].endswith("give a folder of prefixmem train\n")
