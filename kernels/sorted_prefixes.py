"""Sums over the prefixes of sorted SIDs, and their rows written: in blocks, then over the edges of the blocks.

Equal counts of consecutive places make a block, whatever their prefixes, so a hot prefix costs no more than a cold one.
A lane walks its block, reads each SID's gradient once and adds it to one running sum an order. Where a run ends, its
row is written; the sum of a run that shares its row is put aside (see `shared_rows.py`). A run that goes over an edge
leaves a partial sum in each of its blocks: the block in which it begins adds them up, in their order. No atomics: the
same input gives the same bits.

A turn of the walk waits for nothing that it asks for: where the next runs go it has read two turns before, their rows,
states and gradients one turn before. Masks alone decide what is read and written. A branch, or a barrier between warps,
would make every turn wait for memory.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixmem_fast._dtypes import accumulator
from prefixmem_fast._launch import Launch, of_a_kind
from prefixmem_fast.addressing import AddressSpec

from .address import address_of
from .aside import put_aside, room_for_sums, take_aside
from .sorted_codes import Prefixes, SortPlan
from .tiles import (
    MOST_WARPS,
    Device,
    Tile,
    aligned,
    blocks,
    column_tile,
    roomy_launch,
    tile_of,
    warp_bytes,
)
from .update import Ending, Epilogue, load_numbers, load_rows, store_squares, write_rows

TENSORS = {"row_adam": 2, "lazy_adam": 3}  # of the table's shape that an update reads
LONGEST = 32  # places a block


def block_of(sids: int, enough: int) -> int:
    """Places a block: so short that there are `enough` blocks, no shorter, as each block leaves partial sums."""
    block = LONGEST
    while block > 4 and sids < enough * block:
        block //= 2
    return block


@triton.jit
def load_place(p_sids, p_counts, p_differs, p_targets, i, m_i, o_h, plan: tl.constexpr, address: tl.constexpr):
    """Of the i-th places of blocks: the SID, its tokens, `differs` behind it, the targets [BB, BH] of every order."""
    H: tl.constexpr = address.heads
    J: tl.constexpr = len(plan.orders)
    b_sid = tl.load(p_sids + i, mask=m_i, other=-1)  # [BB]
    b_count = b_sid
    if p_counts is not None:
        b_count = tl.load(p_counts + i, mask=m_i, other=0)  # [BB]
    b_next = tl.load(p_differs + (i + 1), mask=m_i, other=1).to(tl.int32)  # [BB]
    m_h = m_i[:, None] & (o_h < H)[None, :]
    b_targets = ()
    for j in tl.static_range(J):
        p_target = (p_targets + i * (J * H))[:, None] + (o_h + j * H)[None, :]
        b_targets = b_targets + (tl.load(p_target, mask=m_h, other=-1),)  # [BB, BH]
    return b_sid, b_count, b_next, b_targets


@triton.jit
def load_runs(destination, b_targets, o_w, W: tl.constexpr, plan: tl.constexpr, epilogue: tl.constexpr):
    """What the updates read of the runs that end at places: of every order what `load_rows` gives."""
    b_reads = ()
    for j in tl.static_range(len(plan.orders)):
        if j < plan.n_claimed or j >= plan.n_aside:
            b_reads = b_reads + (load_rows(destination, b_targets[j], b_targets[j] >= 0, o_w, W, epilogue),)
        else:
            b_reads = b_reads + ((),)
    return b_reads


@triton.jit
def load_gradients(p_grad, p_counts, b_sid, b_count, o_d, m_d, W: tl.constexpr, address: tl.constexpr):
    """Gradients [BB, BH, BW] of SIDs at each active level, the last one first, as they are stored."""
    A: tl.constexpr = address.active
    H: tl.constexpr = address.heads
    LAST: tl.constexpr = address.last_active
    b_grads = ()
    for l in tl.static_range(LAST, 0, -1):
        if address.slot_of_level[l - 1] >= 0:
            m_level = b_sid >= 0
            if p_counts is not None:  # a token stream: the level's gradient stands at the SID's l-th token
                m_level = m_level & (b_count >= l)
                o_vector = b_sid.to(tl.int64) + (l - 1 + address.gap)
            else:
                o_vector = b_sid.to(tl.int64) * A + address.slot_of_level[l - 1]
            p_level = p_grad + (o_vector * (H * W))[:, None, None] + o_d
            b_grads = b_grads + (tl.load(p_level, mask=m_level[:, None, None] & m_d, other=0.0),)  # [BB, BH, BW]
    return b_grads


@triton.jit
def add_gradients(b_sums, b_grads, plan: tl.constexpr, address: tl.constexpr):
    """Running sums, one an order, plus SIDs' gradients: order n takes level n and, in prefix mode, those above."""
    A: tl.constexpr = address.active
    LAST: tl.constexpr = address.last_active
    b_level = tl.zeros_like(b_sums[0])
    for l in tl.static_range(LAST, 0, -1):
        if address.slot_of_level[l - 1] >= 0:
            b_grad = b_grads[A - 1 - address.slot_of_level[l - 1]].to(b_level.dtype)
            b_level = b_level + b_grad if address.mode == "prefix" else b_grad
        b_new = ()
        for j in tl.static_range(len(plan.orders)):
            b_new = b_new + (b_sums[j] + b_level if plan.orders[j] == l else b_sums[j],)
        b_sums = b_new
    return b_sums


@triton.jit(do_not_specialize=["E", "BLOCK"])
def sum_prefixes_kernel(
    p_sids,
    p_counts,
    p_differs,
    p_targets,
    p_grad,
    p_aside,
    p_edges,
    destination,
    E,
    BLOCK,
    W: tl.constexpr,
    plan: tl.constexpr,
    address: tl.constexpr,
    epilogue: tl.constexpr,
    BB: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """Sum the runs of every order over places [E]; write those that lie in one block. Grid: (tiles of BB blocks, column
    tiles).

    aside [E, n_aside, H, W] receives the sums of runs that share their rows. edges [blocks, 2, orders, H, W] receives
    what a block has of the run that came over its left edge, and what it has of the run that goes over its right one.
    """
    H: tl.constexpr = address.heads
    C: tl.constexpr = plan.n_aside
    J: tl.constexpr = len(plan.orders)
    D: tl.constexpr = H * W
    ACC: tl.constexpr = tl.float64 if p_edges.dtype.element_ty == tl.float64 else tl.float32
    i_block = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    o_h, o_w, o_d, m_d = column_tile(tl.program_id(1), H, W, BH, BW)
    o_first = i_block * BLOCK
    n_places = tl.maximum(tl.minimum(E - o_first, BLOCK), 0).to(tl.int32)  # [BB]
    p_sids, p_differs, p_targets = p_sids + o_first, p_differs + o_first, p_targets + o_first * (J * H)
    if p_counts is not None:
        p_counts += o_first
    p_aside = p_aside + (o_first * (C * D))[:, None, None] + o_d
    p_edge = p_edges + (i_block * (2 * J * D))[:, None, None] + o_d
    half_aside, half_edges = E.to(tl.int64) * (C * D), tl.cdiv(E, BLOCK).to(tl.int64) * (2 * J * D)

    numbers = load_numbers(destination, ACC, epilogue)
    b_sums = ()
    for _j in tl.static_range(J):
        b_sums = b_sums + (tl.zeros([BB, BH, BW], ACC),)
    b_squares = tl.zeros([BB, BH], ACC)
    # Least of `differs` up to here: above an order, its run came over the edge. Before the first place it is 1.
    b_least = tl.load(p_differs, mask=n_places > 0, other=1).to(tl.int32)  # [BB]
    b_sid, b_count, b_next, b_targets = load_place(
        p_sids, p_counts, p_differs, p_targets, 0, n_places > 0, o_h, plan, address
    )
    b_sid1, b_count1, b_next1, b_targets1 = load_place(
        p_sids, p_counts, p_differs, p_targets, 1, n_places > 1, o_h, plan, address
    )
    b_reads = load_runs(destination, b_targets, o_w, W, plan, epilogue)
    b_grads = load_gradients(p_grad, p_counts, b_sid, b_count, o_d, m_d, W, address)
    i = 0
    n_walk = tl.minimum(BLOCK, E - tl.program_id(0) * (BB * BLOCK))
    while i < n_walk:
        b_sid2, b_count2, b_next2, b_targets2 = load_place(
            p_sids, p_counts, p_differs, p_targets, i + 2, n_places > i + 2, o_h, plan, address
        )
        b_reads1 = load_runs(destination, b_targets1, o_w, W, plan, epilogue)
        b_grads1 = load_gradients(p_grad, p_counts, b_sid1, b_count1, o_d, m_d, W, address)

        b_sums = add_gradients(b_sums, b_grads, plan, address)
        b_kept = ()
        for j in tl.static_range(J):
            b_sum, b_target = b_sums[j], b_targets[j]
            m_end = b_next <= plan.orders[j]
            m_open = b_least > plan.orders[j]
            if j < plan.n_claimed or j >= C:
                m_row = (b_target >= 0) & ~m_open[:, None]
                b_new = write_rows(destination, numbers, b_reads[j], b_target, b_sum, m_row, o_w, W, epilogue)
                b_squares += tl.where(m_row, b_new, 0.0)
            if j < C:
                m_shared = (b_target <= -2) & ~m_open[:, None]
                put_aside(p_aside + (i * C + j) * D, b_sum, m_shared[:, :, None] & m_d, half_aside)
            put_aside(p_edge + j * D, b_sum, (m_end & m_open)[:, None, None] & m_d, half_edges)
            b_kept = b_kept + (tl.where(m_end[:, None, None], 0.0, b_sum),)
        b_sums = b_kept
        b_least = tl.minimum(b_least, b_next)
        b_sid, b_count, b_next, b_targets, b_reads, b_grads = b_sid1, b_count1, b_next1, b_targets1, b_reads1, b_grads1
        b_sid1, b_count1, b_next1, b_targets1 = b_sid2, b_count2, b_next2, b_targets2
        i += 1

    b_end = tl.load(p_differs + n_places, mask=n_places > 0, other=1).to(tl.int32)  # [BB]
    for j in tl.static_range(J):  # a run that fills the whole block stays on the left
        m_on, m_open = b_end > plan.orders[j], b_least > plan.orders[j]
        put_aside(p_edge + j * D, b_sums[j], (m_on & m_open)[:, None, None] & m_d, half_edges)
        put_aside(p_edge + (J + j) * D, b_sums[j], (m_on & ~m_open)[:, None, None] & m_d, half_edges)
    store_squares(destination, b_squares)


@triton.jit
def sum_over_edges(
    p_differs,
    p_edges,
    i_block,
    E,
    BLOCK,
    half,
    order,
    b_sum,
    o_d,
    m_d,
    STEP: tl.constexpr,
    BK: tl.constexpr,
    LONGEST: tl.constexpr,
):
    """b_sum [1, BH, BW] plus what the blocks behind i_block have of its last run, BK of them at a time; and the place
    at which the run ends. STEP is from the partial sums of one block to those of the next."""
    o_t = tl.arange(0, LONGEST)
    i_next = i_block + 1
    i_place = i_block * 0
    n_going = 1
    while n_going > 0:
        o_k = i_next + tl.arange(0, BK)
        o_place = (o_k * BLOCK)[:, None] + o_t[None, :]
        m_place = (o_t < BLOCK)[None, :] & (o_place < E)
        b_differs = tl.load(p_differs + o_place + 1, mask=m_place, other=0x7FFF)  # [BK, LONGEST]
        b_place = tl.min(tl.where(m_place & (b_differs <= order), o_place, E), 1)  # where the run ends, E if it goes on
        m_end = b_place < E
        b_ended = tl.cumsum(m_end.to(tl.int32), 0) - m_end.to(tl.int32)
        m_k = (o_k * BLOCK < E) & (b_ended == 0)
        p_edge = p_edges + (o_k * STEP)[:, None, None] + o_d
        b_sum += tl.sum(take_aside(p_edge, m_k[:, None, None] & m_d, half), 0)[None, :, :]  # [BK, BH, BW]
        i_place = tl.min(b_place, 0)
        n_going = (i_place >= E).to(tl.int32)
        i_next += BK
    return b_sum, i_place


@triton.jit(do_not_specialize=["E", "BLOCK"])
def sum_edges_kernel(
    p_differs,
    p_targets,
    p_aside,
    p_edges,
    destination,
    E,
    BLOCK,
    W: tl.constexpr,
    plan: tl.constexpr,
    address: tl.constexpr,
    epilogue: tl.constexpr,
    LONGEST: tl.constexpr,
    BK: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """Write runs that reach over edges, each by the block in which it begins. Grid: (blocks, column tiles, orders)."""
    H: tl.constexpr = address.heads
    C: tl.constexpr = plan.n_aside
    J: tl.constexpr = len(plan.orders)
    D: tl.constexpr = H * W
    ACC: tl.constexpr = tl.float64 if p_edges.dtype.element_ty == tl.float64 else tl.float32
    i_block = tl.program_id(0).to(tl.int64)
    o_h, o_w, o_d, m_d = column_tile(tl.program_id(1), H, W, BH, BW)
    o_t = tl.arange(0, LONGEST)
    o_first = i_block * BLOCK
    half_edges = tl.num_programs(0).to(tl.int64) * (2 * J * D)
    b_inner = tl.load(p_differs + o_first + o_t, mask=(o_t < BLOCK) & (o_first + o_t < E), other=0x7FFF).to(tl.int32)
    b_least = tl.min(
        b_inner, 0
    )  # of `differs` before the places of this block: an order's run begins here, or does not
    b_end = tl.load(p_differs + o_first + BLOCK, mask=o_first + BLOCK < E, other=1).to(tl.int32)
    numbers = load_numbers(destination, ACC, epilogue)
    b_squares = tl.zeros([1, BH], ACC)
    j = tl.program_id(2)
    order = 0
    for k in tl.static_range(J):
        order = tl.where(j == k, plan.orders[k], order)
    if (b_end > order) & (b_least <= order):
        b_sum = take_aside(p_edges + (i_block * (2 * J) + (J + j)) * D + o_d, m_d, half_edges)  # [1, BH, BW]
        b_sum, i_place = sum_over_edges(
            p_differs, p_edges + j * D, i_block, E, BLOCK, half_edges, order, b_sum, o_d, m_d, 2 * J * D, BK, LONGEST
        )
        p_target = p_targets + i_place * (J * H) + j * H + o_h
        b_target = tl.load(p_target, mask=o_h < H, other=-1)[None, :]  # [1, BH]
        m_row = b_target >= 0
        b_read = load_rows(destination, b_target, m_row, o_w, W, epilogue)
        b_new = write_rows(destination, numbers, b_read, b_target, b_sum, m_row, o_w, W, epilogue)
        b_squares += tl.where(m_row, b_new, 0.0)
        p_sum = p_aside + (i_place * C + j) * D + o_d
        put_aside(p_sum, b_sum, (b_target <= -2)[:, :, None] & m_d, E.to(tl.int64) * (C * D))
    store_squares(destination, b_squares)


class _Launches(NamedTuple):
    """Of one kind: the walk and the edges, each with its tile."""

    walk_tile: Tile
    walk: Launch
    edge_tile: Tile
    edges: Launch


@of_a_kind
def _launches_of(
    device: Device,
    spec: AddressSpec,
    plan: SortPlan,
    W: int,
    grad_dtype: torch.dtype,
    epilogue: Epilogue,
    *kind: Hashable,
) -> _Launches:
    dtype, address = accumulator(grad_dtype), address_of(spec)
    ahead = TENSORS.get(epilogue.rule, 1) * grad_dtype.itemsize  # bytes of a number and its moments, all read ahead
    settings = device.settings
    warp = settings.walk_tiles * warp_bytes(device) // (2 if ahead > 8 else 1)
    whole_row = 0 if epilogue.rule == "store" else triton.next_power_of_2(W) * dtype.itemsize
    tile = tile_of(spec.heads, W, grad_dtype, max(warp, whole_row))
    warps = min(max(tile.BM * tile.BH * tile.BW * dtype.itemsize // warp, 1), MOST_WARPS)
    constants = W, plan, address, epilogue._replace(warps=warps), tile.BM, tile.BH, tile.BW
    walk = Launch(sum_prefixes_kernel, *constants, **roomy_launch(device, warps))
    edge = tile_of(spec.heads, W, grad_dtype, max(settings.edge_bytes, whole_row))
    constants = W, plan, address, epilogue._replace(warps=settings.edge_warps), LONGEST, edge.BM, edge.BH, edge.BW
    return _Launches(
        tile, walk, edge, Launch(sum_edges_kernel, *constants, **roomy_launch(device, settings.edge_warps))
    )


def sum_prefixes(
    grad: Tensor, prefixes: Prefixes, aside: Tensor, ending: Ending, spec: AddressSpec, plan: SortPlan
) -> None:
    """Sum the gradient over every prefix and write the rows that one prefix alone has; the others go to `aside`."""
    W, E = grad.shape[-1] // spec.heads, prefixes.sids.shape[0]
    dtype = accumulator(grad.dtype)
    kind = ending.kind, prefixes.counts is None, prefixes.sids.dtype, aligned(grad), E < 1 << 31
    launches = _launches_of(ending.device, spec, plan, W, grad.dtype, ending.epilogue, *kind)
    tile, block = launches.walk_tile, block_of(E, ending.device.settings.walk_blocks)
    n_blocks = blocks(E, block)
    edges = room_for_sums(n_blocks * 2 * len(plan.orders) * spec.heads, W, grad.dtype, grad.device)
    grid = (blocks(n_blocks, tile.BM), tile.columns, 1)
    launches.walk(grid, *prefixes, grad, aside, edges, ending.of_programs(grid[0] * grid[1], dtype), E, block)
    if n_blocks > 1:
        grid = (n_blocks, launches.edge_tile.columns, len(plan.orders))
        destination = ending.of_programs(grid[0] * grid[1] * grid[2], dtype)
        launches.edges(grid, prefixes.differs, prefixes.targets, aside, edges, destination, E, block)
