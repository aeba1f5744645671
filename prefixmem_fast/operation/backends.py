"""Which implementation runs: `triton` on a GPU, `cpu` on a CPU, `reference` in plain PyTorch anywhere."""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "cpu", "reference")
# Tuples of compile-time constants with named fields, which the kernels are written with, work from here on.
_OLDEST_TRITON = (3, 4)


class BackendError(RuntimeError):
    """A backend cannot run here; the message says why and what to do."""


def _find_triton_problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; it comes with torch for GPUs on Linux, or: pip install triton"
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if tuple(map(int, re.findall(r"\d+", found)[:2])) < _OLDEST_TRITON:
            oldest = ".".join(map(str, _OLDEST_TRITON))
            return f"triton {found} is older than {oldest}; install torch 2.8 or newer with its triton"
        break
    if importlib.util.find_spec("prefixmem_fast.kernels") is None:
        return "this prefixmem_fast is a bare checkout; run Python in another folder, or install it: pip install -e ."
    return None


# Why the kernels cannot be built here at all, or None.
TRITON_PROBLEM = _find_triton_problem()


def interpreting() -> bool:
    """Whether the kernels run in the Triton interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def unavailable(backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot run on tensors of `device`, or None."""
    if backend == "reference" or device.type == "meta":
        return None
    if backend == "cpu":
        where = f"it needs tensors on the CPU and these would be on {device}; take triton or reference"
        return where if device.type != "cpu" else None
    problem = TRITON_PROBLEM
    if problem is None and device.type != "cuda" and not interpreting():
        problem = (
            f"it needs tensors on a GPU and these would be on {device}; set TRITON_INTERPRET=1 before starting "
            "Python to run the kernels in the interpreter, or take the reference backend, which runs anywhere"
        )
    return problem


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend = {backend!r} is unknown; allowed are {', '.join(map(repr, BACKENDS))}")


def resolve(backend: str, **tensors: Tensor) -> str:
    """The backend that runs for these named tensors.

    Raises:
        ValueError: `backend` is unknown, or the tensors are on different devices.
        BackendError: the backend cannot run here.
    """
    check_backend(backend)
    devices = {name: tensor.device for name, tensor in tensors.items()}
    device = next(iter(devices.values()))
    if any(other != device for other in devices.values()):
        where = ", ".join(f"{name} is on {other}" for name, other in devices.items())
        raise ValueError(f"{where}; move them to one device")
    if backend == "auto":
        if device.type == "cuda" and TRITON_PROBLEM is not None:
            warnings.warn(f"the reference runs, slowly: {TRITON_PROBLEM}", stacklevel=3)
            return "reference"
        return {"cuda": "triton", "cpu": "cpu"}.get(device.type, "reference")
    problem = unavailable(backend, device)
    if problem is not None:
        raise BackendError(f"backend = {backend!r} cannot run: {problem}")
    return backend
