"""Compiling the C++ kernels: once, whatever is interrupted, missing or broken, and by how many processes at a time."""

import os
import shutil
import stat
import subprocess
import sys

import pytest
import torch

from prefixmem_fast import AddressSpec, _native, prefix_memory
from prefixmem_fast.operation.backends import BackendError, choose_backend

FAKE = """#!/bin/sh
# A compiler that takes the library that is there, and notes each run.
case "$1" in --version) echo {version}; exit 0;; esac
echo run >> {log}
{fault}
for part; do :; done
cp {library} "$part"
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a compiler that is fast; what this process has loaded is loaded anew."""
    library = _native.find_or_build()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(_native, "_loaded", _native._loaded.__wrapped__)

    def compiler(fault="", version="fake 1"):
        script = tmp_path / "c++"
        script.write_text(FAKE.format(log=tmp_path / "runs", library=library, fault=fault, version=version))
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return lambda: len((tmp_path / "runs").read_text().splitlines()) if (tmp_path / "runs").exists() else 0

    return compiler


def assert_pytorch_runs():
    spec = AddressSpec((4, 4), table_rows=40)
    assert choose_backend("auto", codes=torch.zeros(1, 2)) == "cpu"
    assert prefix_memory(torch.zeros(2, 2, dtype=torch.int64), torch.ones(spec.total_rows, 3), spec).shape == (2, 2, 12)
    with pytest.raises(BackendError, match="native"):
        choose_backend("native", codes=torch.zeros(1, 2))


def test_a_build_is_announced_and_done_once(cache, capsys):
    runs = cache()
    assert _native.native_problem() is None
    text = capsys.readouterr().err
    assert "compiling its CPU kernels" in text
    assert " s, kept in " in text
    sets = _native.instruction_sets()
    assert runs() == len(sets)
    assert {path.name for path in _native.folder().iterdir()} == {f"{name.lower()}.so" for name in sets}
    assert _native.native_problem() is None
    assert runs() == len(sets)
    assert not capsys.readouterr().err


def test_other_sources_are_another_library(cache, tmp_path, monkeypatch):
    cache()
    before = _native.folder()
    files = [tmp_path / path.name for path in _native.sources()]
    for path, copy in zip(_native.sources(), files, strict=True):
        shutil.copy(path, copy)
    monkeypatch.setattr(_native, "sources", lambda: files)
    assert _native.folder() == before
    files[0].write_text(files[0].read_text() + "\n")
    assert _native.folder() != before


@pytest.mark.slow
def test_several_processes_build_once(cache):
    runs = cache("sleep 1")
    code = "from prefixmem_fast._native import native_problem; assert native_problem() is None"
    workers = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    texts = [worker.communicate(timeout=100)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0], texts
    assert runs() == len(_native.instruction_sets())


def test_an_interrupted_build_leaves_nothing_that_is_taken_for_one(cache):
    runs = cache('for part; do :; done; echo half > "$part"; sleep 30')
    code = "from prefixmem_fast._native import native_problem; native_problem()"
    worker = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    while runs() < len(_native.instruction_sets()):
        assert worker.poll() is None
    os.killpg(worker.pid, 9)
    worker.wait()
    assert not list(_native.folder().glob("*.so"))
    cache()
    assert _native.native_problem() is None
    assert torch.equal(
        prefix_memory(torch.tensor([[1]]), torch.arange(3.0)[:, None], AddressSpec((3,), heads=1), backend="native"),
        torch.tensor([[[1.0]]]),
    )


def test_without_a_compiler(cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O9")
    assert _native.native_problem() == (
        "CXX = 'no-such-compiler' is not there; install g++ or clang++ (Debian: apt install g++) for a faster CPU path"
    )
    assert_pytorch_runs()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert _native.native_problem().startswith("there is no C++ compiler; install g++")


def test_a_build_that_fails(cache, capsys):
    runs = cache("echo 'kernels.h:3: error: no such thing'; exit 1")
    problem = _native.native_problem()
    assert "do not compile here: kernels.h:3: error: no such thing (all of it in " in problem
    first = runs()
    assert _native.native_problem() == problem
    assert runs() == first, "nobody waits for the same failure twice"
    assert_pytorch_runs()
    assert not list(_native.folder().glob("*.part"))
    for log in _native.folder().glob("failed-*.log"):
        log.unlink()
    cache()
    assert _native.native_problem() is None


@pytest.mark.parametrize("fault", ["kill -9 $$", "echo 'No space left on device'; exit 1"])
def test_a_build_that_was_stopped_is_tried_again(cache, fault):
    cache(fault)
    assert "it is tried again" in _native.native_problem()
    assert not list(_native.folder().iterdir())
    cache()
    assert _native.native_problem() is None


def test_a_compiler_that_knows_fewer_instruction_sets(cache):
    if len(_native.instruction_sets()) == 1:
        pytest.skip("this architecture has one")
    cache('case "$*" in *mavx*) echo unknown flag; exit 1;; esac')
    assert _native.native_problem() is None
    assert [path.name for path in _native.folder().iterdir()] == ["default.so"]


def test_clang_gets_no_flag_of_gcc(cache):
    """It ends at one that it does not know; the c++ of macOS is clang."""
    cache('case "$*" in *vect-cost-model*) echo error: unknown argument; exit 1;; esac', "Apple clang version 16.0.0")
    assert _native.native_problem() is None


def test_whatever_is_wrong_pytorch_runs(cache, monkeypatch):
    monkeypatch.setenv("CXX", "c++ 'unbalanced")
    assert "No closing quotation" in _native.native_problem()
    assert_pytorch_runs()


def test_a_cache_that_cannot_be_written(cache, tmp_path, monkeypatch):
    cache()
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    assert "cannot be written" in _native.native_problem()
    assert "set TORCH_EXTENSIONS_DIR" in _native.native_problem()
    assert_pytorch_runs()


def test_a_library_that_is_damaged(cache):
    cache()
    library = _native.find_or_build()
    library.unlink()
    library.write_text("not a library")
    assert f"delete {_native.folder()}" in _native.native_problem()
    assert_pytorch_runs()


def test_it_can_be_switched_off(cache, monkeypatch):
    monkeypatch.setenv("PREFIXMEM_NATIVE", "off")
    assert _native.native_problem() == "PREFIXMEM_NATIVE=off"
    assert_pytorch_runs()


def test_every_instruction_set_runs_here_or_is_not_taken(monkeypatch):
    """The one that torch finds the processor to have, or the next below it of this architecture."""
    for capability in ("AVX512", "AVX2", "DEFAULT", "SVE256"):
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda capability=capability: capability)
        expected = capability if capability in _native.instruction_sets() else "DEFAULT"
        assert _native.find_or_build().name == f"{expected.lower()}.so"


def test_the_files_are_packed():
    """A wheel without them would leave every user on the slower path."""
    files = {path.name for path in _native.sources()}
    assert {"native.cpp", "forward.h"} <= files
    assert all(stat.S_ISREG(path.stat().st_mode) for path in _native.sources())
    setup = (_native.Path(__file__).parents[1] / "setup.py").read_text()
    assert '"prefixmem_fast.kernels": ["native/*"]' in setup
