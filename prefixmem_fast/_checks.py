"""Checks of arguments. Each raises an error that names the argument, its value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import index
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def integer(name: str, value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} = {value!r} is not an integer")
    try:
        return index(value)
    except TypeError:
        raise TypeError(f"{name} = {value!r} is not an integer") from None


def integers(name: str, values: Any) -> tuple[int, ...]:
    try:
        values = tuple(values)
    except TypeError:
        raise TypeError(f"{name} = {values!r} is not a sequence of integers") from None
    return tuple(integer(f"{name}[{i}]", value) for i, value in enumerate(values))


def positive(name: str, value: Any) -> int:
    value = integer(name, value)
    if value < 1:
        raise ValueError(f"{name} = {value} is not positive; give 1 or more")
    return value


def not_negative(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name} = {value!r} is not a finite number of 0 or more")


def choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} = {value!r} is unknown; allowed are {', '.join(map(repr, allowed))}")


def boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} = {value!r} is not a bool; give True or False")


def codebook_sizes(values: Any) -> tuple[int, ...]:
    sizes = integers("codebook_sizes", values)
    if not sizes:
        raise ValueError("codebook_sizes is empty; give one positive size a level, for example (2048,) * 5")
    for level, size in enumerate(sizes, 1):
        if size < 1:
            raise ValueError(f"codebook_sizes[{level - 1}] = {size} is not positive; every level needs a code")
    return sizes


def tensor(name: str, value: Any, dtypes: tuple[torch.dtype, ...], dims: int | None, shape: str) -> None:
    """Refuse what is not a dense tensor of one of `dtypes` with `dims` dimensions; `shape` says it in words."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; give a tensor {shape}")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name} is sparse or nested; give a dense tensor {shape}")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} has dtype {value.dtype}; allowed are {allowed}; convert with .to()")
    if dims is not None and value.dim() != dims:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; give {shape}")
