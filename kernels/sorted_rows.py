"""Sums of equal rows over a list sorted by row, in an order that only the sizes decide.

Equal counts of consecutive entries make a block, whatever the rows, so a hot row costs no more than a cold one. A run
of one row that lies inside a block is written at once. A block's first and last runs may reach into its neighbours:
their partial sums, two a block, form a list 16 times shorter that is sorted already, and the same kernel sums that list
in turn until one block is left. No atomics; each touched row is written once.

An entry is a value of a list, or, in suffix mode, a term: one (SID, pair, head) whose value is read from dS.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixmem_fast._launch import Launch, of_a_kind
from prefixmem_fast.addressing import AddressSpec

from .address import Address, address_of
from .aside import take_aside
from .tiles import Device, aligned, blocks, roomy_launch, row_tile
from .update import Ending, Epilogue, load_numbers, load_rows, store_squares, write_rows

BLOCK = 32  # entries a block


class Terms(NamedTuple):
    """The (level, order) pairs whose rows receive a gradient, and by level the range of pairs that it feeds."""

    pairs: tuple[tuple[int, int], ...]
    low: tuple[int, ...]
    high: tuple[int, ...]


@lru_cache(maxsize=64)
def terms_of(spec: AddressSpec) -> Terms:
    pairs, low, high = [], [0] * spec.levels, [0] * spec.levels
    for level in spec.active_levels:
        low[level - 1] = len(pairs)
        pairs += [(level, order) for order in spec.orders_at(level)]
        high[level - 1] = len(pairs)
    return Terms(tuple(pairs), tuple(low), tuple(high))


@triton.jit
def term_gradient(
    p_grad,
    p_n_tokens,
    b_term,
    m_term,
    o_w,
    m_w,
    W: tl.constexpr,
    ACC: tl.constexpr,
    terms: tl.constexpr,
    address: tl.constexpr,
):
    """Gradient [BB, BW] of terms [BB]: that of the one active level of the term's pair."""
    A: tl.constexpr = address.active
    H: tl.constexpr = address.heads
    J: tl.constexpr = len(terms.pairs)
    LAST: tl.constexpr = address.last_active
    b_head, b_pair, b_sid = b_term % H, b_term // H % J, b_term // (H * J)
    b = tl.zeros([b_term.shape[0], o_w.shape[0]], ACC)
    for l in tl.static_range(LAST, 0, -1):
        if address.slot_of_level[l - 1] >= 0:
            m_level = m_term & (b_pair >= terms.low[l - 1]) & (b_pair < terms.high[l - 1])
            if p_n_tokens is not None:  # a token stream: the level's gradient stands at the SID's l-th token
                m_level = m_level & (tl.load(p_n_tokens + b_sid, mask=m_level, other=0) >= l)  # [BB]
                o_vector = b_sid + (l - 1)
            else:
                o_vector = b_sid * A + address.slot_of_level[l - 1]
            p_level = p_grad + ((o_vector * H + b_head) * W)[:, None] + o_w[None, :]
            b += tl.load(p_level, mask=m_level[:, None] & m_w[None, :], other=0.0).to(ACC)  # [BB, BW]
    return b


@triton.jit(do_not_specialize=["E"])
def sum_rows_kernel(
    p_keys,
    p_entries,
    p_grad,
    p_n_tokens,
    p_values,
    destination,
    p_edge_keys,
    p_edge_values,
    E,
    W: tl.constexpr,
    terms: tl.constexpr,
    address: tl.constexpr,
    epilogue: tl.constexpr,
    BLOCK: tl.constexpr,
    BB: tl.constexpr,
    BW: tl.constexpr,
):
    """Sum runs of equal keys [E] and write the row of each key; key -1 is no row. Grid: (tiles of BB blocks, column
    tiles).

    Entry e has the value of term entries[e] where terms are given, else values[entries[e]], else values[e].
    Each lane of [BB, BW] walks the entries of its block, writes a run's row where it ends, and keeps the block's edges.
    """
    ACC: tl.constexpr = p_edge_values.dtype.element_ty
    i_block = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    o_w = tl.program_id(1) * BW + tl.arange(0, BW)
    m_w = o_w < W
    o_first = i_block * BLOCK

    b_first = tl.load(p_keys + o_first, mask=o_first < E, other=-1).to(tl.int64)  # [BB]
    m_lead = (i_block > 0) & (o_first < E) & (b_first >= 0)
    m_lead = m_lead & (tl.load(p_keys + o_first - 1, mask=m_lead, other=-1) == b_first)
    m_open = m_lead  # the current run began in an earlier block
    m_same = m_lead
    b_key, b_last = b_first, b_first
    b_sum = tl.zeros([BB, BW], ACC)
    b_lead = tl.zeros([BB, BW], ACC)
    b_squares = tl.zeros([BB, 1], ACC)
    numbers = load_numbers(destination, ACC, epilogue)
    i = 0
    n_walk = tl.minimum(BLOCK, E - tl.program_id(0) * (BB * BLOCK))
    while i < n_walk:
        o_e = o_first + i
        m_e = (o_e < E) & (b_key >= 0)
        b_entry = o_e
        if p_entries is not None:
            b_entry = tl.load(p_entries + o_e, mask=m_e, other=0).to(tl.int64)  # [BB]
        if terms is not None:
            b_sum += term_gradient(p_grad, p_n_tokens, b_entry, m_e, o_w, m_w, W, ACC, terms, address)
        else:
            p_value = p_values + (b_entry * W)[:, None] + o_w[None, :]
            b_sum += take_aside(p_value, m_e[:, None] & m_w[None, :], E.to(tl.int64) * W).to(ACC)  # [BB, BW]
        b_next = tl.load(p_keys + o_e + 1, mask=o_e + 1 < E, other=-1).to(tl.int64)  # [BB]
        m_same = m_e & (b_next == b_key)
        m_end = m_e & (b_next != b_key)
        m_row = (m_end & ~m_open)[:, None]
        b_read = load_rows(destination, b_key[:, None], m_row, o_w, W, epilogue)
        b_new = write_rows(destination, numbers, b_read, b_key[:, None], b_sum[:, None, :], m_row, o_w, W, epilogue)
        b_squares += tl.where(m_row, b_new, 0.0)
        b_lead = tl.where((m_end & m_open)[:, None], b_sum, b_lead)
        b_sum = tl.where(m_end[:, None], 0.0, b_sum)
        m_open = m_open & m_same
        b_last, b_key = b_key, b_next
        i += 1

    # A run that fills the whole block leads and trails: its sum is the leading one, a zero keeps the two adjacent.
    b_lead = tl.where((m_open & m_same)[:, None], b_sum, b_lead)
    b_trail = tl.where(m_open[:, None], 0.0, b_sum)
    store_squares(destination, b_squares)
    m_block = o_first < E
    tl.store(p_edge_keys + i_block * 2, tl.where(m_lead, b_first, -1), mask=m_block)  # [BB]
    tl.store(p_edge_keys + i_block * 2 + 1, tl.where(m_same, b_last, -1), mask=m_block)  # [BB]
    p_edge = p_edge_values + (i_block * (2 * W))[:, None] + o_w[None, :]
    tl.store(p_edge, b_lead, mask=m_lead[:, None] & m_w[None, :])  # [BB, BW]
    tl.store(p_edge + W, b_trail, mask=m_same[:, None] & m_w[None, :])  # [BB, BW]


@of_a_kind
def _launch_of(
    device: Device,
    W: int,
    dtype: torch.dtype,
    epilogue: Epilogue,
    terms: Terms | None,
    address: Address | None,
    *kind: Hashable,
) -> tuple[int, int, Launch]:
    """Blocks a program, column tiles, the launch."""
    BB, BW, warps = row_tile(device, W, dtype, epilogue.rule != "store")
    constants = W, terms, address, epilogue._replace(warps=warps), BLOCK, BB, BW
    return BB, blocks(W, BW), Launch(sum_rows_kernel, *constants, **roomy_launch(device, warps))


def sum_terms(
    keys: Tensor,
    order: Tensor,
    grad: Tensor,
    n_tokens: Tensor | None,
    dtype: torch.dtype,
    ending: Ending,
    spec: AddressSpec,
) -> None:
    """Sum and write the terms `order` ``[E]`` of keys ``[E]``, sorted; their values are read from dS."""
    W = grad.shape[-1] // spec.heads
    _sum_sorted(keys, order, grad, n_tokens, None, terms_of(spec), address_of(spec), W, dtype, ending)


def sum_values(keys: Tensor, order: Tensor, values: Tensor, dtype: torch.dtype, ending: Ending) -> None:
    """Sum and write the entries `order` ``[E]`` of keys ``[E]``, sorted; their values: a list ``[V, w]``, or what has
    been put aside (see `aside.py`)."""
    _sum_sorted(keys, order, None, None, values, None, None, values.shape[-1], dtype, ending)


def _sum_sorted(
    keys: Tensor,
    order: Tensor | None,
    grad: Tensor | None,
    n_tokens: Tensor | None,
    values: Tensor | None,
    terms: Terms | None,
    address: Address | None,
    W: int,
    dtype: torch.dtype,
    ending: Ending,
) -> None:
    while True:
        entries, read = keys.numel(), values if grad is None else grad
        kind = ending.kind, keys.dtype, order is None, n_tokens is None, read.dtype, aligned(read), entries < 1 << 31
        BB, columns, launch = _launch_of(ending.device, W, dtype, ending.epilogue, terms, address, *kind, grad is None)
        n_blocks = blocks(entries, BLOCK)
        edge_keys = torch.empty(2 * n_blocks, dtype=keys.dtype, device=keys.device)
        edge_values = torch.empty(2 * n_blocks, W, dtype=dtype, device=keys.device)
        grid = (blocks(n_blocks, BB), columns, 1)
        destination = ending.of_programs(grid[0] * columns, dtype)
        launch(grid, keys, order, grad, n_tokens, values, destination, edge_keys, edge_values, entries)
        if n_blocks == 1:
            return
        keys, order, grad, n_tokens, values, terms, address = edge_keys, None, None, None, edge_values, None, None
