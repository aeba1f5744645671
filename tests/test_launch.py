"""A launch that is looked up by our own key runs the kernel that Triton would have run."""

import os
import subprocess
import sys

import pytest
import torch
import triton

from prefixmem_fast._launch import Launcher

PROGRAM = """
from typing import NamedTuple

import torch, triton, triton.language as tl

from prefixmem_fast._launch import Launcher
from prefixmem_fast.checks.machine_code import stand_in_driver

class Update(NamedTuple):
    table: object
    lr: object
    seed: object

@triton.jit(do_not_specialize=["k"])
def nothing_kernel(p, q, update, n, k, x, C: tl.constexpr, B: tl.constexpr):
    pass

words = torch.zeros(64, dtype=torch.int32)
tensors = [words, words[1:], words[4:], torch.zeros(64), torch.zeros(64, dtype=torch.bfloat16)[8:]]
updates = [Update(words, 0.5, 3), Update(words, 1.0, 16), Update(words[1:], torch.ones(1), 1)]
numbers = [1, 2, 15, 16, 32, -1, -16, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**40, 2**62]
usual = [words, None, updates[0], 5, 5, 0.5, (1, 2), 16]
others = {0: tensors, 1: [words, words[1:]], 2: updates, 3: numbers, 4: numbers, 5: [1.0, 16.0], 6: [(1, 3)], 7: [32]}
cases = [usual] + [[*usual[:i], value, *usual[i + 1:]] for i, values in others.items() for value in values]

with stand_in_driver("sm_90", module="loaded"):
    launch = Launcher(nothing_kernel)
    assert launch.remembers, triton.__version__
    for args in cases:
        assert launch((2,), *args) is nothing_kernel[(2,)](*args), args
    found = len(launch._compiled)
    assert 15 < found < len(cases), found
    for args in cases:
        assert launch((2, 3), *args) is nothing_kernel[(2,)](*args), args
    assert len(launch._compiled) == found
    launch((2,), *usual, kind="usual")
    Launcher.verifies = True
    launch((2,), *usual, kind="usual")
    assert launch((2,), *usual, kind="usual") is nothing_kernel[(2,)](*usual)
    try:
        launch((2,), words[1:], *usual[1:], kind="usual")
    except AssertionError as error:
        assert "arguments of different kinds were called usual" in str(error)
    else:
        raise SystemExit("another kind went unseen")
    nothing_kernel.device_caches.clear(), launch._compiled.clear()
print("right")
"""


def test_the_kernel_is_the_one_that_triton_runs(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    program = tmp_path / "program.py"  # triton reads a kernel's source from its file
    program.write_text(PROGRAM)
    paths = [str(path) for path in (os.getcwd(), environment.get("PYTHONPATH")) if path]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["right"], done.stderr[-2000:]


@triton.jit
def copy_kernel(p, q):
    triton.language.store(q, triton.language.load(p))


@pytest.mark.parametrize("kind", [None, "one"])
def test_the_interpreter_goes_tritons_way(kind):
    p, q = torch.tensor([3.0]), torch.zeros(1)
    Launcher(copy_kernel)((1,), p, q, kind=kind)
    assert q == 3
