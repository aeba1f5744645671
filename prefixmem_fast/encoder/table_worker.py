"""A thread beside the caller, for tables in host memory: it gathers coming batches and updates the table, in turn.

While an update is under way the table and its optimizer's state may be read by anybody: a forward pass, `state_dict`, a
copy, an average of weights. Each of them waits, because the table is an `OverlappedTable`, and the optimizers of
`prefixmem_fast.optim` wait before they hand out their state. A process that forks waits too.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..operation.table_state import finish_updates

_Result = TypeVar("_Result")


class Worker:
    """One thread that runs calls one after another. It starts with the first call; copies and pickles have none."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._thread: int | None = None
        self._running: list[Future] = []
        self._updates: list[Future] = []

    def __reduce__(self) -> Any:
        self.finish()
        return Worker, ()

    def submit(self, call: Callable[..., _Result], *args: Any) -> Future[_Result]:
        if self._pool is None:
            _watch_forks()
            _WORKERS.add(self)
            self._pool = ThreadPoolExecutor(1, "prefixmem-tables")
        future = self._pool.submit(self._run, call, *args)
        self._running = [*(other for other in self._running if not other.done()), future]
        return future

    def start(self, update: Callable[[], None]) -> None:
        """See `operation.table_state.Updates`."""
        self._updates.append(self.submit(update))

    def finish(self) -> None:
        if threading.get_ident() != self._thread:
            self._end(list(self._updates))

    def raise_failed(self) -> None:
        self._end([future for future in self._updates if future.done()])

    def _run(self, call: Callable[..., _Result], *args: Any) -> _Result:
        self._thread = threading.get_ident()
        with torch.no_grad():
            return call(*args)

    def _end(self, updates: list[Future]) -> None:
        for update in updates:
            error = update.exception()  # waits
            try:
                self._updates.remove(update)
            except ValueError:  # another thread has ended it
                continue
            if error is not None:
                raise error

    def wait(self) -> None:
        """Until nothing runs any more; raises nothing."""
        if threading.get_ident() != self._thread:
            wait(list(self._running))

    def leave_thread(self) -> None:
        """In a forked process, which has none of its parent's threads."""
        self._pool = self._thread = None


_WORKERS: weakref.WeakSet[Worker] = weakref.WeakSet()  # a process can fork at any time, and the hooks are its own


@cache
def _watch_forks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_wait_for_all, after_in_child=_leave_threads)


def _wait_for_all() -> None:
    for worker in list(_WORKERS):
        worker.wait()


def _leave_threads() -> None:
    for worker in list(_WORKERS):
        worker.leave_thread()


# What tells of a table without its numbers, or of its gradient: it waits for nothing.
_TELLS_NO_NUMBERS = {
    *("grad", "requires_grad", "is_leaf", "grad_fn", "shape", "ndim", "dtype", "device", "layout", "names", "_version"),
    *("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "itemsize", "nbytes", "output_nr"),
    *("dim", "size", "stride", "numel", "nelement", "element_size", "is_contiguous", "is_floating_point", "is_complex"),
    *("is_inference", "is_pinned", "is_shared", "requires_grad_", "get_device", "_backward_hooks", "register_hook"),
    *("register_post_accumulate_grad_hook", "_post_accumulate_grad_hooks", "is_same_size", "__len__"),
}


class OverlappedTable(nn.Parameter):
    """A table whose update may be under way in a thread: whatever reads or writes its numbers waits for the update.

    Tensors that share its memory (a `detach` made earlier, a numpy array) are beyond its reach.
    """

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__", "__delete__"):
            name = getattr(func.__self__, "__name__", "")
        if name not in _TELLS_NO_NUMBERS:
            for value in pytree.tree_leaves((args, kwargs)):
                if isinstance(value, OverlappedTable):
                    finish_updates(value)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _overlapped, super().__reduce_ex__(protocol)[:2]


def _overlapped(rebuild: Callable[..., nn.Parameter], args: tuple) -> OverlappedTable:
    parameter = rebuild(*args)
    table = OverlappedTable(parameter.data, parameter.requires_grad)
    table.__dict__.update(parameter.__dict__)
    return table


def unguarded(weight: Tensor) -> Tensor:
    """The table's memory as a plain tensor, without waiting for an update of it."""
    with torch._C.DisableTorchFunctionSubclass():
        return weight.detach()
