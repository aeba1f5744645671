"""PrefixMem in plain PyTorch: the definition that every backend is held against. Written to be read, not to be fast.

    forward   S_a = sum over n of concat_h weight[row(a, n, h)]            for each active level a
    gradient  dL/dweight[r] = sum of dL/dS_a[.., h] over all (SID, a, n, h) with row(a, n, h) = r

The rows are those of `addressing/`. Sums run over n = 1 .. N in float32 (float64 for a float64 table) and are rounded
once, to the table's dtype. An order that the prefix does not reach adds zero and receives no gradient.

A quantized table is read as the float32 rows that it stands for, and has no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dtypes import accumulator
from ..addressing import AddressSpec, TokenStream, prefix_rows, window_codes
from ..addressing.addresses import active_rows, rows_at
from .interface import QuantizedTable, RowSums
from .rules import RowUpdate
from .sums import sum_orders

__all__ = [
    "dense_gradient",
    "forward",
    "fused_update",
    "prefix_rows",
    "quantized_forward",
    "read_windows",
    "row_sums",
    "sparse_update",
]


def forward(source: Tensor | TokenStream, weight: Tensor, spec: AddressSpec) -> Tensor:
    """S: the memory rows summed over orders, heads side by side.

    Args:
        source: integer codes ``[..., L]``, or a token stream ``[B, T]``.
        weight: floating ``[R, w]``, the fused table.

    Returns:
        ``[..., A, H * w]`` in the dtype of `weight`, one vector for each active level; for a token stream
        ``[B, T, H * w]``, zero where a token stands at no active level of a SID.
    """
    return _forward(source, weight, spec, weight.dtype)


def quantized_forward(
    source: Tensor | TokenStream, table: QuantizedTable, spec: AddressSpec, dtype: torch.dtype
) -> Tensor:
    """`forward` of the float32 table that a quantized one stands for, in `dtype`."""
    return _forward(source, table, spec, dtype)


def _forward(
    source: Tensor | TokenStream, table: Tensor | QuantizedTable, spec: AddressSpec, dtype: torch.dtype
) -> Tensor:
    if not isinstance(source, TokenStream):
        return sum_orders(active_rows(source, spec), table, dtype)
    rows = rows_at(*window_codes(source, spec), spec)  # [B, T, A, N, H], of one level at most
    return sum_orders(rows.amax(-3), table, dtype)


def dense_gradient(
    grad: Tensor, source: Tensor | TokenStream, spec: AddressSpec, deterministic: bool = False
) -> Tensor:
    """Gradient of `forward` with respect to `weight`: that of S to ``[R, w]`` of the same dtype."""
    rows, values, _ = row_sums(grad, source, spec, grad.dtype)
    total = torch.zeros((spec.total_rows, values.shape[1]), dtype=grad.dtype, device=grad.device)
    return total.index_copy_(0, rows, values)


def row_sums(grad: Tensor, source: Tensor | TokenStream, spec: AddressSpec, dtype: torch.dtype) -> RowSums:
    """The touched rows, ascending and each once, and the sums of their gradients in `dtype`; summed in float32."""
    if isinstance(source, TokenStream):
        rows = rows_at(*window_codes(source, spec), spec)  # [B, T, A, N, H]
        grad = grad[..., None, :].expand(*rows.shape[:-2], -1)  # the gradient of each active level
    else:
        rows = active_rows(source, spec)
    grad = grad.unflatten(-1, (spec.heads, -1)).to(accumulator(grad.dtype))  # [..., A, H, w]
    touched = rows[rows >= 0].unique()
    sums = grad.new_zeros((len(touched), grad.shape[-1]))
    for row in rows.unbind(-2):  # [..., A, H]
        exists = row >= 0
        _add_rows(sums, torch.searchsorted(touched, row[exists]), grad[exists])
    return RowSums(touched, sums.to(dtype), True)


def _add_rows(total: Tensor, rows: Tensor, added: Tensor) -> None:
    if total.is_cuda:
        total.index_put_((rows,), added, accumulate=True)  # sorts first, hence the same bits run after run
    else:
        total.index_add_(0, rows, added)


def fused_update(grad: Tensor, source: Tensor | TokenStream, spec: AddressSpec, update: RowUpdate) -> None:
    """Update the touched rows of the update's table, each once."""
    rows, sums, _ = row_sums(grad, source, spec, accumulator(grad.dtype))
    update.apply(rows, sums)


def sparse_update(grad: Tensor, update: RowUpdate) -> None:
    """Update the rows of a sparse gradient ``[R, w]``; entries of one row are summed first, in float32."""
    rows, values = grad._indices()[0], grad._values()
    touched, place = rows.unique(return_inverse=True)
    sums = torch.zeros((len(touched), values.shape[1]), dtype=accumulator(values.dtype), device=values.device)
    _add_rows(sums, place, values.to(sums.dtype))
    update.apply(touched, sums)


def read_windows(
    windows: Tensor, token_table: Tensor, table: Tensor | QuantizedTable, spec: AddressSpec, out: Tensor
) -> None:
    """S of the last token of each window ``[n, W]``, its tokens in their order, into ``out [n, H * w]``.

    It is that of a token stream whose rows are the windows; what stands before them is text.
    """
    out.copy_(_forward(TokenStream(windows, token_table), table, spec, out.dtype)[:, -1])
