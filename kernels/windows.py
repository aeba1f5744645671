"""The last token of each of many windows of tokens: S of it, in one launch; what a step of decoding reads."""

from __future__ import annotations

from collections.abc import Hashable

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixmem_fast._launch import Launch, of_a_kind
from prefixmem_fast.addressing import AddressSpec

from .address import address_of
from .forward import load_token_rows, numbers, registers_for
from .tiles import Device, Tile, aligned, blocks, column_tile, current_device, roomy_launch, tile_of
from .tokens import load_codes_before


@triton.jit(do_not_specialize=["M", "T", "V", "stride"], do_not_specialize_on_alignment=["p_ids"])
def window_memory_kernel(
    p_ids,
    p_table,
    p_weight,
    p_scales,
    p_out,
    M,
    T,
    V,
    stride,
    W: tl.constexpr,
    address: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """ids [M, T], rows `stride` apart, table [V, 2] -> out [M, H * W]. Grid: (tiles of BM windows, column tiles)."""
    H: tl.constexpr = address.heads
    ACC: tl.constexpr = tl.float64 if p_weight.dtype.element_ty == tl.float64 else tl.float32
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_m = o_m < M
    o_h, o_w, o_d, m_d = column_tile(tl.program_id(1), H, W, BH, BW)

    o_t = tl.zeros_like(o_m) + (T - 1)
    p_windows = p_ids + o_m * stride
    b_level, b_codes, b_length, b_before = load_codes_before(p_windows, p_table, None, o_t, m_m, V, address)
    b_rows = load_token_rows(p_weight, p_scales, b_level, b_codes, b_length, b_before, o_h, o_w, m_d, W, address)
    b_sum = tl.zeros([BM, BH, BW], ACC)
    for k in tl.static_range(len(b_rows)):
        b_sum = b_sum + numbers(b_rows[k], ACC)
    p_s = p_out + (o_m * (H * W))[:, None, None] + o_d
    tl.store(p_s, b_sum.to(p_out.dtype.element_ty), mask=m_m[:, None, None] & m_d)  # [BM, BH, BW]


@of_a_kind
def _launch_of(device: Device, spec: AddressSpec, W: int, dtype: torch.dtype, *kind: Hashable) -> tuple[Tile, Launch]:
    tile = tile_of(spec.heads, W, dtype, device.settings.decode_bytes)
    options = roomy_launch(device, 4, registers_for(spec, dtype, device.settings))
    return tile, Launch(window_memory_kernel, W, address_of(spec), tile.BM, tile.BH, tile.BW, **options)


def window_memory(
    windows: Tensor, token_table: Tensor, weight: Tensor, spec: AddressSpec, out: Tensor, scales: Tensor | None = None
) -> None:
    """S of the last tokens of windows ``[M, T]``, whose tokens lie side by side, into contiguous ``[M, H * w]``.

    The table is as for `forward.prefix_memory_fwd`.
    """
    (M, T), V, W = windows.shape, token_table.shape[0], weight.shape[1]
    if out.numel():
        dtypes = windows.dtype, token_table.dtype, out.dtype
        alignments = aligned(token_table), aligned(weight), scales is None or aligned(scales), aligned(out)
        narrow = M < 1 << 31, V < 1 << 31, windows.stride(0) < 1 << 31
        tile, launch = _launch_of(current_device(), spec, W, weight.dtype, *dtypes, *alignments, *narrow)
        grid = (blocks(M, tile.BM), tile.columns, 1)
        launch(grid, windows, token_table, weight, scales, out, M, T, V, windows.stride(0))
