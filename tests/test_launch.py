"""A launch of a known kind runs the kernel that Triton would run."""

import os
import subprocess
import sys

import torch
import triton

from prefixmem_fast._launch import Launch, forget, of_a_kind

PROGRAM = """
import torch, triton, triton.language as tl

from prefixmem_fast._launch import Launch, forget, of_a_kind
from prefixmem_fast.checks.machine_code import stand_in_driver

@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["p"])
def nothing_kernel(p, q, n, C: tl.constexpr, B: tl.constexpr):
    pass

@of_a_kind
def launch_of(dtype, aligned, narrow):
    return Launch(nothing_kernel, (1, 2), 16, num_warps=2)

@of_a_kind
def careless_launch_of(dtype):
    return Launch(nothing_kernel, (1, 2), 16, num_warps=2)

words = torch.zeros(64, dtype=torch.int32)
cases = [(p, q, n) for p in (words, words[1:]) for q in (words, words[4:], words[1:], words.double())
         for n in (1, 2, 16, 2**31 - 1, 2**31)]

def launch(p, q, n):
    return launch_of(q.dtype, q.data_ptr() % 16 == 0, n < 2**31)((2, 1, 1), p, q, n)

with stand_in_driver("sm_90", module="loaded"):
    assert Launch.remembers, triton.__version__
    for _ in range(2):
        for case in cases:
            assert launch(*case) is nothing_kernel[(2,)](*case, (1, 2), 16, num_warps=2), case
    assert len({launch(*case).hash for case in cases}) == launch_of.cache_info().currsize == 6
    Launch.verifies = True
    for case in cases:
        launch(*case)
    careless_launch_of(words.dtype)((2, 1, 1), words, words, 5)
    try:
        careless_launch_of(words.dtype)((2, 1, 1), words, words[1:], 5)
    except AssertionError as error:
        assert str(error) == "nothing_kernel: launches of one kind need different kernels"
    else:
        raise SystemExit("another kind went unseen")
    nothing_kernel.device_caches.clear(), forget()
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


def test_the_interpreter_goes_tritons_way():
    p, q = torch.tensor([3.0]), torch.zeros(1)
    Launch(copy_kernel)((1, 1, 1), p, q)
    assert q == 3


def test_what_is_cached_is_dropped_at_once():
    made = []

    @of_a_kind
    def launch_of(kind):
        made.append(kind)
        return Launch(copy_kernel)

    assert launch_of(1) is launch_of(1) is not launch_of(2)
    forget()
    launch_of(1)
    assert made == [1, 2, 1]
