"""Forward kernels: codes, or a token stream, to S in one launch.

    S_a = sum over n of concat_h weight[row(a, n, h)]        for each active level a

In prefix mode order n has the same row at every level, so S_a = S_{a-1} + e_a: one running sum in float32 registers,
N * H rows read a SID, each active level stored as it is reached.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixmem_fast.addressing import AddressSpec, TokenStream

from .address import address_of, load_sid_codes, order_rows
from .tiles import LAUNCH, blocks, column_tile, tile_of
from .tokens import (
    load_level,
    load_token_codes,
    rank_tokens,
    ranked_tokens,
    stands_at_active_level,
    token_blocks,
    token_tile,
)


@triton.jit
def add_order(
    b_sum,
    p_weight,
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
    """b_sum [BM, BH, BW] plus the rows of one order."""
    b_row, m_row = order_rows(b_codes, b_length, o_h, LEVEL, ORDER, address)
    p_row = p_weight + (b_row * W)[:, :, None] + o_w[None, None, :]
    return b_sum + tl.load(p_row, mask=m_row[:, None, None] & m_d, other=0.0).to(b_sum.dtype)  # [BM, BH, BW]


@triton.jit
def add_level(
    b_sum,
    p_weight,
    b_codes,
    b_length,
    o_h,
    o_w,
    m_d,
    LEVEL: tl.constexpr,
    W: tl.constexpr,
    address: tl.constexpr,
):
    """S of a level from S of the level before: in prefix mode one order more, otherwise a sum of its own."""
    N: tl.constexpr = address.orders
    if address.mode == "prefix":
        if LEVEL <= N:
            b_sum = add_order(b_sum, p_weight, b_codes, b_length, o_h, o_w, m_d, LEVEL, LEVEL, W, address)
    else:
        if address.slot_of_level[LEVEL - 1] >= 0:
            b_sum = tl.zeros_like(b_sum)
            for n in tl.static_range(1, N + 1):
                if n == LEVEL or (n < LEVEL and address.mode == "suffix"):
                    b_sum = add_order(b_sum, p_weight, b_codes, b_length, o_h, o_w, m_d, LEVEL, n, W, address)
    return b_sum


@triton.jit(do_not_specialize=["M"])
def prefix_memory_fwd_kernel(
    p_codes,
    p_weight,
    p_out,
    M,
    W: tl.constexpr,
    address: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """codes [M, L], weight [R, W] -> out [M, A, H * W]. Grid: (tiles of BM SIDs, column tiles)."""
    A: tl.constexpr = address.active
    H: tl.constexpr = address.heads
    LAST: tl.constexpr = address.last_active
    ACC: tl.constexpr = tl.float64 if p_weight.dtype.element_ty == tl.float64 else tl.float32
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_m = o_m < M
    o_h, o_w, o_d, m_d = column_tile(tl.program_id(1), H, W, BH, BW)

    b_codes, b_length = load_sid_codes(p_codes, o_m, m_m, LAST, address)
    b_sum = tl.zeros([BM, BH, BW], ACC)
    for l in tl.static_range(1, LAST + 1):
        b_sum = add_level(b_sum, p_weight, b_codes, b_length, o_h, o_w, m_d, l, W, address)
        if address.slot_of_level[l - 1] >= 0:
            p_level = p_out + ((o_m * A + address.slot_of_level[l - 1]) * (H * W))[:, None, None] + o_d
            tl.store(p_level, b_sum.to(p_out.dtype.element_ty), mask=m_m[:, None, None] & m_d)  # [BM, BH, BW]


@triton.jit(do_not_specialize=["T", "V"])
def token_memory_fwd_kernel(
    p_ids,
    p_table,
    p_segments,
    p_weight,
    p_out,
    T,
    V,
    W: tl.constexpr,
    address: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """ids [B, T], table [V, 2] -> out [B, T, H * W]. Grid: (B * tiles of BT tokens of a row, column tiles).

    A program owns the SIDs that begin in its tile and follows them past the tile's end. It compacts them, BM at a
    time, so that lanes hold SIDs and not text. The other tokens of its tile it writes zero.
    """
    H: tl.constexpr = address.heads
    LAST: tl.constexpr = address.last_active
    ACC: tl.constexpr = tl.float64 if p_weight.dtype.element_ty == tl.float64 else tl.float32
    i_row, o_t = token_tile(T, BT)
    p_ids, p_out = p_ids + i_row * T, p_out + i_row * T * (H * W)
    if p_segments is not None:
        p_segments += i_row * T
    o_h, o_w, o_d, m_d = column_tile(tl.program_id(1), H, W, BH, BW)

    b_zero = tl.zeros([BM, BH, BW], p_out.dtype.element_ty)
    m_zero = (o_t < T) & ~stands_at_active_level(p_ids, p_table, p_segments, o_t, o_t < T, V, address)
    b_rank, n_zero = rank_tokens(m_zero)
    i_rank = 0
    while i_rank < n_zero:
        o_rank = i_rank + tl.arange(0, BM)
        o_zero = ranked_tokens(m_zero, b_rank, o_t, o_rank)
        p_zero = p_out + (o_zero.to(tl.int64) * (H * W))[:, None, None] + o_d
        tl.store(p_zero, b_zero, mask=(o_rank < n_zero)[:, None, None] & m_d)  # [BM, BH, BW]
        i_rank += BM

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
        for l in tl.static_range(1, LAST + 1):
            b_sum = add_level(b_sum, p_weight, b_codes, b_length, o_h, o_w, m_d, l, W, address)
            if address.slot_of_level[l - 1] >= 0:
                p_level = p_out + ((o_sid + (l - 1)).to(tl.int64) * (H * W))[:, None, None] + o_d
                tl.store(p_level, b_sum.to(p_out.dtype.element_ty), mask=(b_n_tokens >= l)[:, None, None] & m_d)
        i_rank += BM


# At 4 warps: 16 float32 sums a thread, two SIDs of 256 bfloat16 a warp.
BUDGET = 8192


def prefix_memory_fwd(codes: Tensor, weight: Tensor, spec: AddressSpec) -> Tensor:
    """S ``[M, A, H * w]`` of contiguous codes ``[M, L]`` and weight ``[R, w]``."""
    M, W = codes.shape[0], weight.shape[1]
    out = torch.empty((M, len(spec.active_levels), spec.heads * W), dtype=weight.dtype, device=weight.device)
    if out.numel():
        tile = tile_of(spec.heads, W, weight.dtype, BUDGET)
        grid = (blocks(M, tile.BM), tile.columns)
        prefix_memory_fwd_kernel[grid](codes, weight, out, M, W, address_of(spec), tile.BM, tile.BH, tile.BW, **LAUNCH)
    return out


def token_memory_fwd(stream: TokenStream, weight: Tensor, spec: AddressSpec) -> Tensor:
    """S ``[B, T, H * w]`` of a contiguous token stream ``[B, T]``."""
    input_ids, token_table, segment_ids = stream
    (B, T), W = input_ids.shape, weight.shape[1]
    out = torch.empty((B, T, spec.heads * W), dtype=weight.dtype, device=weight.device)
    if out.numel():
        tile = tile_of(spec.heads, W, weight.dtype, BUDGET)
        BT, BM = token_blocks(tile)
        grid = (B * blocks(T, BT), tile.columns)
        token_memory_fwd_kernel[grid](
            input_ids,
            token_table,
            segment_ids,
            weight,
            out,
            T,
            token_table.shape[0],
            W,
            address_of(spec),
            BT,
            BM,
            tile.BH,
            tile.BW,
            **LAUNCH,
        )
    return out
