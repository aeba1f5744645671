"""Clipping over dense and sparse gradients together, and over tables that are divided between processes."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..encoder import PrefixMemory
from ..operation.spent_gradient import FusedGradient


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor] | nn.Module,
    max_norm: float,
    norm_type: float = 2.0,
    *,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_`, which coalesces sparse gradients once, and not for the norm and again to step.

    The norm is that of the dense gradients. Coalescing waits for the GPU.

    Args:
        parameters: whose ``.grad`` count; None is skipped. A module stands for its parameters and for the tables that
            are none of them: managed ones, and those divided over processes, whose parts then count as one. With
            divided ones the call is collective.
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
    divided: list[PrefixMemory] = []
    if isinstance(parameters, nn.Module):
        apart = [m for m in parameters.modules() if isinstance(m, PrefixMemory) and m.managed]
        divided = [memory for memory in apart if memory.division is not None]
        parameters = [*parameters.parameters(), *(memory.weight for memory in apart)]
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
    parts = {id(memory.weight) for memory in divided}
    whole = [parameter for parameter in parameters if parameter.grad is not None and id(parameter) not in parts]
    shards = [parameter for parameter in whole if hasattr(parameter.grad, "device_mesh")]  # of FSDP2
    if not divided and len(shards) in (0, len(whole)):
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite)
    spent = [parameter for parameter in parameters if isinstance(parameter.grad, FusedGradient)]
    if spent and max_norm != math.inf:
        torch.nn.utils.clip_grad_norm_(spent, max_norm)  # raises
    rest = [parameter for parameter in whole if not hasattr(parameter.grad, "device_mesh")]
    norms = [torch.nn.utils.get_total_norm([p.grad for p in group], norm_type) for group in (shards, rest) if group]
    norms = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    norms += [memory.division.norm(memory.weight.grad, norm_type) for memory in divided]
    # A norm of a spent gradient is of a class of its own, and mixes with no other.
    total = torch.linalg.vector_norm(torch.tensor([float(norm) for norm in norms]), norm_type)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(f"the total norm of order {norm_type} is {float(total)}; give error_if_nonfinite=False")
    if max_norm != math.inf:
        for group in (shards, [p for p in parameters if p.grad is not None and not hasattr(p.grad, "device_mesh")]):
            if group:
                torch.nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return total
