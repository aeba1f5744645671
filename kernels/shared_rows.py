"""Rows that two prefixes of one batch share, because their hashes collide: found, and their sums merged.

Each touched row must be updated once, so a run must know whether another one has its row. Every run claims its row in a
filter of bits; a bit that is claimed twice marks all its runs as shared, a few of them for nothing. A shared run's
target becomes -2 - row, its sum is put aside at its slot, and it enters a chain: shared runs whose rows fall into one
bucket. `merge_rows` adds the runs of one row in the order of their slots, whatever the order in which the chain was
built, so the same input gives the same bits. The runs of orders with few prefixes are treated as shared ones always.

A slot is the index of a run among [M, orders that may be put aside, H]: its last place, its order, its head.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixmem_fast._launch import Launch, of_a_kind

from .aside import take_aside
from .tiles import LAUNCH, Device, blocks, current_device, roomy_launch, row_tile
from .update import Ending, Epilogue, load_numbers, load_rows, store_squares, write_rows

BITS_A_RUN = 32  # of the filter: one run in 32 is marked for nothing
RUNS_A_BUCKET = 4
MOST_BITS = 1 << 30  # numbers of bits and buckets are int32


class Claims(NamedTuple):
    """The filter and the chains of one batch; bits and buckets are powers of two."""

    once: Tensor  # int32 [bits / 32]: claimed
    twice: Tensor  # int32 [bits / 32]: claimed again
    heads: Tensor  # int32 [buckets]: 1 + the slot that entered a bucket's chain last, 0 for none
    count: Tensor  # int32 [1]: how many slots are shared
    links: Tensor  # int32 [slots]: the same of the slot that entered before this one
    shared: Tensor  # int32 [slots]: the shared ones, as they came


def make_claims(slots: int, device: torch.device) -> Claims:
    runs = 1 << (slots - 1).bit_length()
    words = min(max(runs * BITS_A_RUN // 32, 4), MOST_BITS // 32)
    buckets = min(max(runs // RUNS_A_BUCKET, 4), MOST_BITS)
    zeros = torch.zeros(2 * words + buckets + 1, dtype=torch.int32, device=device)
    links = torch.empty(slots, dtype=torch.int32, device=device)
    return Claims(*zeros.split_with_sizes((words, words, buckets, 1)), links, torch.empty_like(links))


@triton.jit
def bit_of(b_row, n_bits):
    """The word of a row's bit in the filter, and the bit within it."""
    b_bit = (b_row & (n_bits - 1)).to(tl.int32)
    return b_bit >> 5, b_bit & 31


@triton.jit
def claim(p_once, p_twice, n_bits, b_row, m_row):
    """Claim rows where m_row. Whoever comes second marks the bit, whichever of the two that is."""
    b_word, b_bit = bit_of(b_row, n_bits)
    b_mask = tl.full(b_row.shape, 1, tl.int32) << b_bit
    b_before = tl.atomic_or(p_once + b_word, b_mask, mask=m_row, sem="relaxed")
    m_again = m_row & ((b_before & b_mask) != 0)
    tl.atomic_or(p_twice + b_word, b_mask, mask=m_again, sem="relaxed")


@triton.jit
def target_of(p_targets, b_slot, SLOTS: tl.constexpr, TARGETS: tl.constexpr):
    """Pointers to the targets of slots; a place has SLOTS slots and TARGETS targets, those of the slots first."""
    return p_targets + b_slot // SLOTS * TARGETS + b_slot % SLOTS


@triton.jit
def enter_chains(p_heads, p_count, p_links, p_shared, n_buckets, b_slot, b_row, m_slot):
    """Enter slots [BS] into the chains of their rows, and into the list."""
    p_head = p_heads + (b_row & (n_buckets - 1))
    b_before = tl.atomic_xchg(p_head, (b_slot + 1).to(tl.int32), mask=m_slot, sem="relaxed")
    tl.store(p_links + b_slot, b_before, mask=m_slot)  # [BS]
    b_one = m_slot.to(tl.int32)
    i_list = tl.atomic_add(p_count, tl.sum(b_one, 0), sem="relaxed")
    tl.store(p_shared + (i_list + tl.cumsum(b_one, 0) - 1), b_slot.to(tl.int32), mask=m_slot)  # [BS]


# Where triton 3.6 knows on gfx942 that `heads` is small, it takes a buffer operation that has no exchange.
@triton.jit(do_not_specialize=["p_heads", "S", "n_bits", "n_buckets"])
def mark_claims_kernel(
    p_targets,
    p_twice,
    p_heads,
    p_count,
    p_links,
    p_shared,
    S,
    n_bits,
    n_buckets,
    CLAIMED: tl.constexpr,
    SLOTS: tl.constexpr,
    TARGETS: tl.constexpr,
    BS: tl.constexpr,
):
    """Targets of slots [S] become -2 - row where the row's bit was claimed twice, and behind the CLAIMED first slots of
    each place. Grid: tiles of BS slots."""
    o_s = tl.program_id(0).to(tl.int64) * BS + tl.arange(0, BS)
    p_target = target_of(p_targets, o_s, SLOTS, TARGETS)
    b_row = tl.load(p_target, mask=o_s < S, other=-1)  # [BS]
    b_word, b_bit = bit_of(b_row, n_bits)
    m_claimed = (b_row >= 0) & (o_s % SLOTS < CLAIMED)
    b_twice = tl.load(p_twice + b_word, mask=m_claimed, other=-1)  # [BS]
    m_shared = (b_row >= 0) & (((b_twice >> b_bit) & 1) != 0)
    enter_chains(p_heads, p_count, p_links, p_shared, n_buckets, o_s, b_row, m_shared)
    tl.debug_barrier()  # targets are read and written
    tl.store(p_target, -2 - b_row, mask=m_shared)  # [BS]


@triton.jit(do_not_specialize=["p_heads", "S", "n_buckets"])
def mark_sorted_kernel(
    p_rows,
    p_order,
    p_ranks,
    p_targets,
    p_heads,
    p_count,
    p_links,
    p_shared,
    p_keys,
    S,
    n_buckets,
    CLAIMED: tl.constexpr,
    SLOTS: tl.constexpr,
    TARGETS: tl.constexpr,
    BS: tl.constexpr,
):
    """Sorted rows [S], -1 for none, of the slots order[s] -> targets: where two slots share a row -2 - row, or in its
    place -2 - rank. The shared ones enter chains, or else are listed: keys [S], -1 elsewhere. Grid: tiles of BS."""
    o_s = tl.program_id(0).to(tl.int64) * BS + tl.arange(0, BS)
    m_s = o_s < S
    b_row = tl.load(p_rows + o_s, mask=m_s, other=-1)  # [BS]
    m_row = b_row >= 0
    m_before = m_row & (o_s > 0)
    m_shared = m_before & (tl.load(p_rows + o_s - 1, mask=m_before, other=-1) == b_row)
    m_after = m_row & (o_s + 1 < S)
    m_shared = m_shared | (m_after & (tl.load(p_rows + o_s + 1, mask=m_after, other=-1) == b_row))
    b_key = b_row
    if p_ranks is not None:
        b_key = tl.load(p_ranks + o_s, mask=m_row, other=0).to(b_row.dtype)  # [BS]
    b_slot = tl.load(p_order + o_s, mask=m_row, other=0)  # [BS]
    m_shared = m_shared | (m_row & (b_slot % SLOTS >= CLAIMED))
    b_target = tl.where(m_shared, -2 - b_key, b_key)
    tl.store(target_of(p_targets, b_slot, SLOTS, TARGETS), b_target, mask=m_row)  # [BS]
    if p_keys is not None:
        tl.store(p_keys + o_s, tl.where(m_shared, b_key, -1), mask=m_s)  # [BS]
    else:
        enter_chains(p_heads, p_count, p_links, p_shared, n_buckets, b_slot, b_key, m_shared)


@triton.jit
def next_slots(
    p_targets, p_heads, p_links, n_buckets, b_target, b_after, m_m, SLOTS: tl.constexpr, TARGETS: tl.constexpr
):
    """The first two slots behind b_after [BM] of the row that b_target names, and how many there are behind it."""
    b_first = tl.full(b_after.shape, 0x7FFFFFFF, tl.int32)
    b_second = b_first
    b_count = tl.zeros(b_after.shape, tl.int32)
    b_link = tl.load(p_heads + ((-2 - b_target) & (n_buckets - 1)), mask=m_m, other=0)  # [BM]
    while tl.max(b_link, 0) > 0:
        m_link = b_link > 0
        b_slot = tl.where(m_link, b_link - 1, 0)
        b_other = tl.load(target_of(p_targets, b_slot.to(tl.int64), SLOTS, TARGETS), mask=m_link, other=-1)  # [BM]
        b_link = tl.load(p_links + b_slot, mask=m_link, other=0)  # [BM]
        m_link = m_link & (b_other == b_target) & (b_slot > b_after)
        b_slot = tl.where(m_link, b_slot, 0x7FFFFFFF)
        b_second = tl.minimum(b_second, tl.maximum(b_first, b_slot))
        b_first = tl.minimum(b_first, b_slot)
        b_count += m_link.to(tl.int32)
    return b_first, b_second, b_count


@triton.jit
def sum_two(p_aside, b_first, b_second, b_count, o_w, S, W: tl.constexpr):
    """The sums [BM, BW] put aside at the first one or two of b_count slots."""
    m_w = (o_w < W)[None, :]
    half = S.to(tl.int64) * W
    p_first = p_aside + (b_first.to(tl.int64) * W)[:, None] + o_w[None, :]
    p_second = p_aside + (b_second.to(tl.int64) * W)[:, None] + o_w[None, :]
    b_one = take_aside(p_first, (b_count > 0)[:, None] & m_w, half)
    return b_one + take_aside(p_second, (b_count > 1)[:, None] & m_w, half)


@triton.jit(do_not_specialize=["S", "n_buckets"])
def merge_rows_kernel(
    p_targets,
    p_heads,
    p_count,
    p_links,
    p_shared,
    p_aside,
    destination,
    S,
    n_buckets,
    W: tl.constexpr,
    SLOTS: tl.constexpr,
    TARGETS: tl.constexpr,
    epilogue: tl.constexpr,
    BM: tl.constexpr,
    BW: tl.constexpr,
):
    """Sum what shared runs put aside [S, W], and write their rows: the lane of a row's first slot does it. Grid: (any
    number of programs, which take BM slots of the list at a time in turns; column tiles)."""
    ACC: tl.constexpr = tl.float64 if p_aside.dtype.element_ty == tl.float64 else tl.float32
    o_w = tl.program_id(1) * BW + tl.arange(0, BW)
    n_shared = tl.load(p_count)
    numbers = load_numbers(destination, ACC, epilogue)
    b_squares = tl.zeros([BM, 1], ACC)
    i_first = tl.program_id(0) * BM
    while i_first < n_shared:
        o_list = i_first + tl.arange(0, BM)
        m_m = o_list < n_shared
        b_slot = tl.load(p_shared + o_list, mask=m_m, other=0)  # [BM]
        b_target = tl.load(target_of(p_targets, b_slot.to(tl.int64), SLOTS, TARGETS), mask=m_m, other=-2)  # [BM]
        b_first, b_second, b_count = next_slots(
            p_targets, p_heads, p_links, n_buckets, b_target, tl.full([BM], -1, tl.int32), m_m, SLOTS, TARGETS
        )
        m_first = m_m & (b_first == b_slot)
        b_row, m_row = (-2 - b_target)[:, None], m_first[:, None]
        b_read = load_rows(destination, b_row, m_row, o_w, W, epilogue)
        b_count = tl.where(m_first, b_count, 0)
        b_sum = sum_two(p_aside, b_first, b_second, b_count, o_w, S, W)
        while tl.max(b_count, 0) > 2:  # seldom
            b_first, b_second, b_count = next_slots(
                p_targets, p_heads, p_links, n_buckets, b_target, b_second, b_count > 2, SLOTS, TARGETS
            )
            b_sum += sum_two(p_aside, b_first, b_second, b_count, o_w, S, W)
        b_new = write_rows(destination, numbers, b_read, b_row, b_sum[:, None, :], m_row, o_w, W, epilogue)
        b_squares += tl.where(m_row, b_new, 0.0)
        i_first += tl.num_programs(0) * BM
    store_squares(destination, b_squares)


class Layout(NamedTuple):
    """Of a place: targets whose rows are claimed, targets that may be put aside, targets."""

    claimed: int
    slots: int
    targets: int


@of_a_kind
def _mark_claims_of(device: Device, layout: Layout, *kind: Hashable) -> Launch:
    return Launch(mark_claims_kernel, *layout, 512, **LAUNCH)


@of_a_kind
def _mark_sorted_of(device: Device, layout: Layout, *kind: Hashable) -> Launch:
    return Launch(mark_sorted_kernel, *layout, 512, **LAUNCH)


@of_a_kind
def _merge_of(
    device: Device, layout: Layout, W: int, dtype: torch.dtype, epilogue: Epilogue, *kind: Hashable
) -> tuple[int, int, Launch]:
    """Lanes of a program, column tiles, the launch."""
    BM, BW, warps = row_tile(device, W, dtype, epilogue.rule != "store")
    constants = W, layout.slots, layout.targets, epilogue._replace(warps=warps), BM, BW
    return BM, blocks(W, BW), Launch(merge_rows_kernel, *constants, **roomy_launch(device, warps))


def mark_claims(targets: Tensor, claims: Claims, layout: Layout) -> None:
    """Mark the shared ones of targets ``[M, orders, H]``."""
    S, n_bits, n_buckets = claims.links.shape[0], 32 * claims.once.shape[0], claims.heads.shape[0]
    kind = targets.dtype, S < 1 << 31
    launch = _mark_claims_of(current_device(), layout, *kind)
    launch((blocks(S, 512), 1, 1), targets, *claims[1:], S, n_bits, n_buckets)


def mark_sorted(
    rows: Tensor, order: Tensor, ranks: Tensor | None, targets: Tensor, claims: Claims | None, layout: Layout
) -> Tensor | None:
    """The same of slots sorted by row; with `ranks` a target is a row's rank. Without chains the keys of all slots are
    returned, -1 for those that are not shared."""
    S = rows.shape[0]
    keys = torch.empty_like(rows) if claims is None else None
    chains, n_buckets = ((None,) * 4, 1) if claims is None else (claims[2:], claims.heads.shape[0])
    kind = targets.dtype, ranks is None, claims is None, S < 1 << 31
    launch = _mark_sorted_of(current_device(), layout, *kind)
    launch((blocks(S, 512), 1, 1), rows, order, ranks, targets, *chains, keys, S, n_buckets)
    return keys


def merge_rows(targets: Tensor, claims: Claims, aside: Tensor, ending: Ending, layout: Layout) -> None:
    """Sum and write the rows of the slots that are marked; their sums are in `aside` (see `room_for_sums`)."""
    S, n_buckets, W = claims.links.shape[0], claims.heads.shape[0], aside.shape[-1]
    dtype = torch.float64 if aside.dtype == torch.float64 else torch.float32
    kind = ending.kind, aside.dtype, targets.dtype, S < 1 << 31
    BM, columns, launch = _merge_of(ending.device, layout, W, dtype, ending.epilogue, *kind)
    grid = (min(blocks(S, 8 * BM), ending.device.settings.merge_programs), columns, 1)
    destination = ending.of_programs(grid[0] * columns, dtype)
    launch(grid, targets, *claims[2:], aside, destination, S, n_buckets)
