"""The norm of sparse tensors that torch lacks, and that clip_grad_norm_ and every trainer ask for."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def register_sparse_norm() -> torch.library.Library:
    """Give torch, for this process, the norm of sparse tensors; called by the first grad="sparse" that trains.

    A torch that has the norm keeps its own.
    """
    library = torch.library.Library("aten", "IMPL")
    for device, key in (("cpu", "SparseCPU"), ("cuda", "SparseCUDA")):
        if device == "cpu" or torch.cuda.is_available():
            try:
                torch.linalg.vector_norm(torch.zeros(1, device=device).to_sparse())
            except (NotImplementedError, RuntimeError):
                library.impl("linalg_vector_norm", _sparse_norm, key)
    return library  # registered as long as it lives


def _sparse_norm(self: Tensor, ord=2, dim=None, keepdim=False, *, dtype=None) -> Tensor:
    """Norm of a sparse gradient as of the dense one; entries of one row count as their sum."""
    if dim is not None or keepdim:
        raise NotImplementedError("the norm of a sparse tensor is taken over all of it; leave dim and keepdim out")
    return torch.linalg.vector_norm(self.coalesce()._values(), ord, dtype=dtype)
