"""The gradient as rows: a torch sparse tensor (grad="sparse"), or an update in the backward pass (grad="fused").

Neither holds a dense gradient at any time. Both differentiate once, and both are the same bits run after run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..addressing.spec import AddressSpec
from . import cpu, reference

if TYPE_CHECKING:
    from ..optim.rows import RowOptimizer, RowUpdate


@torch.compiler.disable
def read_rows(
    read: Callable[[Tensor], Tensor], weight: Tensor, inputs: tuple, spec: AddressSpec, backend: str, grad: str
) -> Tensor:
    """`read(weight)`, differentiated into rows.

    Args:
        read: the forward operation.
        inputs: (codes ``[M, L]``,), or (input_ids, token_table, segment_ids or None): what it reads for.
        grad: "sparse" or "fused".
    """
    if grad == "fused" and weight.requires_grad and torch.is_grad_enabled():
        _check_fusible(weight)
    return _RowGradient.apply(weight, read, spec, backend, grad, *inputs)


class _RowGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, read, spec, backend, grad, *inputs):
        ctx.weight, ctx.how = weight, (spec, backend)
        ctx.fused = grad == "fused"
        ctx.save_for_backward(*inputs)
        return read(weight.detach())

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            mode = "fused" if ctx.fused else "sparse"
            raise RuntimeError(f'grad="{mode}" differentiates once; use grad="dense" for create_graph=True')
        weight, inputs = ctx.weight, ctx.saved_tensors  # checkpointing unpacks them once
        if ctx.fused:
            update = _begin_update(weight)
            _update(update, grad, inputs, *ctx.how)
            torch.autograd.graph.increment_version(weight)
            weight.grad = FusedGradient(weight, torch.cat(update.squares).sum())
            found = None
        else:
            found = _sparse(weight, grad, inputs, *ctx.how)
        return found, *[None] * (4 + len(inputs))


def _groups(grad: Tensor, inputs: tuple, spec: AddressSpec, backend: str) -> Iterator[cpu.Group]:
    """The touched rows and their sums, in PyTorch."""
    library = cpu if backend == "cpu" else reference
    if len(inputs) == 1:
        found = library.row_gradient(grad, inputs[0], spec)
    else:
        input_ids, token_table, segment_ids = inputs
        found = library.token_row_gradient(grad, input_ids, token_table, spec, segment_ids)
    return found if backend == "cpu" else iter([cpu.Group(found[0], iter([found[1]]))])


def _update(update: RowUpdate, grad: Tensor, inputs: tuple, spec: AddressSpec, backend: str) -> None:
    if backend == "triton":
        from ..kernels import sorted_backward as kernels

        with torch.cuda.device_of(grad):
            kernels.update(grad, inputs, spec, update)
    else:
        for rows, values in cpu.in_chunks(_groups(grad, inputs, spec, backend)):
            update.apply(rows, values)


def _sparse(weight: Tensor, grad: Tensor, inputs: tuple, spec: AddressSpec, backend: str) -> Tensor:
    """The sparse gradient. From a GPU it has a fixed number of entries: those past the last touched row repeat it
    with zeros, so that nothing waits for a count, and torch's coalesce() gives the touched rows and no other."""
    if backend == "triton":
        from ..kernels import sorted_backward as kernels

        with torch.cuda.device_of(grad):
            rows, values = kernels.padded_rows(grad, inputs, spec)
        values = values.to(weight.dtype)
    elif backend == "cpu":
        width = weight.shape[1]
        most = grad.numel() // width * spec.max_order
        rows, values = cpu.as_list(_groups(grad, inputs, spec, backend), most, width, weight.dtype)
    else:
        ((rows, sums),) = _groups(grad, inputs, spec, backend)
        values = next(sums).to(weight.dtype)
    return torch.sparse_coo_tensor(
        rows[None], values, weight.shape, is_coalesced=backend != "triton", check_invariants=False
    )


def sparse_rows(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[U]``, ascending and each once, and values ``[U, w]`` of a sparse gradient; float32 sums of duplicates."""
    rows, values = grad._indices()[0], grad._values()
    if grad.is_coalesced() or bool((rows[1:] > rows[:-1]).all()):
        return rows, values
    merged, sums = cpu.merge(rows, values)
    return merged, torch.cat(list(sums))


def _sparse_norm(self: Tensor, ord=2, dim=None, keepdim=False, *, dtype=None) -> Tensor:
    """Norm of a sparse gradient as of the dense one; entries of one row count as their sum."""
    if dim is not None or keepdim:
        raise NotImplementedError("the norm of a sparse tensor is taken over all of it; leave dim and keepdim out")
    return torch.linalg.vector_norm(self.coalesce()._values(), ord, dtype=dtype)


def _register_sparse_norm() -> torch.library.Library:
    """Give torch the norm of sparse tensors that clip_grad_norm_, and every trainer, asks for and torch lacks."""
    library = torch.library.Library("aten", "IMPL")
    for key in ("SparseCPU", "SparseCUDA"):
        if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::linalg_vector_norm", key):
            library.impl("linalg_vector_norm", _sparse_norm, key)
    return library


_SPARSE_NORM = _register_sparse_norm()  # registered as long as it lives


class FusedGradient(Tensor):
    """Stands in ``weight.grad`` after a fused update, until the step ends. It has a shape, a norm and no storage.

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
        made = Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)
        made.cleared, made.squares = False, squares
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FusedGradient(spent in the backward pass, shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        name, one = str(func.overloadpacket).removeprefix("aten."), args[0]
        order = args[1] if len(args) > 1 else 2
        if name == "linalg_vector_norm" and order == 2 and not any(args[2:]):
            return one.squares.sqrt().to(one.dtype)
        if name == "zero_":
            one.cleared = True
            return one
        if name == "mul_" and bool(args[1] == 1):
            return one
        if name in ("_foreach_norm", "_foreach_mul_", "_foreach_zero_") and not isinstance(order, (list, tuple)):
            call = {
                "_foreach_norm": lambda each: torch.linalg.vector_norm(each, order),
                "_foreach_mul_": lambda each: each.mul_(order),
                "_foreach_zero_": lambda each: each.zero_(),
            }[name]
            found = [call(each) for each in one]
            return found if name == "_foreach_norm" else None
        raise RuntimeError(
            'grad="fused" spends the gradient of the table in the backward pass, so it cannot be clipped, scaled or '
            f'read ({func}); use grad="sparse", or train without clipping and without GradScaler (max_grad_norm=0, and '
            "bf16=True rather than fp16=True, in Hugging Face's TrainingArguments)"
        )


class _Binding:
    """Which optimizer a table's backward pass calls. A copy or a pickle of the table is bound to none."""

    def __init__(self, optimizer: RowOptimizer | None = None) -> None:
        self.optimizer = weakref.ref(optimizer) if optimizer is not None else lambda: None

    def __reduce__(self) -> Any:
        return _Binding, ()


def bind_optimizer(weight: Tensor, optimizer: RowOptimizer) -> None:
    """Have the fused backward pass of `weight` call `optimizer`; the last one bound is called."""
    weight.row_optimizer = _Binding(optimizer)


def _optimizer_of(weight: Tensor) -> RowOptimizer:
    optimizer = getattr(weight, "row_optimizer", _Binding()).optimizer()
    if optimizer is None:
        raise RuntimeError(
            'grad="fused" found no optimizer for the table; build one of prefixmem_fast.optim over it and keep it, or '
            'use grad="sparse" or grad="dense"'
        )
    return optimizer


def _check_fusible(weight: Tensor) -> None:
    if not weight.is_leaf:
        raise RuntimeError('grad="fused" updates a parameter, and weight was computed from one; use grad="sparse"')
    _optimizer_of(weight)
    kind = weight.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
        raise RuntimeError(
            'grad="fused" would apply gradients as GradScaler scaled them, and autocast is in float16; use bfloat16, '
            'or grad="sparse"'
        )
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise RuntimeError(
            'grad="fused" would update every process\'s table by its own batch alone; use grad="sparse" or "dense"'
        )


def _begin_update(weight: Tensor) -> RowUpdate:
    if weight.grad is not None and not getattr(weight.grad, "cleared", False):
        raise RuntimeError(
            'grad="fused" has a gradient of this step already: gradients cannot be accumulated over backward passes, '
            'nor over two readings of one table; use grad="sparse", or call optimizer.step() or zero_grad() after '
            "each backward pass"
        )
    update = _optimizer_of(weight).begin(weight)
    update.squares = [torch.zeros(1, dtype=update.sum_dtype, device=weight.device)]
    return update
