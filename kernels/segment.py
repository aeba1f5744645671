"""Backward kernels, deterministic mode: one stable sort by row, then sums in an order that only the sizes decide.

A term is one (SID, order, head) that adds to a row. Terms are sorted by row; equal counts of consecutive terms make a
block, whatever the rows, so a hot row costs no more than a cold one. A run of one row that lies inside a block is
stored at once. A block's first and last runs may reach into its neighbours: their partial sums, two a block, form a
list 16 times shorter that is sorted already, and the same kernel sums that list in turn until one block is left.

No atomics, no float32 copy of the table: each touched row of the gradient is written once, in its own dtype.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixmem_fast.spec import AddressSpec

from .address import address_of
from .rows import pair_rows, token_pair_rows
from .tiles import LAUNCH, accumulator, blocks, zero_table

BLOCK = 32  # terms a block


class Terms(NamedTuple):
    """The (level, order) pairs whose rows receive a gradient, and by level the range of pairs that it feeds."""

    pairs: tuple[tuple[int, int], ...]
    low: tuple[int, ...]
    high: tuple[int, ...]


@lru_cache(maxsize=64)
def terms_of(spec: AddressSpec) -> Terms:
    pairs, low, high = [], [0] * spec.levels, [0] * spec.levels
    if spec.mode == "prefix":  # one pair an order; level l feeds the orders 1 .. l
        pairs = [(n, n) for n in spec.orders_at(spec.active_levels[-1])]
        high = [min(level, len(pairs)) for level in range(1, spec.levels + 1)]
    else:
        for level in spec.active_levels:
            low[level - 1] = len(pairs)
            pairs += [(level, order) for order in spec.orders_at(level)]
            high[level - 1] = len(pairs)
    return Terms(tuple(pairs), tuple(low), tuple(high))


@triton.jit
def term_gradient(
    p_grad,
    p_chain,
    b_term,
    m_term,
    o_w,
    m_w,
    W: tl.constexpr,
    ACC: tl.constexpr,
    terms: tl.constexpr,
    address: tl.constexpr,
):
    """Gradient [BB, BW] of terms [BB]: the sum over the active levels that read the term's row."""
    A: tl.constexpr = address.active
    H: tl.constexpr = address.heads
    J: tl.constexpr = len(terms.pairs)
    LAST: tl.constexpr = address.last_active
    b_head, b_pair, b_sid = b_term % H, b_term // H % J, b_term // (H * J)
    b = tl.zeros([b_term.shape[0], o_w.shape[0]], ACC)
    for l in tl.static_range(LAST, 0, -1):
        if address.slot_of_level[l - 1] >= 0:
            m_level = m_term & (b_pair >= terms.low[l - 1]) & (b_pair < terms.high[l - 1])
            if p_chain is not None:  # a token stream: the level's gradient stands at the SID's l-th token
                m_level = m_level & (tl.load(p_chain + b_sid, mask=m_level, other=0) >= l)
                o_vector = b_sid + (l - 1)
            else:
                o_vector = b_sid * A + address.slot_of_level[l - 1]
            p_level = p_grad + ((o_vector * H + b_head) * W)[:, None] + o_w[None, :]
            b += tl.load(p_level, mask=m_level[:, None] & m_w[None, :], other=0.0).to(ACC)
    return b


@triton.jit(do_not_specialize=["E"])
def segment_sum_kernel(
    p_keys,
    p_terms,
    p_grad,
    p_chain,
    p_values,
    p_total,
    p_edge_keys,
    p_edge_values,
    E,
    W: tl.constexpr,
    terms: tl.constexpr,
    address: tl.constexpr,
    LEAF: tl.constexpr,
    BLOCK: tl.constexpr,
    BB: tl.constexpr,
    BW: tl.constexpr,
):
    """Sum runs of equal keys [E]; key -1 is no row. Grid: (tiles of BB blocks, column tiles).

    LEAF: entry e is term p_terms[e], its value read from p_grad. Otherwise it is a partial sum p_values[e].
    Each lane of [BB, BW] walks the entries of its block, stores a run where it ends, and keeps the block's edges.
    """
    ACC: tl.constexpr = p_edge_values.dtype.element_ty
    i_block = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    o_w = tl.program_id(1) * BW + tl.arange(0, BW)
    m_w = o_w < W
    o_first = i_block * BLOCK

    b_first = tl.load(p_keys + o_first, mask=o_first < E, other=-1).to(tl.int64)
    m_head = (i_block > 0) & (o_first < E) & (b_first >= 0)
    m_head = m_head & (tl.load(p_keys + o_first - 1, mask=m_head, other=-1) == b_first)
    m_open = m_head  # the current run began in an earlier block
    m_same = m_head
    b_key, b_last = b_first, b_first
    b_sum = tl.zeros([BB, BW], ACC)
    b_head = tl.zeros([BB, BW], ACC)
    for i in range(BLOCK):
        o_e = o_first + i
        m_e = (o_e < E) & (b_key >= 0)
        if LEAF:
            b_term = tl.load(p_terms + o_e, mask=m_e, other=0)
            b_sum += term_gradient(p_grad, p_chain, b_term, m_e, o_w, m_w, W, ACC, terms, address)
        else:
            p_value = p_values + (o_e * W)[:, None] + o_w[None, :]
            b_sum += tl.load(p_value, mask=m_e[:, None] & m_w[None, :], other=0.0)
        b_next = tl.load(p_keys + o_e + 1, mask=o_e + 1 < E, other=-1).to(tl.int64)
        m_same = m_e & (b_next == b_key)
        m_end = m_e & (b_next != b_key)
        p_row = p_total + (b_key * W)[:, None] + o_w[None, :]
        m_store = (m_end & ~m_open)[:, None] & m_w[None, :]
        tl.store(p_row, b_sum.to(p_total.dtype.element_ty), mask=m_store)
        b_head = tl.where((m_end & m_open)[:, None], b_sum, b_head)
        b_sum = tl.where(m_end[:, None], 0.0, b_sum)
        m_open = m_open & m_same
        b_last, b_key = b_key, b_next

    # A run that fills the whole block is head and tail at once: its sum is the head's, a zero keeps the two adjacent.
    b_head = tl.where((m_open & m_same)[:, None], b_sum, b_head)
    b_tail = tl.where(m_open[:, None], 0.0, b_sum)
    m_block = o_first < E
    tl.store(p_edge_keys + i_block * 2, tl.where(m_head, b_first, -1), mask=m_block)
    tl.store(p_edge_keys + i_block * 2 + 1, tl.where(m_same, b_last, -1), mask=m_block)
    p_edge = p_edge_values + (i_block * (2 * W))[:, None] + o_w[None, :]
    tl.store(p_edge, b_head, mask=m_head[:, None] & m_w[None, :])
    tl.store(p_edge + W, b_tail, mask=m_same[:, None] & m_w[None, :])


def _sum_sorted(grad: Tensor, rows: Tensor, chain: Tensor | None, spec: AddressSpec) -> Tensor:
    """Dense gradient from the rows of all terms ``[M, pairs, H]``."""
    W = grad.shape[-1] // spec.heads
    total = zero_table(spec, W, grad.dtype, grad.device)
    if not rows.numel() or not grad.numel():
        return total
    keys, order = torch.sort(rows.flatten(), stable=True)
    values, terms, address = None, terms_of(spec), address_of(spec)
    BW = min(triton.next_power_of_2(W), 256)
    BB = min(max(1024 // BW, 1), 64)
    while True:
        entries = keys.numel()
        n_blocks = blocks(entries, BLOCK)
        edge_keys = torch.empty((2 * n_blocks,), dtype=keys.dtype, device=grad.device)
        edge_values = torch.empty((2 * n_blocks, W), dtype=accumulator(grad.dtype), device=grad.device)
        grid = (blocks(n_blocks, BB), blocks(W, BW))
        segment_sum_kernel[grid](
            keys, order, grad, chain, values, total, edge_keys, edge_values, entries,
            W, terms, address, values is None, BLOCK, BB, BW, **LAUNCH,
        )  # fmt: skip
        if n_blocks == 1:
            return total
        keys, values = edge_keys, edge_values


def _row_dtype(spec: AddressSpec) -> torch.dtype:
    return torch.int32 if spec.total_rows < 1 << 31 else torch.int64


def prefix_memory_bwd(grad: Tensor, codes: Tensor, spec: AddressSpec) -> Tensor:
    """Dense gradient ``[R, w]`` in the dtype of the contiguous grad ``[M, A, H * w]``; the same bits every run."""
    rows = pair_rows(codes, terms_of(spec).pairs, _row_dtype(spec), spec)
    return _sum_sorted(grad, rows, None, spec)


def token_memory_bwd(
    grad: Tensor, input_ids: Tensor, token_table: Tensor, segment_ids: Tensor | None, spec: AddressSpec
) -> Tensor:
    """Dense gradient ``[R, w]`` in the dtype of the contiguous grad ``[B, T, H * w]``; the same bits every run."""
    pairs = terms_of(spec).pairs
    rows, chain = token_pair_rows(input_ids, token_table, segment_ids, pairs, _row_dtype(spec), spec)
    return _sum_sorted(grad, rows, chain, spec)
