"""What is known of a table between calls: the backend that read it last, the optimizer of its backward pass, an update
that runs beside the caller, and how its gradient meets those of other processes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..addressing import AddressSpec, TokenStream
    from .rules import RowUpdate

_ATTRIBUTE = "prefixmem_table"


class TableOptimizer(Protocol):
    """What grad="fused" asks of an optimizer."""

    def begin(self, weight: Tensor) -> RowUpdate:
        """Count a step of `weight` and give what is needed to apply it."""


class Updates(Protocol):
    """Where the updates of a table run beside the caller, in their order."""

    def start(self, update: Callable[[], None]) -> None:
        """Begin an update and return."""

    def finish(self) -> None:
        """Wait for the updates; raise what one of them raised, once."""

    def raise_failed(self) -> None:
        """Raise what an update that has ended raised, once; wait for nothing."""


class Exchange(Protocol):
    """What brings the gradients of all processes to each of them; see `prefixmem_fast.distributed`."""

    def check(self, weight: Tensor) -> None:
        """Refuse a table that a wrapper of the model would exchange as well."""

    def gather(
        self, weight: Tensor, dS: Tensor, source: Tensor | TokenStream, spec: AddressSpec, grad: str
    ) -> tuple[Tensor, Tensor | TokenStream]:
        """The gradients and the sources of all processes as one, in the order of their ranks; collective."""


class TableState:
    """Kept on the parameter. A copy or a pickle of the parameter starts with an empty one.

    Attributes:
        backend: the chosen backend that read the table last with grad="sparse" or "fused"; None before that.
        updates: where updates of the table may be under way; None where each ends before its backward pass returns.
        read_ahead: rows may have been gathered before they are asked for, so that a change must be seen.
        exchange: set where several processes train the table, which sparse and fused gradients need.
        managed: it is none of its module's parameters, so that a wrapper of the model does not see it.
        part: of a divided table, the heads before its own, so that its rounding draws other random bits than theirs;
            None for a whole one.
        warned: of training without an optimizer.
        unspent: a sparse gradient has been computed since the last step or zero_grad of the table's optimizer.
    """

    def __init__(self) -> None:
        self.backend: str | None = None
        self.updates: Updates | None = None
        self.read_ahead = False
        self.exchange: Exchange | None = None
        self.managed = self.warned = False
        self.part: int | None = None
        self.unspent = False
        self._optimizer: weakref.ref | None = None

    def __reduce__(self) -> Any:
        return TableState, ()

    @property
    def optimizer(self) -> TableOptimizer | None:
        """The optimizer that holds the table, while it lives."""
        return None if self._optimizer is None else self._optimizer()

    @optimizer.setter
    def optimizer(self, optimizer: TableOptimizer | None) -> None:
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)


def table_state(weight: Tensor) -> TableState:
    state = getattr(weight, _ATTRIBUTE, None)
    if state is None:
        state = TableState()
        setattr(weight, _ATTRIBUTE, state)
    return state


def count_change(parameter: Tensor) -> None:
    """After what changes a parameter without a new version of it: one for a table whose rows may have been gathered."""
    state = getattr(parameter, _ATTRIBUTE, None)
    if state is not None and state.read_ahead:
        torch.autograd.graph.increment_version(parameter)


def finish_updates(weight: Tensor) -> None:
    """Before the table or its optimizer's state is read or written: no update of it is under way any more."""
    state = getattr(weight, _ATTRIBUTE, None)
    if state is not None and state.updates is not None:
        state.updates.finish()
