"""The gradient as rows: a torch sparse tensor (grad="sparse"), or an update in the backward pass (grad="fused").

Neither holds a dense gradient at any time. Both differentiate once, and both are the same bits run after run.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..addressing import AddressSpec, TokenStream
from .backends import functions_of
from .rules import RowUpdate
from .sparse_norm import register_sparse_norm
from .spent_gradient import FusedGradient
from .table_state import TableOptimizer, TableState, Updates, table_state


@torch.compiler.disable
def read_memory(
    weight: Tensor,
    source: Tensor | TokenStream,
    spec: AddressSpec,
    backend: str,
    grad: str,
    *,
    gathered: Gathered | None = None,
    updates: Updates | None = None,
) -> Tensor:
    """S of codes ``[M, L]`` or of a token stream, differentiated into rows.

    Args:
        backend: a chosen one; a later step of the table's optimizer uses it too.
        grad: "sparse" or "fused".
        gathered: S, where it has been gathered already.
        updates: where a fused update is to run, beside the caller; nobody may change `source` or the gradient of S in
            place until it has ended.
    """
    exchange = None
    if weight.requires_grad and torch.is_grad_enabled():
        state = table_state(weight)
        exchange = state.exchange
        _check_processes(weight, state, grad)
        if grad == "fused":
            _check_fusible(weight, state)
        else:
            register_sparse_norm()
            if state.managed:
                _check_managed(weight, state)
        state.backend = backend
        state.updates = updates or state.updates
    is_stream = isinstance(source, TokenStream)
    return _RowGradient.apply(
        weight, spec, backend, grad, gathered, updates, exchange, is_stream, *(source if is_stream else (source,))
    )


class Gathered(NamedTuple):
    """S, as an argument that autograd does not look into: what it returns is then no view of an input."""

    S: Tensor


class _RowGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, spec, backend, grad, gathered, updates, exchange, is_stream, *tensors):
        ctx.weight, ctx.options = weight, (spec, backend, grad, updates, exchange, is_stream)
        ctx.save_for_backward(*tensors)
        if gathered is not None:
            return gathered.S
        source = TokenStream(*tensors) if is_stream else tensors[0]
        return functions_of(backend).forward(source, weight, spec)

    @staticmethod
    def backward(ctx, grad):
        spec, backend, mode, updates, exchange, is_stream = ctx.options
        if torch.is_grad_enabled():
            raise RuntimeError(f'grad="{mode}" differentiates once; use grad="dense" for create_graph=True')
        tensors = ctx.saved_tensors  # checkpointing unpacks them once
        source = TokenStream(*tensors) if is_stream else tensors[0]
        weight, functions = ctx.weight, functions_of(backend)
        # The kernels read memory: torch may keep a sign apart, or no memory for zeros.
        grad = torch.zeros_like(grad) if grad._is_zerotensor() else grad.resolve_neg()
        no_gradients = [None] * (7 + len(tensors))
        if exchange is not None:
            # Before anything changes, so that an exchange that fails leaves table and optimizer as they were.
            grad, source = exchange.gather(weight, grad, source, spec, mode)
            table_state(weight).unspent = mode == "sparse"
        if mode == "fused":
            _check_accumulates(ctx.next_functions[0][0])
            update = _begin_update(weight)
            if updates is None:
                functions.fused_update(grad, source, spec, update)
            else:
                updates.start(partial(functions.fused_update, grad, source, spec, _set_apart(update)))
            torch.autograd.graph.increment_version(weight)
            weight.grad = FusedGradient(weight, update.squares, updates)
            return None, *no_gradients
        rows, sums, unique = functions.row_sums(grad, source, spec, weight.dtype)
        gradient = torch.sparse_coo_tensor(rows[None], sums, weight.shape, is_coalesced=unique, check_invariants=False)
        return gradient, *no_gradients


def _check_processes(weight: Tensor, state: TableState, grad: str) -> None:
    if hasattr(weight, "ds_id"):
        raise RuntimeError(
            f'weight is divided by DeepSpeed ZeRO, and grad="{grad}" would train a copy that is thrown away; keep the '
            "table out of it with prefixmem_fast.distributed.replicate(model, managed=True) before deepspeed.initialize"
        )
    if state.exchange is not None:
        state.exchange.check(weight)
        return
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        reason = {
            "fused": "would update every process's table by its own batch alone",
            "sparse": "gives a sparse gradient, which DistributedDataParallel and FSDP do not reduce",
        }
        raise RuntimeError(
            f'grad="{grad}" {reason[grad]}; call prefixmem_fast.distributed.replicate(model) before the model is '
            "wrapped (and have FSDP2 ignore the table: ignored_params={encoder.memory.weight}, or replicate with "
            'managed=True), or use grad="dense"'
        )


def _check_fusible(weight: Tensor, state: TableState) -> None:
    if not weight.is_leaf:
        raise RuntimeError('grad="fused" updates a parameter, and weight was computed from one; use grad="dense"')
    _optimizer_of(state)
    check_unscaled(weight.device.type)


def check_unscaled(kind: str, what: str = 'grad="fused"', instead: str = 'use bfloat16, or grad="sparse"') -> None:
    """Refuse gradients of GradScaler, where they come from devices of this kind and it does not unscale them."""
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
        raise RuntimeError(
            f"{what} would apply gradients as GradScaler scaled them, and autocast is in float16; {instead}"
        )


def _check_managed(weight: Tensor, state: TableState) -> None:
    check_unscaled(weight.device.type, 'grad="sparse" of a managed or divided table', "use bfloat16")
    if state.optimizer is None and not state.warned:
        state.warned = True
        warnings.warn(
            "a managed or divided table is trained, and no optimizer of prefixmem_fast.optim holds it: one over "
            "model.parameters() leaves it out; take optim.for_model(model)",
            stacklevel=2,
        )


def _check_accumulates(accumulation: torch.autograd.graph.Node) -> None:
    """Refuse `torch.autograd.grad`, which would get no gradient and have the table updated."""
    try:
        torch._C._will_engine_execute_node(accumulation)
    except (AttributeError, RuntimeError) as error:  # others come of old releases and of compiled autograd
        if "autograd.grad()" in str(error):
            raise RuntimeError(
                'grad="fused" updates the table in loss.backward(), and torch.autograd.grad would get no gradient of '
                'it; use grad="dense" or grad="sparse", or leave the table out of the inputs'
            ) from None


def _optimizer_of(state: TableState) -> TableOptimizer:
    optimizer = state.optimizer
    if optimizer is None:
        raise RuntimeError(
            'grad="fused" found no optimizer for the table; build one of prefixmem_fast.optim over it and keep it, or '
            'use grad="sparse" or grad="dense"'
        )
    return optimizer


def _set_apart(update: RowUpdate) -> RowUpdate:
    """The update for a thread: a schedule does not reach its learning rate, nor it the version of the table."""
    lr = update.hyper.lr
    hyper = update.hyper._replace(lr=lr.clone() if isinstance(lr, Tensor) else lr)
    return replace(update, weight=update.weight.data, hyper=hyper)


def _begin_update(weight: Tensor) -> RowUpdate:
    if weight.grad is not None and not getattr(weight.grad, "cleared", False):
        raise RuntimeError(
            'grad="fused" has a gradient of this step already: gradients cannot be accumulated over backward passes, '
            'nor over two readings of one table; use grad="sparse", or call optimizer.step() or zero_grad() after '
            "each backward pass"
        )
    update = _optimizer_of(table_state(weight)).begin(weight)
    update.squares = []
    return update
