"""Launching a Triton kernel again without what Triton works out anew each time.

`kernel[grid](...)` binds the arguments, classes them, reads the environment and looks for the compiled kernel by all of
it: 7 us for forward and 13 for the walk of a step (bench/results/host.jsonl). A `Launch` has
found it once, and takes 2.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch
import triton

from ._triton import interpreting

_Function = TypeVar("_Function", bound=Callable)
_caches: list[Any] = []

# What Triton specialises on was compared for these releases. Others, and HIP, which looks at sizes too, go its way.
_COMPARED = ((3, 4), (3, 9))
_RELEASE = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))


class Launch:
    """One kernel with its constants and options, for arguments of one kind on one device.

    A launcher has a function, cached by `of_a_kind`, that makes it. The arguments of that function are the kind: they
    must hold whatever Triton compiles anew for. That is the device, the constants, the dtypes; the alignment to 16
    bytes of tensors that the launcher does not allocate, but where the kernel declares that it ignores it; whether
    integers pass 2^31. Other integers must be declared do_not_specialize. The environment's settings (TRITON_DEBUG and
    others) are those of the first launch of a kind.

    Attributes:
        remembers: False has every launch go Triton's way, for tools that watch it there.
        verifies: every launch goes Triton's way too, and raises where that finds another kernel. Tests set it.
    """

    remembers = not interpreting() and torch.version.hip is None and _COMPARED[0] <= _RELEASE <= _COMPARED[1]
    verifies = False

    def __init__(self, kernel: Any, *constants: Any, **options: Any) -> None:
        """The constants are the kernel's last arguments, in its order; the options are Triton's, such as num_warps."""
        self.kernel = kernel
        self.constants = constants
        self.options = options
        self._compiled: Any = None

    def __call__(self, grid: tuple[int, int, int], *args: Any) -> Any:
        """Launch with the run-time arguments, and return Triton's CompiledKernel, or None in the interpreter."""
        compiled = self._compiled
        if compiled is None or not self.remembers or self.verifies or self.kernel.pre_run_hooks:
            found = self.kernel[grid](*args, *self.constants, **self.options)
            if self.verifies and compiled is not None and compiled is not found:
                raise AssertionError(f"{self.kernel.__name__}: launches of one kind need different kernels")
            if self.remembers:
                self._compiled = found
            return found
        compiled[grid](*args, *self.constants)
        return compiled


def of_a_kind(function: _Function) -> _Function:
    """Cache what a launcher works out once for each kind of arguments: its `Launch` and the sizes of its grid."""
    cached = lru_cache(maxsize=256)(function)
    _caches.append(cached)
    return cached  # type: ignore[return-value]


def forget() -> None:
    """Drop every `Launch` and the kernels that it holds."""
    for cached in _caches:
        cached.cache_clear()
