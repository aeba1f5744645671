"""What ranks tell one another around files: values, and errors, so that no rank waits for one that has failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

_Value = TypeVar("_Value")


def several() -> bool:
    """Whether there are several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if several() else 0


def size() -> int:
    return dist.get_world_size() if several() else 1


def gathered(value: _Value) -> list[_Value]:
    """The values of all ranks, in their order."""
    found = [value] * size()
    if several():
        dist.all_gather_object(found, value)
    return found


def from_first(value: _Value) -> _Value:
    return gathered(value)[0]


def on_all(call: Callable[[], object]) -> None:
    """A call on every rank; what one of them raises, all of them raise."""
    error: Exception | None = None
    try:
        call()
    except Exception as raised:
        error = raised
    others = gathered(error)
    if error is not None:
        raise error
    for other in others:
        if other is not None:
            raise other


def on_first(call: Callable[[], object]) -> None:
    """A call on the first rank, for which the others wait."""
    on_all(call if rank() == 0 else lambda: None)
