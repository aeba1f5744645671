"""The machine's best with the rows of a batch: loops in C++ that read, or read and write, them and do nothing else."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).parent / "cpp" / "ceiling.cpp"
AHEAD = (4, 8, 16, 32, 64)


@cache
def _visit() -> Callable:
    """The loop, compiled beside the kernels.

    Raises:
        ImportError: it cannot be compiled here.
    """
    from prefixmem_fast import _native  # an older library that is measured has none

    try:
        folder, kernels = _native.folder(), {path.name: path for path in _native.sources()}
        name = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
        library = folder / f"ceiling-{name}.so"
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as made:
                part = Path(made, "ceiling.so")
                compiler = _native.compiler()
                flags = (*_native.flags_of(_native.version_of(compiler)), "-I", str(kernels["threads.h"].parent))
                command = [*compiler, *flags, str(SOURCE), str(kernels["threads.cpp"]), "-o", str(part)]
                subprocess.run(command, check=True, capture_output=True)
                os.replace(part, library)
        loaded = ctypes.CDLL(str(library))
    except (_native.BuildError, OSError, subprocess.CalledProcessError) as error:
        raise ImportError(f"the loops over rows cannot be compiled here ({error})") from None
    loaded.share_threads.argtypes = [ctypes.c_void_p]
    loaded.share_threads(_native.openmp())  # those of the kernels
    visit = loaded.visit_rows
    visit.argtypes = [ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 5
    return visit


def loop_over(weight: Tensor, rows: Tensor, write: bool) -> Callable[[], None]:
    """A loop that reads, or reads and writes as they are, the rows, with the distance and threads that are best for it.

    Args:
        weight: ``[R, w]``.
        rows: int64 ``[E]``.
    """
    visit, width = _visit(), weight.shape[1] * weight.element_size()

    def run(ahead: int, threads: int) -> None:
        visit(weight.data_ptr(), rows.data_ptr(), len(rows), width, write, ahead, threads)

    seconds = {}
    for choice in itertools.product(AHEAD, sorted({1, torch.get_num_threads()})):
        best = float("inf")
        for _ in range(4):
            began = time.perf_counter()
            run(*choice)
            best = min(best, time.perf_counter() - began)
        seconds[choice] = best
    chosen = min(seconds, key=seconds.__getitem__)
    return lambda: run(*chosen)
