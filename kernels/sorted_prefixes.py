"""Row gradients of prefix and full mode: one stable sort of the codes serves all orders, because prefixes nest.

Sorted by their codes, the SIDs that share a prefix stand side by side, for every order at once. `differs[i]` is the
first order at which SID i differs from the one before it: a run of order n ends before i where differs[i] <= n.

Equal counts of consecutive SIDs make a block, whatever their prefixes, so a hot prefix costs no more than a cold one.
A lane walks its block, reads each SID's gradient once, adds it to one running sum an order, and writes each run's row
where it ends: rows hashed in registers, then stored or updated. Runs that reach into the neighbouring blocks leave
partial sums, two a block, that the same kernel sums in turn, in a fixed order. No atomics, no row-id tensor but for the
check below.

Two prefixes of one order may hash to one row. Each run's last SID writes its rows, they are sorted, and runs that share
a row are marked: their sums are put aside in `shared` and merged by `sorted_rows.py`, in sorted order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixmem_fast._dtypes import accumulator
from prefixmem_fast.addressing import AddressSpec

from .address import address_of, load_sid_codes, order_rows
from .tiles import LAUNCH, blocks, column_tile, roomy_launch, tile_of
from .update import STORE, Destination, Epilogue, store_squares, with_squares, write_rows

BUDGET = 2048  # bytes of one running sum a program
WARPS = 2  # 8 values a thread: 16-byte reads of bfloat16


def block_of(sids: int) -> int:
    """SIDs a block: long walks leave few partial sums, short ones give a small batch enough programs."""
    return 32 if sids >= 16_384 else 8


class SortPlan(NamedTuple):
    """Compile-time constants beside the address."""

    orders: tuple[int, ...]  # that receive a gradient, ascending
    checked: tuple[int, ...]  # index among the checked orders, -1 where two prefixes never share a row
    n_checked: int
    depth: int  # the last of `orders`: codes that decide
    words: tuple[int, ...]  # which sort key holds the code of a position
    shifts: tuple[int, ...]  # and from which bit on
    n_words: int
    ranked: bool  # a row's place among the touched rows is its target, not the row itself


@lru_cache(maxsize=64)
def sort_plan_of(spec: AddressSpec, ranked: bool) -> SortPlan:
    if spec.mode == "prefix":
        orders = spec.orders_at(spec.active_levels[-1])
    else:
        orders = tuple(level for level in spec.active_levels if level <= spec.max_order)
    depth = orders[-1] if orders else 0
    checked = [n for n in orders if ranked or n not in spec.exact_orders]
    words, shifts, word, left = [0] * depth, [0] * depth, -1, 0
    for position in reversed(range(depth)):  # the last code is the least significant; 63 bits a key
        bits = spec.codebook_sizes[position].bit_length()
        if bits > left:
            word, left = word + 1, 63
        words[position], shifts[position] = word, 63 - left
        left -= bits
    places = tuple(checked.index(n) if n in checked else -1 for n in orders)
    return SortPlan(orders, places, len(checked), depth, tuple(words), tuple(shifts), word + 1, ranked)


@triton.jit(do_not_specialize=["M"])
def pack_codes_kernel(p_codes, p_first, p_keys, M, plan: tl.constexpr, address: tl.constexpr, BM: tl.constexpr):
    """codes [.., L] of the SIDs first[M], -1 for none -> sort keys int64 [words, M], least significant first.

    Ended prefixes come before all others.
    """
    DEPTH: tl.constexpr = plan.depth
    WORDS: tl.constexpr = plan.n_words
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    b_sid = o_m
    if p_first is not None:
        b_sid = tl.load(p_first + o_m, mask=o_m < M, other=-1)  # [BM]
    b_codes, b_length = load_sid_codes(p_codes, b_sid, (o_m < M) & (b_sid >= 0), DEPTH, address)
    for word in tl.static_range(WORDS):
        b_key = tl.zeros([BM], tl.int64)
        for i in tl.static_range(DEPTH):
            if plan.words[i] == word:
                b_digit = tl.where(b_length > i, b_codes[i].to(tl.int64) + 1, 0)
                b_key = b_key | (b_digit << plan.shifts[i])
        tl.store(p_keys + word * M.to(tl.int64) + o_m, b_key, mask=o_m < M)  # [BM]


@triton.jit(do_not_specialize=["M"])
def prefixes_kernel(
    p_order,
    p_codes,
    p_differs,
    p_rows,
    M,
    plan: tl.constexpr,
    address: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
):
    """Sorted order [M], -1 for none -> differs int8 [M + 1], and rows [M, checked, H] of the runs that end at a place.

    Where none ends, the rows are -1.
    """
    H: tl.constexpr = address.heads
    C: tl.constexpr = plan.n_checked
    J: tl.constexpr = len(plan.orders)
    DEPTH: tl.constexpr = plan.depth
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_m = o_m < M
    b_sid = tl.load(p_order + o_m, mask=m_m, other=-1)  # [BM]
    b_codes, b_length = load_sid_codes(p_codes, b_sid, b_sid >= 0, DEPTH, address)
    m_next = (o_m + 1 < M) & (b_length > 0)
    b_next = tl.load(p_order + o_m + 1, mask=m_next, other=-1)  # [BM]
    b_others, b_other_length = load_sid_codes(p_codes, b_next, m_next, DEPTH, address)
    b_differs = tl.full([BM], DEPTH + 1, tl.int32)
    for i in tl.static_range(DEPTH - 1, -1, -1):
        m_same = (b_codes[i] == b_others[i]) & ((b_length > i) == (b_other_length > i))
        b_differs = tl.where(m_same, b_differs, i + 1)
    b_differs = tl.where(m_next, b_differs, 1)  # nothing is a run by itself: a longer one would leave partial sums
    tl.store(p_differs + o_m + 1, b_differs.to(tl.int8), mask=m_m)  # [BM]
    tl.store(p_differs + o_m, tl.full([BM], 1, tl.int8), mask=o_m == 0)
    o_h = tl.arange(0, BH)
    for j in tl.static_range(J):
        if plan.checked[j] >= 0:
            b_row, m_row = order_rows(b_codes, b_length, o_h, plan.orders[j], plan.orders[j], address)
            b_row = tl.where((m_row & (b_differs <= plan.orders[j]))[:, None], b_row, -1)
            p_row = p_rows + (o_m * (C * H) + plan.checked[j] * H)[:, None] + o_h[None, :]
            tl.store(p_row, b_row.to(p_rows.dtype.element_ty), mask=m_m[:, None] & (o_h < H)[None, :])  # [BM, BH]


@triton.jit
def add_gradient(
    p_grad, p_n_tokens, b_sid, m_sid, o_d, m_d, b_sums, W: tl.constexpr, plan: tl.constexpr, address: tl.constexpr
):
    """Running sums, one an order, plus a SID's gradient: order n takes level n and, in prefix mode, those above."""
    A: tl.constexpr = address.active
    H: tl.constexpr = address.heads
    LAST: tl.constexpr = address.last_active
    J: tl.constexpr = len(plan.orders)
    b_level = tl.zeros_like(b_sums[0])
    for l in tl.static_range(LAST, 0, -1):
        if address.slot_of_level[l - 1] >= 0:
            m_level = m_sid
            if p_n_tokens is not None:  # a token stream: the level's gradient stands at the SID's l-th token
                m_level = m_level & (tl.load(p_n_tokens + b_sid, mask=m_level, other=0) >= l)  # [BB]
                o_vector = b_sid + (l - 1)
            else:
                o_vector = b_sid * A + address.slot_of_level[l - 1]
            p_level = p_grad + (o_vector * (H * W))[:, None, None] + o_d
            b_grad = tl.load(p_level, mask=m_level[:, None, None] & m_d, other=0.0).to(b_level.dtype)  # [BB, BH, BW]
            b_level = b_level + b_grad if address.mode == "prefix" else b_grad
        b_new = ()
        for j in tl.static_range(J):
            if plan.orders[j] == l:
                b_new = b_new + (b_sums[j] + b_level,)
            else:
                b_new = b_new + (b_sums[j],)
        b_sums = b_new
    return b_sums


@triton.jit(do_not_specialize=["E"])
def sum_prefixes_kernel(
    p_order,
    p_codes,
    p_n_tokens,
    p_slots,
    p_differs,
    p_grad,
    p_values,
    p_places,
    p_shared,
    destination,
    p_edge_differs,
    p_edge_values,
    p_edge_places,
    E,
    W: tl.constexpr,
    plan: tl.constexpr,
    address: tl.constexpr,
    LEAF: tl.constexpr,
    epilogue: tl.constexpr,
    BLOCK: tl.constexpr,
    BB: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """Sum the runs of every order over entries [E] and write their rows. Grid: (tiles of BB blocks, column tiles).

    LEAF: entry e is SID order[e] with its gradient. Otherwise it is a partial sum of each order, values [E, J, H * W];
    entries 2b and 2b + 1 are what block b shared with the block before it and with the one after it, and an order has a
    value there where it did share. places [E, J] is where among the sorted SIDs the run ended.
    """
    H: tl.constexpr = address.heads
    C: tl.constexpr = plan.n_checked
    J: tl.constexpr = len(plan.orders)
    D: tl.constexpr = H * W
    ACC: tl.constexpr = p_edge_values.dtype.element_ty
    i_block = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    o_h, o_w, o_d, m_d = column_tile(tl.program_id(1), H, W, BH, BW)
    o_first = i_block * BLOCK
    m_block = o_first < E

    b_first = tl.load(p_differs + o_first, mask=m_block, other=1).to(tl.int32)  # [BB]
    b_here = b_first
    b_least = tl.full([BB], plan.depth + 1, tl.int32)  # least of `differs` in the block
    b_squares = tl.zeros([BB, BH, BW], ACC)
    b_sums, m_open, m_any, b_places = (), (), (), ()
    for j in tl.static_range(J):
        b_sums = b_sums + (tl.zeros([BB, BH, BW], ACC),)
        m_open = m_open + (m_block & (i_block > 0) & (b_first > plan.orders[j]),)  # began in an earlier block
        m_any = m_any + (b_first > plan.depth + 1,)  # false
        b_places = b_places + (o_first,)
    i = 0
    n_walk = tl.minimum(BLOCK, E - tl.program_id(0) * (BB * BLOCK))
    while i < n_walk:
        o_e = o_first + i
        m_e = o_e < E
        b_next = tl.load(p_differs + o_e + 1, mask=m_e & (o_e + 1 < E), other=1).to(tl.int32)  # [BB]
        b_sid = o_e
        if LEAF:
            b_sid = tl.load(p_order + o_e, mask=m_e, other=-1)  # [BB]
            b_codes, b_length = load_sid_codes(p_codes, b_sid, b_sid >= 0, plan.depth, address)
            m_sid = b_length > 0
            b_sums = add_gradient(p_grad, p_n_tokens, b_sid, m_sid, o_d, m_d, b_sums, W, plan, address)
        b_kept, m_kept_open, m_kept_any, b_kept_places = (), (), (), ()
        for j in tl.static_range(J):
            b_sum, m_some, b_place = b_sums[j], m_any[j], o_e
            if not LEAF:
                m_value = m_e & (tl.where(o_e % 2 == 0, b_here, b_next) > plan.orders[j])
                p_value = p_values + ((o_e * J + j) * D)[:, None, None] + o_d
                b_sum += tl.load(p_value, mask=m_value[:, None, None] & m_d, other=0.0)  # [BB, BH, BW]
                m_lead = m_value & (o_e % 2 == 0)
                b_place = tl.load(p_places + o_e * J + j, mask=m_lead, other=0).to(tl.int64)  # [BB]
                b_place = tl.where(m_lead, b_place, b_places[j])
                m_some = m_some | m_value
            m_end = m_e & (b_next <= plan.orders[j])
            m_done = m_end & ~m_open[j]
            if not LEAF:
                m_done = m_done & m_some
                b_sid = tl.load(p_order + b_place, mask=m_done, other=0)  # [BB]
                b_codes, b_length = load_sid_codes(p_codes, b_sid, m_done, plan.orders[j], address)
            b_row, m_row = order_rows(b_codes, b_length, o_h, plan.orders[j], plan.orders[j], address)
            m_row = (m_done & m_row)[:, None] & (o_h < H)[None, :]
            if plan.checked[j] >= 0:
                o_slot = ((b_place * C + plan.checked[j]) * H)[:, None] + o_h[None, :]
                b_slot = tl.load(p_slots + o_slot, mask=m_row, other=0)  # [BB, BH]
                m_shared = m_row & (b_slot < 0)
                p_aside = p_shared + (o_slot * W)[:, :, None] + o_w[None, None, :]
                tl.store(p_aside, b_sum, mask=m_shared[:, :, None] & m_d)  # [BB, BH, BW]
                m_row = m_row & (b_slot >= 0)
                if plan.ranked:
                    b_row = b_slot.to(tl.int64)
            write_rows(destination, b_row, b_sum, m_row, o_w, W, epilogue)
            if destination.squares is not None:
                b_squares += tl.where(m_row[:, :, None], b_sum * b_sum, 0.0)

            m_cut = m_end & m_open[j]
            p_edge = p_edge_values + ((i_block * 2 * J + j) * D)[:, None, None] + o_d
            tl.store(p_edge, b_sum, mask=m_cut[:, None, None] & m_d)  # [BB, BH, BW]
            tl.store(p_edge_places + i_block * 2 * J + j, b_place.to(tl.int32), mask=m_cut)  # [BB]
            b_kept = b_kept + (tl.where(m_end[:, None, None], 0.0, b_sum),)
            m_kept_open = m_kept_open + (m_open[j] & ~m_end,)
            m_kept_any = m_kept_any + (m_some & ~m_end,)
            b_kept_places = b_kept_places + (b_place,)
        b_sums, m_open, m_any, b_places = b_kept, m_kept_open, m_kept_any, b_kept_places
        b_least = tl.minimum(b_least, tl.where(m_e, b_here, plan.depth + 1))
        b_here = b_next
        i += 1

    for j in tl.static_range(J):
        # A run that fills the whole block goes to the left edge; a zero at the right one keeps its neighbours apart.
        m_runs_on = m_block & (o_first + BLOCK < E) & (b_here > plan.orders[j])
        p_edge = p_edge_values + ((i_block * 2 * J + j) * D)[:, None, None] + o_d
        tl.store(p_edge, b_sums[j], mask=(m_runs_on & m_open[j])[:, None, None] & m_d)  # [BB, BH, BW]
        b_trail = tl.where(m_open[j][:, None, None], 0.0, b_sums[j])
        tl.store(p_edge + J * D, b_trail, mask=m_runs_on[:, None, None] & m_d)  # [BB, BH, BW]
    store_squares(destination, b_squares)
    tl.store(p_edge_differs + i_block * 2, b_first.to(tl.int8), mask=m_block)  # [BB]
    tl.store(p_edge_differs + i_block * 2 + 1, b_least.to(tl.int8), mask=m_block)  # [BB]


class Prefixes(NamedTuple):
    """The SIDs of a batch, sorted; in a token stream M is a bound on their number."""

    order: Tensor  # int64 [M]: which SID, or at which token it begins, -1 for none
    differs: Tensor  # int8 [M + 1]
    rows: Tensor | None  # [M * checked * H] of the runs that end at each place, -1 elsewhere; None if none is checked


def most_sids(codes: Tensor, n_tokens: Tensor | None, spec: AddressSpec) -> int:
    """A bound on the SIDs that reach an active level; in a token stream each takes as many tokens as that level."""
    return len(codes) // (1 if n_tokens is None else spec.active_levels[0])


def _first_tokens(n_tokens: Tensor, slots: int, spec: AddressSpec) -> Tensor:
    """Tokens int64 ``[slots]`` at which a SID begins that reaches an active level, then -1."""
    begins = n_tokens >= spec.active_levels[0]
    place = torch.where(begins, torch.cumsum(begins, 0) - 1, slots)
    tokens = torch.full((slots + 1,), -1, dtype=torch.int64, device=n_tokens.device)
    tokens.scatter_(0, place, torch.arange(len(n_tokens), device=n_tokens.device))
    return tokens[:slots]


def sort_prefixes(
    codes: Tensor, n_tokens: Tensor | None, spec: AddressSpec, plan: SortPlan, row_dtype: torch.dtype
) -> Prefixes:
    """Sort contiguous codes ``[M, L]``, M > 0; in a token stream with `n_tokens` of `token_codes`."""
    M, device = most_sids(codes, n_tokens, spec), codes.device
    first = None if n_tokens is None else _first_tokens(n_tokens, M, spec)
    address = address_of(spec)
    keys = torch.empty((plan.n_words, M), dtype=torch.int64, device=device)
    pack_codes_kernel[(blocks(M, 128),)](codes, first, keys, M, plan, address, 128, **LAUNCH)
    order = torch.sort(keys[0], stable=True)[1]
    for key in keys[1:]:
        order = order[torch.sort(key[order], stable=True)[1]]
    if first is not None:
        order = first[order]

    BH = triton.next_power_of_2(spec.heads)
    BM = max(min(256 // BH, 64), 1)
    differs = torch.empty((M + 1,), dtype=torch.int8, device=device)
    shape = (M * plan.n_checked * spec.heads,)
    rows = torch.empty(shape, dtype=row_dtype, device=device) if plan.n_checked else None
    prefixes_kernel[(blocks(M, BM),)](order, codes, differs, rows, M, plan, address, BM, BH, **LAUNCH)
    return Prefixes(order, differs, rows)


def sum_prefixes(
    grad: Tensor,
    codes: Tensor,
    n_tokens: Tensor | None,
    prefixes: Prefixes,
    slots: Tensor | None,
    shared: Tensor | None,
    destination: Destination,
    epilogue: Epilogue,
    spec: AddressSpec,
    plan: SortPlan,
    squares: list[Tensor] | None,
) -> None:
    """Sum the gradient over every prefix and write the rows that one prefix alone has; the others go to `shared`."""
    W, J, device = grad.shape[-1] // spec.heads, len(plan.orders), grad.device
    dtype = accumulator(grad.dtype)
    whole_row = triton.next_power_of_2(W) * dtype.itemsize
    tile = tile_of(spec.heads, W, grad.dtype, BUDGET if epilogue == STORE else max(BUDGET, whole_row))
    entries, differs, values, places = len(prefixes.order), prefixes.differs, None, None
    block, launch = block_of(entries), roomy_launch(WARPS)
    while True:
        n_blocks = blocks(entries, block)
        edge_differs = torch.empty((2 * n_blocks,), dtype=torch.int8, device=device)
        edge_values = torch.empty((2 * n_blocks, J, spec.heads * W), dtype=dtype, device=device)
        edge_places = torch.empty((2 * n_blocks, J), dtype=torch.int32, device=device)
        grid = (blocks(n_blocks, tile.BM), tile.columns)
        sum_prefixes_kernel[grid](
            prefixes.order,
            codes,
            n_tokens,
            slots,
            differs,
            grad,
            values,
            places,
            shared,
            with_squares(destination, squares, grid[0] * grid[1], dtype),
            edge_differs,
            edge_values,
            edge_places,
            entries,
            W,
            plan,
            address_of(spec),
            values is None,
            epilogue,
            block,
            tile.BM,
            tile.BH,
            tile.BW,
            **launch,
        )
        if n_blocks == 1:
            return
        entries, differs, values, places = 2 * n_blocks, edge_differs, edge_values, edge_places
