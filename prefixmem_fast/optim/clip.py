"""Clipping over dense and sparse gradients together."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    *,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_`, which coalesces sparse gradients once, and not for the norm and again to step.

    The norm is that of the dense gradients. Coalescing waits for the GPU.

    Args:
        parameters: whose ``.grad`` count; None is skipped.
        max_norm: the largest total norm.
        norm_type: p of the p-norm, or infinity.
        error_if_nonfinite: raise if the total norm is not finite.

    Returns:
        The total norm before clipping, 0-dimensional.

    Raises:
        ValueError: `max_norm` is not a number of 0 or more.
        RuntimeError: a gradient that grad="fused" has spent would have to be scaled, or the norm is not finite and that
            was to be an error.
    """
    if isinstance(max_norm, bool) or not isinstance(max_norm, (int, float)) or math.isnan(max_norm) or max_norm < 0:
        raise ValueError(f"max_norm = {max_norm!r} is not a number of 0 or more")
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite)
