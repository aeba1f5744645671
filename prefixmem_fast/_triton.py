"""Whether Triton can build the kernels here, and whether it interprets them."""

from __future__ import annotations

import importlib.util
import os
import re
from importlib.metadata import PackageNotFoundError, version

# Tuples of compile-time constants with named fields, which the kernels are written with, work from here on.
_OLDEST = (3, 4)


def _find_problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; it comes with torch for GPUs on Linux, or: pip install triton"
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        if tuple(map(int, re.findall(r"\d+", installed)[:2])) < _OLDEST:
            oldest = ".".join(map(str, _OLDEST))
            return f"triton {installed} is older than {oldest}; install torch 2.8 or newer with its triton"
        break
    return None


# Why the kernels cannot be built here at all, or None.
TRITON_PROBLEM = _find_problem()


def interpreting() -> bool:
    """Whether the kernels run in the Triton interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
