"""The tested versions, in the one place that names them, are those that the build files pin."""

import re
import sys
from pathlib import Path

from prefixmem_fast._environment import TESTED, installed_version
from prefixmem_fast.checks import environment

ROOT = Path(__file__).parents[1]


def test_pinned_versions_are_tested():
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert TESTED.keys() <= pins.keys()
    assert {name: pins[name] for name in TESTED if pins[name] not in TESTED[name]} == {}


def test_the_oldest_transformers_is_the_one_that_setup_asks_for():
    oldest = TESTED["transformers"][0]
    assert set(re.findall(r"transformers>=([\d.]+)", (ROOT / "setup.py").read_text())) == {oldest}
    assert f"transformers=={oldest}" in (ROOT / "Makefile").read_text()


def test_versions_ascend():
    for versions in TESTED.values():
        numbers = [tuple(map(int, version.split("."))) for version in versions]
        assert numbers == sorted(set(numbers))


def test_installed_version():
    import torch

    assert installed_version("torch") == torch.__version__.partition("+")[0]
    assert installed_version("no-such-package") is None


def test_without_nvidia_ml_py_the_driver_is_asked_of_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment._driver() == "unknown (pip install nvidia-ml-py)"
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 570.86.15\necho 570.86.15\n")
    program.chmod(0o755)
    assert environment._driver() == "570.86.15"
