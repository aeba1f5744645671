"""What stands in ``weight.grad`` after a fused update, until the step ends."""

from __future__ import annotations

import torch
from torch import Tensor


class FusedGradient(Tensor):
    """A gradient that the backward pass has spent. It has a shape, a norm and no storage.

    The norm can be read, so that a trainer logs it. Scaling by anything but 1 raises, as do all other reads: clipping
    or unscaling a gradient that is spent fails instead of being skipped.

    Args:
        weight: the table.
        squares: sum of the squared gradient, 0-dimensional.
    """

    cleared: bool
    squares: Tensor

    @staticmethod
    def __new__(cls, weight: Tensor, squares: Tensor) -> FusedGradient:
        gradient = Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)
        gradient.cleared, gradient.squares = False, squares
        return gradient

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FusedGradient(spent in the backward pass, shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        operator, first = str(func.overloadpacket).removeprefix("aten."), args[0]
        second = args[1] if len(args) > 1 else 2  # the order of a norm, or a factor
        if operator == "linalg_vector_norm" and second == 2 and not any(args[2:]):
            return first.squares.sqrt().to(first.dtype)
        if operator == "zero_":
            first.cleared = True
            return first
        if operator == "mul_" and bool(args[1] == 1):
            return first
        if operator in _FOREACH and not isinstance(second, (list, tuple)):
            results = [_FOREACH[operator](gradient, second) for gradient in first]
            return results if operator == "_foreach_norm" else None
        raise RuntimeError(
            'grad="fused" spends the gradient of the table in the backward pass, so it cannot be clipped, scaled or '
            f'read ({func}); use grad="sparse", or train without clipping and without GradScaler (max_grad_norm=0, and '
            "bf16=True rather than fp16=True, in Hugging Face's TrainingArguments)"
        )


_FOREACH = {
    "_foreach_norm": lambda gradient, order: torch.linalg.vector_norm(gradient, order),
    "_foreach_mul_": lambda gradient, factor: gradient.mul_(factor),
    "_foreach_zero_": lambda gradient, _: gradient.zero_(),
}
