import os
from types import SimpleNamespace

import pytest

from prefixmem_fast.checks import other_triton
from prefixmem_fast.checks.other_triton import FOLDERS, folder_of, folders_of, run_with


def release(folder):
    for part in (folder / "triton", folder / "triton" / "compiler"):
        part.mkdir(parents=True)
        (part / "__init__.py").touch()
    return folder


def test_a_release_is_a_folder_or_a_version(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    release(tmp_path / FOLDERS / "3.6.0")
    assert folder_of("3.6.0").resolve() == tmp_path / FOLDERS / "3.6.0"
    assert folder_of(str(release(tmp_path / "elsewhere"))) == tmp_path / "elsewhere"
    with pytest.raises(ValueError, match="neither a folder with triton in it nor a version"):
        folder_of("3.5.0")


def test_several_releases_or_one_folder_of_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for version in ("3.4.0", "3.6.0"):
        release(tmp_path / FOLDERS / version)
    both = (tmp_path / FOLDERS / "3.6.0", tmp_path / FOLDERS / "3.4.0")
    given = f"3.6.0, 3.4.0,3.6.0,{FOLDERS}/3.4.0,"
    assert tuple(folder.resolve() for folder in folders_of(given)) == both
    odd = release(tmp_path / "a folder, of mine")
    assert folders_of(str(odd)) == (odd,)
    spaced = release(tmp_path / "one more")
    assert folders_of(f"3.4.0,{spaced}")[1] == spaced
    for nothing in ("", " , "):
        with pytest.raises(ValueError, match=f"--triton = '{nothing}' names no release"):
            folders_of(nothing)
    with pytest.raises(ValueError, match=r"'3.4.0 3.6.0' is neither .* make triton-releases"):
        folders_of("3.4.0 3.6.0")


def test_a_folder_without_a_compiler_holds_no_triton(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").touch()
    with pytest.raises(ValueError, match="neither a folder with triton in it"):
        folder_of(str(tmp_path))


def test_a_home_is_asked_for_where_no_cache_is_named_alone(tmp_path, monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(other_triton.Path, "home", nowhere)
    monkeypatch.setattr(
        other_triton, "subprocess", SimpleNamespace(run=lambda command, env: SimpleNamespace(returncode=0))
    )
    monkeypatch.setenv("TRITON_CACHE_DIR", "/cache")
    assert run_with(tmp_path, []) == 0
    monkeypatch.delenv("TRITON_CACHE_DIR")
    with pytest.raises(ValueError, match="TRITON_CACHE_DIR is not set, and there is no home folder"):
        run_with(tmp_path, [])


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
