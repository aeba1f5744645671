"""One token of each sequence: the state of a SID under way moves on by a level, and S comes out, in one launch.

In prefix mode S_l = S_{l-1} + e_l, so a step reads the H rows of order l and the sum of the level before.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixmem_fast._launch import Launch, of_a_kind
from prefixmem_fast.addressing import AddressSpec

from .address import address_of, append_code
from .forward import add_level, load_nested
from .settings import SETTINGS
from .tiles import Device, Tile, aligned, blocks, column_tile, current_device, roomy_launch, tile_of
from .tokens import load_token


@triton.jit(do_not_specialize=["B", "V"], do_not_specialize_on_alignment=["p_ids", "p_codes", "p_level"])
def token_step_kernel(
    p_ids,
    p_table,
    p_weight,
    p_scales,
    p_codes,
    p_level,
    p_total,
    p_out,
    B,
    V,
    W: tl.constexpr,
    address: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """ids [B] -> out [B, H * W], and the state in place. Grid: (tiles of BM sequences, column tiles).

    Codes [tiles, B, L] and levels [tiles, B] are there once a column tile: every program reads what it alone writes.
    """
    L: tl.constexpr = address.levels
    H: tl.constexpr = address.heads
    LAST: tl.constexpr = address.last_active
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    m_m = o_m < B
    o_h, o_w, o_d, m_d = column_tile(tl.program_id(1), H, W, BH, BW)
    o_state = tl.program_id(1).to(tl.int64) * B + o_m

    b_level, b_code = load_token(p_ids, p_table, o_m, m_m, V)  # [BM]
    b_before = tl.load(p_level + o_state, mask=m_m, other=0).to(tl.int32)  # [BM]
    b_level = tl.where((b_level == 1) | (b_level == b_before + 1), b_level, 0)
    b_old = ()
    for l in tl.static_range(1, L + 1):
        b_old = b_old + (tl.load(p_codes + o_state * L + (l - 1), mask=m_m & (b_level > l), other=-1),)  # [BM]
    p_sum = p_total + (o_m.to(tl.int64) * (H * W))[:, None, None] + o_d
    m_sum = m_m[:, None, None] & m_d
    b_sum = tl.load(p_sum, mask=m_sum & (b_level > 1)[:, None, None], other=0.0)  # [BM, BH, BW]
    tl.debug_barrier()  # every warp loads the state, and one stores it: a late warp must not read what comes next
    tl.store(p_level + o_state, b_level.to(tl.int64), mask=m_m)  # [BM]
    b_codes = ()
    b_length = tl.zeros_like(b_level)
    m_active = tl.zeros_like(m_m)
    for l in tl.static_range(1, L + 1):
        b_new = tl.where(b_level == l, b_code.to(tl.int64), b_old[l - 1])
        tl.store(p_codes + o_state * L + (l - 1), b_new, mask=m_m)  # [BM]
        if l <= LAST:
            b_codes, b_length = append_code(b_codes, b_length, b_new, l, address)
            b_here = tl.where(b_level == l, b_length, 0)  # other sequences read no row
            b_nested = load_nested(p_weight, p_scales, b_codes, b_here, o_h, o_w, m_d, l, l, W, address)
            b_next = add_level(b_sum, b_nested, p_weight, p_scales, b_codes, b_here, o_h, o_w, m_d, l, l, W, address)
            b_sum = tl.where((b_level == l)[:, None, None], b_next, b_sum)
            if address.slot_of_level[l - 1] >= 0:
                m_active = m_active | (b_level == l)
    tl.store(p_sum, b_sum, mask=m_sum)  # [BM, BH, BW]
    b_out = tl.where(m_active[:, None, None], b_sum, 0.0)
    p_s = p_out + (o_m.to(tl.int64) * (H * W))[:, None, None] + o_d
    tl.store(p_s, b_out.to(p_out.dtype.element_ty), mask=m_sum)  # [BM, BH, BW]


def column_tiles(weight: Tensor, spec: AddressSpec) -> int:
    return tile_of(spec.heads, weight.shape[1], weight.dtype, current_device().settings.decode_bytes).columns


@of_a_kind
def _launch_of(
    device: Device, spec: AddressSpec, W: int, dtype: torch.dtype, copies: int, *kind: Hashable
) -> tuple[Tile, Launch]:
    """A tile of as many columns as the state has copies, whatever the settings were when it was made."""
    sizes = device.settings.decode_bytes, *SETTINGS["decode_bytes"].candidates
    tiles = [tile_of(spec.heads, W, dtype, size) for size in sizes]
    tile = next((tile for tile in tiles if tile.columns == copies), None)
    if tile is None:
        raise ValueError(f"the state has {copies} copies of its codes; make it with as many as state_copies says")
    return tile, Launch(token_step_kernel, W, address_of(spec), tile.BM, tile.BH, tile.BW, **roomy_launch(device, 4))


def token_step(
    ids: Tensor,
    token_table: Tensor,
    codes: Tensor,
    level: Tensor,
    total: Tensor,
    weight: Tensor,
    spec: AddressSpec,
    scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """S ``[B, H * w]`` after one more token ``[B]``; codes ``[tiles, B, L]``, level ``[tiles, B]`` and total change.

    The table is as for `forward.prefix_memory_fwd`.
    """
    B, V, W = ids.shape[0], token_table.shape[0], weight.shape[1]
    out = weight.new_empty(B, spec.heads * W, dtype=dtype)
    if out.numel():
        dtypes = ids.dtype, token_table.dtype, codes.dtype, level.dtype, total.dtype, out.dtype
        alignments = aligned(token_table), aligned(weight), scales is None or aligned(scales), aligned(total)
        narrow = B < 1 << 31, V < 1 << 31
        kind = *dtypes, *alignments, *narrow
        tile, launch = _launch_of(current_device(), spec, W, weight.dtype, codes.shape[0], *kind)
        grid = (blocks(B, tile.BM), tile.columns, 1)
        launch(grid, ids, token_table, weight, scales, codes, level, total, out, B, V)
    return out
