"""PrefixMem in plain PyTorch: the definition that every kernel is held against. Written to be read, not to be fast.

    rows      row(l, n, h) of every level, order and head, see `spec.py`
    forward   S_a = sum over n of concat_h weight[row(a, n, h)]            for each active level a
    backward  dL/dweight[r] = sum of dL/dS_a[.., h] over all (SID, a, n, h) with row(a, n, h) = r

Sums run over n = 1 .. N in float32 (float64 for a float64 table) and are rounded once, to the table's dtype.
A code below 0 or at least K_l ends the prefix: an order whose window reaches that level has row -1, adds zero, and
receives no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..addressing.spec import AddressSpec


def prefix_rows(codes: Tensor, spec: AddressSpec) -> Tensor:
    """Row in the fused table of every level, order and head.

    Args:
        codes: integer ``[..., L]``.

    Returns:
        int64 ``[..., L, N, H]``; -1 where the order does not exist at the level or the prefix has ended.
    """
    length = prefix_length(codes, spec)
    codes = torch.where(torch.arange(spec.levels, device=codes.device) < length[..., None], codes.long(), 0)

    rows = codes.new_full((*codes.shape[:-1], spec.levels, spec.max_order, spec.heads), -1)
    for level in range(1, spec.levels + 1):
        for order in spec.orders_at(level):
            first, last = spec.window(level, order)
            window = codes[..., first - 1 : last]
            alive = (length >= last)[..., None]
            rows[..., level - 1, order - 1, :] = torch.where(alive, order_rows(window, order, spec), -1)
    return rows


def prefix_length(codes: Tensor, spec: AddressSpec) -> Tensor:
    """int64 ``[...]``: how many codes of ``[..., L]`` stand before one ends the prefix."""
    valid = (codes >= 0) & (codes < torch.tensor(spec.codebook_sizes, device=codes.device))
    return valid.long().cumprod(-1).sum(-1)


def order_rows(window: Tensor, order: int, spec: AddressSpec) -> Tensor:
    """Rows ``[..., H]`` of the codes ``[..., order]``: mixed radix where the order is exact, else the hash."""
    if order in spec.exact_orders:
        index = torch.zeros_like(window[..., 0])
        for i in range(order):
            index = index * spec.codebook_sizes[i] + window[..., i]
        index = index[..., None]
    else:
        index = torch.zeros_like(window[..., :1])
        for i in range(order):
            index = index ^ (window[..., i, None] * window.new_tensor(spec.multipliers[i]))
        index = index % spec.rows_per_order[order - 1]
    return window.new_tensor(spec.offsets[order - 1]) + index


def _active_rows(codes: Tensor, spec: AddressSpec) -> Tensor:
    return prefix_rows(codes, spec)[..., [level - 1 for level in spec.active_levels], :, :]  # [..., A, N, H]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums of a table of `dtype` are kept in; bfloat16 sums would lose small values."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def prefix_memory(codes: Tensor, weight: Tensor, spec: AddressSpec) -> Tensor:
    """S: the memory rows summed over orders, heads side by side.

    Args:
        codes: integer ``[..., L]``.
        weight: floating ``[R, w]``, the fused table.

    Returns:
        ``[..., A, H * w]`` in the dtype of `weight`, one vector for each active level.
    """
    rows = _active_rows(codes, spec)
    total = torch.zeros(
        (*rows.shape[:-2], spec.heads, weight.shape[1]), dtype=accumulator(weight.dtype), device=weight.device
    )
    for n in range(spec.max_order):
        row = rows[..., n, :, None]  # [..., A, H, 1]
        read = weight[row.squeeze(-1).clamp(min=0)].to(total.dtype)
        total = total + torch.where(row >= 0, read, 0)
    return total.to(weight.dtype).flatten(-2)


def row_gradient(grad: Tensor, codes: Tensor, spec: AddressSpec) -> tuple[Tensor, Tensor]:
    """Gradient of `prefix_memory` with respect to the rows that it read.

    Args:
        grad: ``[..., A, H * w]``, gradient of S.
        codes: integer ``[..., L]``.

    Returns:
        rows: int64 ``[U]``, ascending, each once.
        values: ``[U, w]``, their sums in float32 (float64 for a float64 gradient).
    """
    return _sum_by_row(grad, _active_rows(codes, spec))


def _sum_by_row(grad: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of grad ``[..., A, H * w]`` by rows ``[..., A, N, H]``, where -1 is no row."""
    grad_heads = grad.unflatten(-1, (rows.shape[-1], -1)).to(accumulator(grad.dtype))  # [..., A, H, w]
    width = grad_heads.shape[-1]
    touched = rows[rows >= 0].unique()
    values = torch.zeros((len(touched), width), dtype=grad_heads.dtype, device=grad.device)
    for n in range(rows.shape[-2]):
        m_row = rows[..., n, :] >= 0  # [..., A, H]
        place = torch.searchsorted(touched, rows[..., n, :][m_row])
        _add_rows(values, place, grad_heads[m_row])
    return touched, values


def _add_rows(total: Tensor, rows: Tensor, added: Tensor) -> None:
    if total.is_cuda:
        total.index_put_((rows,), added, accumulate=True)  # sorts first, hence the same bits run after run
    else:
        total.index_add_(0, rows, added)


def dense_gradient(rows: Tensor, values: Tensor, spec: AddressSpec, dtype: torch.dtype) -> Tensor:
    """The rows' gradient as ``[R, w]`` of `dtype`, zero everywhere else."""
    total = torch.zeros((spec.total_rows, values.shape[1]), dtype=dtype, device=values.device)
    return total.index_copy_(0, rows, values.to(dtype))


def prefix_memory_backward(grad: Tensor, codes: Tensor, spec: AddressSpec) -> Tensor:
    """Gradient of `prefix_memory` with respect to `weight`: ``[..., A, H * w]`` to ``[R, w]`` of the same dtype."""
    return dense_gradient(*row_gradient(grad, codes, spec), spec, grad.dtype)


def token_entries(input_ids: Tensor, token_table: Tensor) -> tuple[Tensor, Tensor]:
    """Level and code, int64, of token ids of any shape; 0 and 0 for text."""
    known = (input_ids >= 0) & (input_ids < token_table.shape[0])
    if not token_table.shape[0]:
        return known.long(), known.long()
    entries = token_table[torch.where(known, input_ids, 0).long()].long()
    return torch.where(known[..., None], entries, 0).unbind(-1)


def token_codes(
    input_ids: Tensor, token_table: Tensor, spec: AddressSpec, segment_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Recognise Semantic IDs in a token stream.

    A token of level l belongs to a SID where the l - 1 tokens before it have the levels 1 .. l - 1 in that order, in
    the same row and, when `segment_ids` is given, in the same segment. Everything else counts as text.

    Args:
        input_ids: integer ``[B, T]``; ids outside 0 .. V - 1 are text.
        token_table: integer ``[V, 2]``, (level, code) of each vocabulary id; level 0 is text.
        segment_ids: integer ``[B, T]``, equal within one packed sequence.

    Returns:
        codes: int64 ``[B, T, L]``, the codes of the SID up to the token, then -1.
        level: int64 ``[B, T]``, the level of the token within its SID, 0 for text.
    """
    token_level, token_code = token_entries(input_ids, token_table)

    level = torch.zeros_like(token_level)
    codes = level.new_full((*level.shape, spec.levels), -1)
    here = token_level == 1
    for l in range(1, spec.levels + 1):
        if l > 1:
            here = _shift(here, False) & (token_level == l)
            if segment_ids is not None:
                here[:, 1:] &= segment_ids[:, 1:] == segment_ids[:, :-1]
            codes = torch.where(here[..., None], _shift(codes, -1), codes)
        codes[..., l - 1] = torch.where(here, token_code, codes[..., l - 1])
        level = torch.where(here, l, level)
    return codes, level


def _shift(x: Tensor, fill: bool | int) -> Tensor:
    """Move every entry one token to the right, `fill` coming in from the left."""
    shifted = torch.full_like(x, fill)
    shifted[:, 1:] = x[:, :-1]
    return shifted


def token_memory(
    input_ids: Tensor, token_table: Tensor, weight: Tensor, spec: AddressSpec, segment_ids: Tensor | None = None
) -> Tensor:
    """`prefix_memory` over a token stream: S at the tokens of active levels, zero everywhere else.

    Returns:
        ``[B, T, H * w]`` in the dtype of `weight`.
    """
    codes, level = token_codes(input_ids, token_table, spec, segment_ids)
    memory = prefix_memory(codes, weight, spec)  # [B, T, A, d]
    out = torch.zeros_like(memory[..., 0, :])
    for a, active in enumerate(spec.active_levels):
        out = torch.where((level == active)[..., None], memory[..., a, :], out)
    return out


def token_row_gradient(
    grad: Tensor, input_ids: Tensor, token_table: Tensor, spec: AddressSpec, segment_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`row_gradient` of `token_memory`: from ``[B, T, H * w]``; rows are those read at tokens of active levels."""
    codes, level = token_codes(input_ids, token_table, spec, segment_ids)
    here = level[..., None] == level.new_tensor(spec.active_levels)  # [B, T, A]
    rows = torch.where(here[..., None, None], _active_rows(codes, spec), -1)
    return _sum_by_row(grad[..., None, :].expand(*here.shape, -1), rows)


def token_memory_backward(
    grad: Tensor, input_ids: Tensor, token_table: Tensor, spec: AddressSpec, segment_ids: Tensor | None = None
) -> Tensor:
    """Gradient of `token_memory` with respect to `weight`: ``[B, T, H * w]`` to ``[R, w]``."""
    return dense_gradient(*token_row_gradient(grad, input_ids, token_table, spec, segment_ids), spec, grad.dtype)
