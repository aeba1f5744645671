"""Launching a Triton kernel again without what Triton works out anew each time.

`kernel[grid](...)` binds the arguments, classes them, reads the environment and looks for the compiled kernel by all of
it: 7 us for forward and 14 for the walk of a step (triton 3.9). Found by a key of our own and called as CompiledKernel,
they take 5 and 11 us, and 3 where the caller knows the kind of its arguments beforehand (python -m bench host).
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import torch
import triton
from torch import Tensor

from ._triton import interpreting

# What Triton specialises on was compared for these releases. Others, and HIP, which looks at sizes too, go its way.
_COMPARED = ((3, 4), (3, 9))
_RELEASE = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))


class Launcher:
    """One kernel, launched with all of its arguments by position.

    What is compiled is looked up by the device, by the constants, by dtype and 16-byte alignment of tensors, and by
    what sets integers apart: 1, multiples of 16, and their width. Triton tells no more apart. The environment's
    settings (TRITON_DEBUG and others) are those of the first launch of a kind.

    Attributes:
        remembers: False has every launch go Triton's way, for tools that watch it there.
        verifies: whether a kind that is given is held against the arguments; tests set it.
    """

    remembers = not interpreting() and torch.version.hip is None and _COMPARED[0] <= _RELEASE <= _COMPARED[1]
    verifies = False

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._constant = [parameter.is_constexpr for parameter in getattr(kernel, "params", ())]
        self._compiled: dict[Hashable, Any] = {}
        self._kinds: dict[Hashable, Hashable] = {}

    def __call__(self, grid: tuple[int, ...], *args: Any, kind: Hashable = None, **options: Any) -> Any:
        """Launch, and return Triton's CompiledKernel, or None in the interpreter.

        Args:
            grid: programs in one to three dimensions.
            kind: of the arguments, where the caller has worked it out for many launches: launches of one kind on one
                device have equal constants, and arguments that Triton does not tell apart.
            options: such as num_warps; the same at every launch of a kind.
        """
        if not self.remembers or len(args) != len(self._constant) or self.kernel.pre_run_hooks:
            return self.kernel[grid](*args, **options)
        device = triton.runtime.driver.active.get_current_device()
        key = device, (self._kind(args) if kind is None else kind)
        compiled = self._compiled.get(key)
        if self.verifies and self._kinds.setdefault(key, self._kind(args)) != self._kind(args):
            raise AssertionError(f"{self.kernel.__name__}: arguments of different kinds were called {kind}")
        if compiled is None:
            compiled = self._compiled[key] = self.kernel[grid](*args, **options)
        else:
            compiled[(*grid, 1, 1)[:3]](*args)
        return compiled

    def _kind(self, args: tuple[Any, ...]) -> Hashable:
        kind: list[Hashable] = []
        for value, constant in zip(args, self._constant, strict=True):
            if constant:
                kind.append(value)
            else:
                _add_kind(kind, value)
        return tuple(kind)


def _add_kind(kind: list[Hashable], value: Any) -> None:
    """Add what Triton tells a run-time argument apart by, or more."""
    if isinstance(value, Tensor):
        kind += value.dtype, value.data_ptr() % 16 == 0
    elif type(value) is int:
        width = (-(1 << 31) <= value < 1 << 31) + (value < 1 << 63)
        kind.append((value == 1, value % 16 == 0, width))
    elif isinstance(value, tuple):
        kind += type(value), len(value)
        for entry in value:
            _add_kind(kind, entry)
    elif value is None or type(value) is float:
        kind.append(type(value))
    else:
        kind += type(value), value
