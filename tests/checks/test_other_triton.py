import os
from types import SimpleNamespace

import pytest

from prefixmem_fast.checks import other_triton
from prefixmem_fast.checks.other_triton import FOLDERS, folder_of, run_with


def release(folder):
    (folder / "triton").mkdir(parents=True)
    (folder / "triton" / "__init__.py").touch()
    return folder


def test_a_release_is_a_folder_or_a_version(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    release(tmp_path / FOLDERS / "3.6.0")
    assert folder_of("3.6.0").resolve() == tmp_path / FOLDERS / "3.6.0"
    assert folder_of(str(release(tmp_path / "elsewhere"))) == tmp_path / "elsewhere"
    with pytest.raises(ValueError, match="neither a folder with triton in it nor a version"):
        folder_of("3.5.0")


def test_its_folder_comes_first_and_its_cache_is_its_own(tmp_path, monkeypatch):
    """Before what was on the path; binaries of one release are never taken for those of another."""
    seen = {}

    def run(command, env):
        seen.update(command=command[1:], env=env)
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(other_triton, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setenv("PYTHONPATH", "/before")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/cache")
    assert run_with(release(tmp_path / "3.6.0"), ["verify"]) == 3
    assert seen["command"] == ["-m", "prefixmem_fast.cli", "verify"]
    assert seen["env"]["PYTHONPATH"].split(os.pathsep)[:2] == [str(tmp_path / "3.6.0"), "/before"]
    assert seen["env"]["TRITON_CACHE_DIR"] == "/cache-3.6.0"
