"""Every load, store, atomic and barrier of the kernels, as Triton's interpreter runs them.

Triton must be imported with TRITON_INTERPRET=1 set. The interpreter runs the programs of a launch one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
from triton.runtime import interpreter


class Watcher:
    """What `watched` calls. Addresses are those of the elements that a mask lets through, `size` their bytes."""

    def begin_launch(self, kernel: str, warps: int) -> None:
        """A kernel with so many warps a program."""

    def begin_program(self) -> None: ...

    def load(self, addresses: np.ndarray, size: int) -> None: ...

    def store(self, addresses: np.ndarray, size: int) -> None: ...

    def atomic(self, addresses: np.ndarray, size: int) -> None: ...

    def barrier(self) -> None: ...

    def end_launch(self) -> None: ...


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Call the watcher for every launch inside."""
    builder, runner = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
    barrier, program, call = builder.create_barrier, builder.set_grid_idx, runner.__call__

    def watched_load(self, pointers, mask, *rest):
        watcher.load(*_elements(pointers, mask))
        return load(self, pointers, mask, *rest)

    def watched_store(self, pointers, value, mask, *rest):
        watcher.store(*_elements(pointers, mask))
        return store(self, pointers, value, mask, *rest)

    def watched_atomic(self, operation, pointers, value, mask, *rest):
        watcher.atomic(*_elements(pointers, mask))
        return atomic(self, operation, pointers, value, mask, *rest)

    def watched_barrier(self):
        watcher.barrier()
        return barrier(self)

    def watched_program(self, *index):
        watcher.begin_program()
        return program(self, *index)

    def watched_call(self, *arguments, **options):
        watcher.begin_launch(self.fn.__name__, options.get("num_warps", 4))
        result = call(self, *arguments, **options)
        watcher.end_launch()
        return result

    with ExitStack() as stack:
        for owner, name, function in (
            (builder, "create_masked_load", watched_load),
            (builder, "create_masked_store", watched_store),
            (builder, "create_atomic_rmw", watched_atomic),
            (builder, "create_barrier", watched_barrier),
            (builder, "set_grid_idx", watched_program),
            (runner, "__call__", watched_call),
        ):
            stack.enter_context(mock.patch.object(owner, name, function))
        yield


def _elements(pointers: Any, mask: Any) -> tuple[np.ndarray, int]:
    addresses = pointers.data[mask.data] if mask is not None else pointers.data.ravel()
    return addresses, pointers.get_element_ty().primitive_bitwidth // 8
