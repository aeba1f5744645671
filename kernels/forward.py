"""Forward kernels: codes, or a token stream, to S in one launch.

    S_a = sum over n of concat_h weight[row(a, n, h)]        for each active level a

In prefix mode order n has the same row at every level, so S_a = S_{a-1} + e_a: one running sum in float32 registers,
N * H rows read a SID, each active level stored as it is reached. Of a quantized table a row is its values times its
scale, in float32.
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
from .settings import Settings
from .tiles import Device, Tile, aligned, blocks, column_tile, current_device, roomy_launch, tile_of
from .tokens import kind_of_stream, last_codes, load_codes_before, token_tile


@triton.jit
def load_order(
    p_weight,
    p_scales,
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
    """Rows of one order as they are stored: a tuple of [BM, BH, BW] and, of a quantized table, scales [BM, BH]."""
    b_row, m_row = order_rows(b_codes, b_length, o_h, LEVEL, ORDER, address)
    p_row = p_weight + (b_row * W)[:, :, None] + o_w[None, None, :]
    b_stored = (tl.load(p_row, mask=m_row[:, None, None] & m_d, other=0.0),)  # [BM, BH, BW]
    if p_scales is not None:
        m_scale = m_row[:, None] & (o_h < address.heads)[None, :]
        b_stored = b_stored + (tl.load(p_scales + b_row, mask=m_scale, other=0.0),)  # [BM, BH]
    return b_stored


@triton.jit
def numbers(b_stored, ACC: tl.constexpr):
    """What `load_order` returned, as numbers [BM, BH, BW] of the accumulator's dtype.

    8 bits become float32 by integer operations. Of int8 a conversion would be the same, but it is slow, and ptxas gives
    it more registers than there are; e4m3 is no type of every GPU's.
    """
    b_values = b_stored[0]
    if len(b_stored) == 1:
        b_row = b_values.to(ACC)
    else:
        b_scale = b_stored[1]
        if b_values.dtype == tl.int8:  # the last bits of a float32 from 2^23 on are its units
            b_bits = (b_values.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.int32) | 0x4B000000
            b_values = b_bits.to(tl.float32, bitcast=True) - (8388608.0 + 128.0)
        else:  # seven zeros behind e4m3's bits, and one behind its sign, make a float16 of 1/256 of it
            b_bits = (b_values.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -0x4001
            b_values, b_scale = b_bits.to(tl.float16, bitcast=True).to(tl.float32), b_scale * 256
        b_row = b_values * b_scale[:, :, None]
    return b_row


@triton.jit
def load_nested(
    p_weight,
    p_scales,
    b_codes,
    b_length,
    o_h,
    o_w,
    m_d,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    W: tl.constexpr,
    address: tl.constexpr,
):
    """In prefix mode, `load_order` of every order that the levels FIRST .. LAST add, before one is summed."""
    b_rows = ()
    if address.mode == "prefix":
        for n in tl.static_range(FIRST, LAST + 1):
            if n <= address.orders:
                b_rows = b_rows + (load_order(p_weight, p_scales, b_codes, b_length, o_h, o_w, m_d, n, n, W, address),)
    return b_rows


@triton.jit
def add_level(
    b_sum,
    b_nested,
    p_weight,
    p_scales,
    b_codes,
    b_length,
    o_h,
    o_w,
    m_d,
    LEVEL: tl.constexpr,
    FIRST: tl.constexpr,
    W: tl.constexpr,
    address: tl.constexpr,
):
    """S of a level: in prefix mode S of the level before and one order more, of `load_nested` from FIRST on; otherwise
    a sum of its own, whose rows are all loaded before one is summed."""
    N: tl.constexpr = address.orders
    if address.mode == "prefix":
        if LEVEL <= N:
            b_sum = b_sum + numbers(b_nested[LEVEL - FIRST], b_sum.dtype)
    else:
        if address.slot_of_level[LEVEL - 1] >= 0:
            b_rows = ()
            for n in tl.static_range(1, N + 1):
                if n == LEVEL or (n < LEVEL and address.mode == "suffix"):
                    b_row = load_order(p_weight, p_scales, b_codes, b_length, o_h, o_w, m_d, LEVEL, n, W, address)
                    b_rows = b_rows + (b_row,)
            b_sum = tl.zeros_like(b_sum)
            for k in tl.static_range(len(b_rows)):
                b_sum = b_sum + numbers(b_rows[k], b_sum.dtype)
    return b_sum


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["p_codes"])
def prefix_memory_fwd_kernel(
    p_codes,
    p_weight,
    p_scales,
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
    b_nested = load_nested(p_weight, p_scales, b_codes, b_length, o_h, o_w, m_d, 1, LAST, W, address)
    b_sum = tl.zeros([BM, BH, BW], ACC)
    for l in tl.static_range(1, LAST + 1):
        b_sum = add_level(b_sum, b_nested, p_weight, p_scales, b_codes, b_length, o_h, o_w, m_d, l, 1, W, address)
        if address.slot_of_level[l - 1] >= 0:
            p_level = p_out + ((o_m * A + address.slot_of_level[l - 1]) * (H * W))[:, None, None] + o_d
            tl.store(p_level, b_sum.to(p_out.dtype.element_ty), mask=m_m[:, None, None] & m_d)  # [BM, BH, BW]


@triton.jit
def load_token_rows(
    p_weight, p_scales, b_level, b_codes, b_length, b_before, o_h, o_w, m_d, W: tl.constexpr, address: tl.constexpr
):
    """Rows of every order at tokens of levels [BM]: a tuple of what `load_order` returns."""
    LAST: tl.constexpr = address.last_active
    b_rows = ()
    for n in tl.static_range(1, address.orders + 1):
        if n <= LAST:
            if address.mode == "prefix":
                b_rows = b_rows + (load_order(p_weight, p_scales, b_codes, b_length, o_h, o_w, m_d, n, n, W, address),)
            elif address.mode == "full":
                if address.rows[n - 1] > 0:  # in a window of two items the first orders hold none
                    b_here = tl.where(b_level == n, b_length, 0)
                    b_row = load_order(p_weight, p_scales, b_codes, b_here, o_h, o_w, m_d, n, n, W, address)
                    b_rows = b_rows + (b_row,)
            else:
                m_whole = (b_level >= n) & (b_length == b_level)
                b_here = tl.where(m_whole, n, 0)
                b_last = last_codes(b_before, m_whole, n, address)
                b_rows = b_rows + (load_order(p_weight, p_scales, b_last, b_here, o_h, o_w, m_d, n, n, W, address),)
    return b_rows


@triton.jit(do_not_specialize=["T", "V"], do_not_specialize_on_alignment=["p_ids", "p_segments"])
def token_memory_fwd_kernel(
    p_ids,
    p_table,
    p_segments,
    p_weight,
    p_scales,
    p_out,
    T,
    V,
    W: tl.constexpr,
    address: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """ids [B, T], table [V, 2] -> out [B, T, H * W]. Grid: (B * tiles of BM tokens of a row, column tiles).

    Every token by itself: it looks back for the codes before it, and reads the rows of all its orders. The rows that
    the levels of one SID share come from the first-level cache, since its tokens stand side by side.
    """
    H: tl.constexpr = address.heads
    ACC: tl.constexpr = tl.float64 if p_weight.dtype.element_ty == tl.float64 else tl.float32
    i_row, o_t = token_tile(T, BM)
    p_ids, p_out = p_ids + i_row * T, p_out + i_row * T * (H * W)
    if p_segments is not None:
        p_segments += i_row * T
    o_h, o_w, o_d, m_d = column_tile(tl.program_id(1), H, W, BH, BW)

    b_level, b_codes, b_length, b_before = load_codes_before(p_ids, p_table, p_segments, o_t, o_t < T, V, address)
    b_rows = load_token_rows(p_weight, p_scales, b_level, b_codes, b_length, b_before, o_h, o_w, m_d, W, address)
    b_sum = tl.zeros([BM, BH, BW], ACC)
    for k in tl.static_range(len(b_rows)):
        b_sum = b_sum + numbers(b_rows[k], ACC)
    p_token = p_out + (o_t.to(tl.int64) * (H * W))[:, None, None] + o_d
    tl.store(p_token, b_sum.to(p_out.dtype.element_ty), mask=(o_t < T)[:, None, None] & m_d)  # [BM, BH, BW]


def registers_for(spec: AddressSpec, dtype: torch.dtype, settings: Settings) -> int:
    """A limit that lets the rows of all orders be in flight at once. Without one ptxas sums as it loads, to save
    registers that no further warp could use."""
    elements = settings.forward_bytes // accumulator(dtype).itemsize // (32 * settings.forward_warps)  # a thread
    row = elements * dtype.itemsize // 4 * min(spec.max_order, spec.levels)
    return 64 if row <= 32 and not address_of(spec).wide else 128 if row <= 64 else 255


@of_a_kind
def _launch_of(
    kernel: Any, device: Device, spec: AddressSpec, W: int, dtype: torch.dtype, *kind: Hashable
) -> tuple[Tile, Launch]:
    tile = tile_of(spec.heads, W, dtype, device.settings.forward_bytes)
    options = roomy_launch(device, device.settings.forward_warps, registers_for(spec, dtype, device.settings))
    return tile, Launch(kernel, W, address_of(spec), tile.BM, tile.BH, tile.BW, **options)


def prefix_memory_fwd(
    codes: Tensor, weight: Tensor, spec: AddressSpec, scales: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """S ``[M, A, H * w]`` of contiguous codes ``[M, L]`` and weight ``[R, w]``; of a quantized table, whose values are
    int8 or the bits of e4m3 in uint8, with the scales ``[R]`` and in `dtype`."""
    M, W = codes.shape[0], weight.shape[1]
    out = weight.new_empty(M, len(spec.active_levels), spec.heads * W, dtype=dtype)
    if out.numel():
        kind = codes.dtype, aligned(weight), scales is None or aligned(scales), out.dtype, M < 1 << 31
        tile, launch = _launch_of(prefix_memory_fwd_kernel, current_device(), spec, W, weight.dtype, *kind)
        launch((blocks(M, tile.BM), tile.columns, 1), codes, weight, scales, out, M)
    return out


def token_memory_fwd(
    stream: TokenStream,
    weight: Tensor,
    spec: AddressSpec,
    scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """S ``[B, T, H * w]`` of a contiguous token stream ``[B, T]``; the table as for `prefix_memory_fwd`."""
    input_ids, token_table, _ = stream
    (B, T), W = input_ids.shape, weight.shape[1]
    out = weight.new_empty(B, T, spec.heads * W, dtype=dtype)
    if out.numel():
        kind = kind_of_stream(stream), aligned(weight), scales is None or aligned(scales), out.dtype
        tile, launch = _launch_of(token_memory_fwd_kernel, current_device(), spec, W, weight.dtype, *kind)
        grid = (B * blocks(T, tile.BM), tile.columns, 1)
        launch(grid, *stream, weight, scales, out, T, token_table.shape[0])
    return out
