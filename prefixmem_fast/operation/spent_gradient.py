"""What stands in ``weight.grad`` after a fused update, until the step ends."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .table_state import Updates


class FusedGradient(Tensor):
    """A gradient that the backward pass has spent. It has a shape, a norm and no storage.

    The norm can be read, so that a trainer logs it: also by clipping to an infinite norm, as Hugging Face's does. Any
    other clip raises, whether or not it would scale, so that a run fails at its first step and not at the first large
    norm. Scaling by anything but 1 raises, as do all other reads: clipping or unscaling a gradient that is spent fails
    instead of being skipped.

    Args:
        weight: the table.
        squares: sums of the squared gradient, 1-dimensional, one or none for each kernel; summed where a norm is asked.
        updates: where the update runs that fills `squares`, if it runs beside the caller; a norm waits for it.
    """

    cleared: bool
    squares: list[Tensor]
    updates: Updates | None

    @staticmethod
    def __new__(cls, weight: Tensor, squares: list[Tensor], updates: Updates | None = None) -> FusedGradient:
        gradient = Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)
        gradient.cleared, gradient.squares, gradient.updates = False, squares, updates
        return gradient

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FusedGradient(spent in the backward pass, shape={tuple(self.shape)})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__ in ("mul_", "_foreach_mul_"):
            factor = args[1] if len(args) > 1 else kwargs.get("other", kwargs.get("scalar", kwargs.get("tensor")))
            if isinstance(factor, Tensor) and not (isinstance(factor, SpentNorm) and factor.reads_alone):
                raise _refusal(func.__name__)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        return _as_norms(result, reads_alone=False) if func.__name__ in _NORMS else result

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        operator, first = str(func.overloadpacket).removeprefix("aten."), args[0]
        second = args[1] if len(args) > 1 else 2  # the order of a norm, or a factor
        if operator == "linalg_vector_norm" and second == 2 and not any(args[2:]):
            if first.updates is not None:
                first.updates.finish()
            squares = first.squares or [torch.zeros(1, dtype=first.dtype, device=first.device)]
            return torch.cat(squares).sum().sqrt().to(first.dtype)
        if operator == "zero_":
            first.cleared = True
            return first
        if operator == "mul_" and bool(args[1] == 1):
            return first
        if operator in _FOREACH and not isinstance(second, (list, tuple)):
            results = [_FOREACH[operator](gradient, second) for gradient in first]
            return results if operator == "_foreach_norm" else None
        raise _refusal(func)


class SpentNorm(Tensor):
    """A norm into which that of a `FusedGradient` went, and what is computed from it.

    Attributes:
        reads_alone: an infinite norm has been divided by it, so that as a factor it stands for no clip.
    """

    reads_alone: bool

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if FusedGradient in types:
            return FusedGradient.__torch_function__(func, types, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if func in _DIVIDED_BY:  # max_norm / norm
            return _as_norms(result, reads_alone=args[1] == math.inf)
        if not args or getattr(func, "__name__", "") not in _KEPT_IN_A_CLIP:
            return result
        inputs = args[0] if isinstance(args[0], (list, tuple)) else args[:1]
        return _as_norms(result, reads_alone=any(getattr(value, "reads_alone", False) for value in inputs))


def _as_norms(result, *, reads_alone: bool):
    if isinstance(result, (list, tuple)):
        return type(result)(_as_norms(value, reads_alone=reads_alone) for value in result)
    norm = result.as_subclass(SpentNorm)
    norm.reads_alone = reads_alone
    return norm


def _refusal(func) -> RuntimeError:
    return RuntimeError(
        'grad="fused" spends the gradient of the table in the backward pass, so it cannot be clipped, scaled or '
        f'read ({func}); use grad="sparse", or train without clipping and without GradScaler (max_grad_norm=0, and '
        "bf16=True rather than fp16=True, in Hugging Face's TrainingArguments)"
    )


_NORMS = ("linalg_vector_norm", "vector_norm", "_foreach_norm", "norm")
_DIVIDED_BY = (Tensor.__rdiv__, Tensor.__rtruediv__)
# What torch's clip_grad_norm_ makes of a norm on the way to a factor.
_KEPT_IN_A_CLIP = ("to", "stack", "linalg_vector_norm", "vector_norm", "add", "__add__", "clamp", "reciprocal", "mul")
_FOREACH = {
    "_foreach_norm": lambda gradient, order: torch.linalg.vector_norm(gradient, order),
    "_foreach_mul_": lambda gradient, factor: gradient.mul_(factor),
    "_foreach_zero_": lambda gradient, _: gradient.zero_(),
}
