"""PrefixMem on a GPU: the kernels, launched on the tensors' device. The one file that imports them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..addressing import AddressSpec, TokenStream
from ..kernels import atomic_backward, rows, sorted_backward
from ..kernels import forward as forward_kernels
from ..kernels import windows as window_kernels
from ..kernels.update import Destination, Epilogue, halves, logarithm, pair
from .interface import QuantizedTable, RowSums
from .rounding import mix_seed
from .rules import RowUpdate


def prefix_rows(codes: Tensor, spec: AddressSpec) -> Tensor:
    with torch.cuda.device_of(codes):
        return rows.prefix_rows(codes.contiguous(), spec)


def forward(source: Tensor | TokenStream, weight: Tensor, spec: AddressSpec) -> Tensor:
    launch = forward_kernels.token_memory_fwd if isinstance(source, TokenStream) else forward_kernels.prefix_memory_fwd
    with torch.cuda.device_of(weight):
        return launch(_contiguous(source), weight.contiguous(), spec)


def quantized_forward(
    source: Tensor | TokenStream, table: QuantizedTable, spec: AddressSpec, dtype: torch.dtype
) -> Tensor:
    launch = forward_kernels.token_memory_fwd if isinstance(source, TokenStream) else forward_kernels.prefix_memory_fwd
    with torch.cuda.device_of(table.values):
        return launch(_contiguous(source), _bytes_of(table), spec, table.scales.contiguous(), dtype)


def dense_gradient(
    grad: Tensor, source: Tensor | TokenStream, spec: AddressSpec, deterministic: bool = False
) -> Tensor:
    """By float32 atomics, or by sorting where the same bits are asked for run after run."""
    launch = atomic_backward.token_memory_bwd if isinstance(source, TokenStream) else atomic_backward.prefix_memory_bwd
    with torch.cuda.device_of(grad):
        if deterministic:
            launch = sorted_backward.dense
        return launch(grad.contiguous(), _contiguous(source), spec)


def row_sums(grad: Tensor, source: Tensor | TokenStream, spec: AddressSpec, dtype: torch.dtype) -> RowSums:
    """A fixed number of entries, so that nothing waits for a count: see `RowSums.unique`."""
    with torch.cuda.device_of(grad):
        touched, sums = sorted_backward.padded_rows(grad.contiguous(), _contiguous(source), spec)
    return RowSums(touched, sums.to(dtype), False)


def fused_update(grad: Tensor, source: Tensor | TokenStream, spec: AddressSpec, update: RowUpdate) -> None:
    with torch.cuda.device_of(grad):
        sorted_backward.update(grad.contiguous(), _contiguous(source), spec, *_epilogue_of(update), update.squares)


def sparse_update(grad: Tensor, update: RowUpdate) -> None:
    touched, values = grad._indices()[0], grad._values().contiguous()
    with torch.cuda.device_of(values):
        sorted_backward.update_sparse(touched, values, *_epilogue_of(update), update.squares)


def read_windows(
    windows: Tensor, token_table: Tensor, table: Tensor | QuantizedTable, spec: AddressSpec, out: Tensor
) -> None:
    windows = windows if windows.stride(1) == 1 else windows.contiguous()
    if isinstance(table, QuantizedTable):
        weight, scales = _bytes_of(table), table.scales.contiguous()
    else:
        weight, scales = table.contiguous(), None
    with torch.cuda.device_of(out):
        window_kernels.window_memory(windows, token_table.contiguous(), weight, spec, out, scales)


def _bytes_of(table: QuantizedTable) -> Tensor:
    """The values as kernels take them: int8, or uint8 for the bits of e4m3, a type that not every GPU has."""
    values = table.values.contiguous()
    return values if values.dtype == torch.int8 else values.view(torch.uint8)


def _contiguous(source: Tensor | TokenStream) -> Tensor | TokenStream:
    if isinstance(source, TokenStream):
        return TokenStream(*(None if tensor is None else tensor.contiguous() for tensor in source))
    return source.contiguous()


def _epilogue_of(update: RowUpdate) -> tuple[Destination, Epilogue]:
    """An update as the arguments of a kernel, at run time and at compile time."""
    hyper, stochastic = update.hyper, update.seed is not None
    first_moment, second_moment = [None, None, *update.state][-2:]
    adam = len(update.state) == 2
    destination = Destination(
        table=update.weight,
        first_moment=first_moment,
        second_moment=second_moment,
        step=update.step if stochastic or adam else None,
        lr=hyper.lr if isinstance(hyper.lr, Tensor) else pair(float(hyper.lr)),
        weight_decay=pair(float(hyper.weight_decay)),
        eps=pair(float(hyper.eps)),
        beta1=pair(float(hyper.beta1)),
        beta2=pair(float(hyper.beta2)),
        log_beta1=logarithm(float(hyper.beta1)),
        log_beta2=logarithm(float(hyper.beta2)),
        seed=halves(mix_seed(update.seed)) if stochastic else (0.0, 0.0),
    )
    return destination, Epilogue(update.rule, hyper.weight_decay != 0, isinstance(hyper.lr, Tensor), stochastic)
