"""Which implementation runs: `triton` on a GPU, `native` (C++) or `cpu` (PyTorch) on a CPU, `reference` anywhere.

A backend is one file of this folder with the functions of `interface.py`.
"""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .. import _checks
from .._choices import BACKENDS
from .._native import native_problem
from .._triton import TRITON_PROBLEM, interpreting


class BackendError(RuntimeError):
    """A backend cannot run here; the message says why and what to do."""


def choose_backend(backend: str, **tensors: Tensor) -> str:
    """The backend that runs for these named tensors.

    Raises:
        ValueError: `backend` is unknown, or the tensors are on different devices.
        BackendError: the backend cannot run here.
    """
    _checks.choice("backend", backend, BACKENDS)
    device = None
    for tensor in tensors.values():
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            where = ", ".join(f"{name} is on {tensor.device}" for name, tensor in tensors.items())
            raise ValueError(f"{where}; move them to one device")
    if backend == "auto":
        return _default_backend(device)
    problem = backend_problem(backend, device)
    if problem is not None:
        raise BackendError(f"backend = {backend!r} cannot run: {problem}")
    return backend


@cache
def functions_of(backend: str) -> ModuleType:
    """The functions of a chosen backend; triton is imported with the first call for it."""
    return importlib.import_module(f".{backend}", __package__)


def backend_problem(backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot run on tensors of `device`, or None."""
    return None if device.type == "meta" else _PROBLEMS[backend](device)


def _default_backend(device: torch.device) -> str:
    if device.type == "cuda" and TRITON_PROBLEM is not None:
        warnings.warn(f"the reference runs, slowly: {TRITON_PROBLEM}", stacklevel=4)
        return "reference"
    if device.type == "cpu":
        return "cpu" if native_problem() else "native"
    return "triton" if device.type == "cuda" else "reference"


def _problem_of_native(device: torch.device) -> str | None:
    return _problem_of_cpu(device) or native_problem()


def _problem_of_cpu(device: torch.device) -> str | None:
    where = f"it needs tensors on the CPU and these would be on {device}; take triton or reference"
    return where if device.type != "cpu" else None


def _problem_of_triton(device: torch.device) -> str | None:
    if TRITON_PROBLEM is not None or device.type == "cuda" or interpreting():
        return TRITON_PROBLEM
    return (
        f"it needs tensors on a GPU and these would be on {device}; set TRITON_INTERPRET=1 before starting "
        "Python to run the kernels in the interpreter, or take the reference backend, which runs anywhere"
    )


_PROBLEMS = {
    "triton": _problem_of_triton,
    "native": _problem_of_native,
    "cpu": _problem_of_cpu,
    "reference": lambda device: None,
}
