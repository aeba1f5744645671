"""Which implementation runs: `triton` on a GPU, `reference` in plain PyTorch anywhere."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "reference")
# Tuples of compile-time constants with named fields, which the kernels are written with, work from here on.
_OLDEST_TRITON = (3, 4)


class BackendError(RuntimeError):
    """A backend cannot run here; the message says why and what to do."""


@lru_cache(maxsize=1)
def triton_problem() -> str | None:
    """Why the kernels cannot be built here at all, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; it comes with torch for GPUs on Linux, or: pip install triton"
    try:
        found = version("triton")
    except PackageNotFoundError:
        return None  # a vendor's build under another name
    if tuple(int(part) for part in found.split("+")[0].split(".")[:2]) < _OLDEST_TRITON:
        oldest = ".".join(map(str, _OLDEST_TRITON))
        return f"triton {found} is older than {oldest}; install torch 2.8 or newer with its triton"
    return None


def interpreting() -> bool:
    """Whether the kernels run in the Triton interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unavailable(backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot run on tensors of `device`, or None."""
    if backend == "reference" or device.type == "meta":
        return None
    problem = triton_problem()
    if problem is None and device.type != "cuda" and not interpreting():
        problem = (
            f"the tensors are on {device}; move them to a GPU, set TRITON_INTERPRET=1 before starting Python to run "
            "the kernels in the interpreter, or use backend='reference'"
        )
    return problem


def resolve(backend: str, *tensors: Tensor) -> str:
    """The backend that runs for these tensors.

    Raises:
        ValueError: `backend` is unknown, the tensors are on different devices.
        BackendError: the backend cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend = {backend!r} is unknown; allowed are {', '.join(map(repr, BACKENDS))}")
    device = tensors[0].device
    if any(tensor.device != device for tensor in tensors):
        raise ValueError(
            f"the tensors are on {', '.join(str(tensor.device) for tensor in tensors)}; move them to one device"
        )
    if backend == "auto":
        return "triton" if device.type == "cuda" and triton_problem() is None else "reference"
    problem = unavailable(backend, device)
    if problem is not None:
        raise BackendError(f"backend = {backend!r} cannot run: {problem}")
    return backend
