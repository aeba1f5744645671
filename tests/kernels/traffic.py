"""Counts what kernels ask of memory in the Triton interpreter: bytes and launches, exactly and repeatably."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import numpy as np
from triton.runtime import interpreter


class Traffic:
    """Bytes of all masked-in lanes, by tensor name; `other` is what no named tensor holds."""

    def __init__(self, **tensors):
        self.launches = 0
        self.loaded, self.stored, self.added = Counter(), Counter(), Counter()
        self._ranges = {
            name: (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size())
            for name, tensor in tensors.items()
        }

    @property
    def total(self) -> int:
        return sum(self.loaded.values()) + sum(self.stored.values()) + sum(self.added.values())

    def count(self, where: Counter, pointers, mask) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = pointers.data[mask.data] if mask is not None else pointers.data.ravel()
        left = addresses.size
        for name, (low, high) in self._ranges.items():
            inside = int(np.count_nonzero((addresses >= low) & (addresses < high)))
            where[name] += inside * size
            left -= inside
        where["other"] += left * size


@contextmanager
def counted(**tensors):
    """Count the traffic of every launch inside; tensors are named by keyword."""
    traffic = Traffic(**tensors)
    builder, runner = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, atomic, call = (
        builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw, runner.__call__,
    )  # fmt: skip

    def counting_load(self, pointers, mask, *rest):
        traffic.count(traffic.loaded, pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self, pointers, value, mask, *rest):
        traffic.count(traffic.stored, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counting_atomic(self, operation, pointers, value, mask, *rest):
        traffic.count(traffic.added, pointers, mask)
        return atomic(self, operation, pointers, value, mask, *rest)

    def counting_call(self, *arguments, **options):
        traffic.launches += 1
        return call(self, *arguments, **options)

    builder.create_masked_load, builder.create_masked_store = counting_load, counting_store
    builder.create_atomic_rmw, runner.__call__ = counting_atomic, counting_call
    try:
        yield traffic
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        builder.create_atomic_rmw, runner.__call__ = atomic, call
