"""Backward kernels, fast mode: gradient of S to a dense float32 gradient of the table by relaxed atomics.

    dweight[r] = sum of dS_a[.., h] over all (SID, a, n, h) with row(a, n, h) = r

In prefix mode order n has the same row at every level, so its gradient is the sum over the active levels a >= n: a
reverse running sum over levels, then one row of atomics for each (SID, n, h). Hashes are computed anew from the codes.
The order of the additions varies between runs; `sorted_backward.py` is the mode in which it does not.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixmem_fast._dtypes import accumulator
from prefixmem_fast._launch import Launch, of_a_kind
from prefixmem_fast.addressing import AddressSpec, TokenStream

from .address import address_of, load_sid_codes, order_rows
from .tiles import LAUNCH, Device, Tile, aligned, blocks, column_tile, current_device, tile_of, zero_table
from .tokens import (
    kind_of_stream,
    load_level,
    load_token_codes,
    rank_tokens,
    ranked_tokens,
    token_blocks,
    token_tile,
)


@triton.jit
def scatter_order(
    b_grad,
    p_total,
    b_codes,
    b_length,
    o_h,
    o_w,
    m_d,
    LEVEL: tl.constexpr,
    ORDER: tl.constexpr,
    W: tl.constexpr,
    address: tl.constexpr,
):
    b_row, m_row = order_rows(b_codes, b_length, o_h, LEVEL, ORDER, address)
    p_row = p_total + (b_row * W)[:, :, None] + o_w[None, None, :]
    tl.atomic_add(p_row, b_grad, mask=m_row[:, None, None] & m_d, sem="relaxed")  # [BM, BH, BW]


@triton.jit
def scatter_level(
    b_grad,
    p_total,
    b_codes,
    b_length,
    o_h,
    o_w,
    m_d,
    LEVEL: tl.constexpr,
    W: tl.constexpr,
    address: tl.constexpr,
):
    """Add the gradient [BM, BH, BW] of a level to its rows; in prefix mode, to those of the order that begins at it."""
    N: tl.constexpr = address.orders
    if address.mode == "prefix":
        if LEVEL <= N:
            scatter_order(b_grad, p_total, b_codes, b_length, o_h, o_w, m_d, LEVEL, LEVEL, W, address)
    else:
        if address.slot_of_level[LEVEL - 1] >= 0:
            for n in tl.static_range(1, N + 1):
                if n == LEVEL or (n < LEVEL and address.mode == "suffix"):
                    scatter_order(b_grad, p_total, b_codes, b_length, o_h, o_w, m_d, LEVEL, n, W, address)


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["p_codes"])
def prefix_memory_bwd_kernel(
    p_codes,
    p_grad,
    p_total,
    M,
    W: tl.constexpr,
    address: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """codes [M, L], grad [M, A, H * W] -> total [R, W] += . Grid: (tiles of BM SIDs, column tiles)."""
    A: tl.constexpr = address.active
    H: tl.constexpr = address.heads
    LAST: tl.constexpr = address.last_active
    ACC: tl.constexpr = p_total.dtype.element_ty
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_m = o_m < M
    o_h, o_w, o_d, m_d = column_tile(tl.program_id(1), H, W, BH, BW)

    b_codes, b_length = load_sid_codes(p_codes, o_m, m_m, LAST, address)
    b_sum = tl.zeros([BM, BH, BW], ACC)
    for l in tl.static_range(LAST, 0, -1):
        if address.slot_of_level[l - 1] >= 0:
            p_level = p_grad + ((o_m * A + address.slot_of_level[l - 1]) * (H * W))[:, None, None] + o_d
            b_grad = tl.load(p_level, mask=m_m[:, None, None] & m_d, other=0.0).to(ACC)  # [BM, BH, BW]
            b_sum = b_sum + b_grad if address.mode == "prefix" else b_grad
        scatter_level(b_sum, p_total, b_codes, b_length, o_h, o_w, m_d, l, W, address)


@triton.jit(do_not_specialize=["T", "V"], do_not_specialize_on_alignment=["p_ids", "p_segments"])
def token_memory_bwd_kernel(
    p_ids,
    p_table,
    p_segments,
    p_grad,
    p_total,
    T,
    V,
    W: tl.constexpr,
    address: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """ids [B, T], grad [B, T, H * W] -> total [R, W] += . Grid: (B * tiles of BT tokens of a row, column tiles)."""
    H: tl.constexpr = address.heads
    LAST: tl.constexpr = address.last_active
    ACC: tl.constexpr = p_total.dtype.element_ty
    i_row, o_t = token_tile(T, BT)
    p_ids, p_grad = p_ids + i_row * T, p_grad + i_row * T * (H * W)
    if p_segments is not None:
        p_segments += i_row * T
    o_h, o_w, o_d, m_d = column_tile(tl.program_id(1), H, W, BH, BW)

    b_level = load_level(p_ids, p_table, o_t, o_t < T, V)
    m_first = b_level == 1
    b_rank, n_first = rank_tokens(m_first)
    i_rank = 0
    while i_rank < n_first:
        o_rank = i_rank + tl.arange(0, BM)
        o_sid = ranked_tokens(m_first, b_rank, o_t, o_rank)
        b_codes, b_length, b_n_tokens = load_token_codes(
            p_ids, p_table, p_segments, o_sid, o_rank < n_first, T, V, address
        )
        b_sum = tl.zeros([BM, BH, BW], ACC)
        for l in tl.static_range(LAST, 0, -1):
            if address.slot_of_level[l - 1] >= 0:
                p_level = p_grad + ((o_sid + (l - 1 + address.gap)).to(tl.int64) * (H * W))[:, None, None] + o_d
                b_grad = tl.load(p_level, mask=(b_n_tokens >= l)[:, None, None] & m_d, other=0.0).to(ACC)
                b_sum = b_sum + b_grad if address.mode == "prefix" else b_grad
            scatter_level(b_sum, p_total, b_codes, b_length, o_h, o_w, m_d, l, W, address)
        i_rank += BM


def _total(grad: Tensor, spec: AddressSpec) -> Tensor:
    return zero_table(spec, grad.shape[-1] // spec.heads, accumulator(grad.dtype), grad.device)


@of_a_kind
def _launch_of(
    kernel: Any, device: Device, spec: AddressSpec, W: int, dtype: torch.dtype, *kind: Hashable
) -> tuple[Tile, int, Launch]:
    """The tile, tokens a program in a stream, the launch."""
    tokens = kernel is token_memory_bwd_kernel  # which keeps their ranks beside
    tile = tile_of(spec.heads, W, dtype, device.settings.atomic_bytes // (2 if tokens else 1))
    BT, BM = token_blocks(tile)
    sizes = (BT, BM) if tokens else (tile.BM,)
    return tile, BT, Launch(kernel, W, address_of(spec), *sizes, tile.BH, tile.BW, **LAUNCH)


def prefix_memory_bwd(grad: Tensor, codes: Tensor, spec: AddressSpec) -> Tensor:
    """Dense gradient ``[R, w]`` in the dtype of the contiguous grad ``[M, A, H * w]``."""
    total = _total(grad, spec)
    M, W = codes.shape[0], total.shape[1]
    if grad.numel():
        kind = codes.dtype, aligned(grad), M < 1 << 31
        tile, _, launch = _launch_of(prefix_memory_bwd_kernel, current_device(), spec, W, grad.dtype, *kind)
        launch((blocks(M, tile.BM), tile.columns, 1), codes, grad, total, M)
    return total.to(grad.dtype)


def token_memory_bwd(grad: Tensor, stream: TokenStream, spec: AddressSpec) -> Tensor:
    """Dense gradient ``[R, w]`` in the dtype of the contiguous grad ``[B, T, H * w]``."""
    total = _total(grad, spec)
    (B, T), W = stream.input_ids.shape, total.shape[1]
    if grad.numel():
        kind = kind_of_stream(stream), aligned(grad)
        tile, BT, launch = _launch_of(token_memory_bwd_kernel, current_device(), spec, W, grad.dtype, *kind)
        launch((B * blocks(T, BT), tile.columns, 1), *stream, grad, total, T, stream.token_table.shape[0])
    return total.to(grad.dtype)
