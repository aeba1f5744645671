"""Semantic IDs in a token stream: device functions that find them, follow them and pack them into lanes.

A token of level l belongs to a SID where the l - 1 tokens before it have the levels 1 .. l - 1 in that order, in the
same row and the same packed segment. The table [V, 2] gives (level, code) of every vocabulary id, level 0 for text.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .address import append_code
from .tiles import Tile


@triton.jit
def token_tile(T, BT: tl.constexpr):
    """Row (int64) and token offsets [BT] within it of this program's tile; a tile never spans two rows."""
    n_tiles = (T + BT - 1) // BT
    return (tl.program_id(0) // n_tiles).to(tl.int64), tl.program_id(0) % n_tiles * BT + tl.arange(0, BT)


@triton.jit
def load_level(p_ids, p_table, o_t, m_t, V):
    """Levels of tokens, 0 where masked or outside the table."""
    b_id = tl.load(p_ids + o_t, mask=m_t, other=-1).to(tl.int64)  # [BT]
    return tl.load(p_table + b_id * 2, mask=(b_id >= 0) & (b_id < V), other=0)  # [BT]


@triton.jit
def load_token(p_ids, p_table, o_t, m_t, V):
    """(level, code) of tokens; level 0 where masked or outside the table."""
    b_id = tl.load(p_ids + o_t, mask=m_t, other=-1).to(tl.int64)  # [BT]
    m_known = (b_id >= 0) & (b_id < V)
    b_level = tl.load(p_table + b_id * 2, mask=m_known, other=0)  # [BT]
    b_code = tl.load(p_table + b_id * 2 + 1, mask=m_known, other=-1)  # [BT]
    return b_level, b_code


@triton.jit
def same_segment(p_segments, o_t, o_other, m_t):
    """Mask of tokens in one packed segment; everything is one segment where none are given."""
    if p_segments is not None:
        b_segment = tl.load(p_segments + o_t, mask=m_t, other=0)  # [BT]
        m_t = m_t & (b_segment == tl.load(p_segments + o_other, mask=m_t, other=0))  # [BT]
    return m_t


@triton.jit
def load_token_codes(p_ids, p_table, p_segments, o_t, m_t, T, V, address: tl.constexpr):
    """Codes of the SIDs whose first token is o_t of a row of T, read forward up to the last active level.

    Returns the tuple of [BM] codes, how many stand before the prefix ends, and how many tokens follow one another.
    A SID cut before the first active level is given length 0: none of its rows is used.
    """
    LAST: tl.constexpr = address.last_active
    b_codes = ()
    b_length = tl.zeros_like(o_t).to(tl.int32)
    b_n_tokens = tl.zeros_like(b_length)
    for l in tl.static_range(1, LAST + 1):
        m_next = m_t & (b_n_tokens == l - 1) & (o_t + (l - 1) < T)
        if l > 1:
            m_next = same_segment(p_segments, o_t, o_t + (l - 1), m_next)
        b_level, b_code = load_token(p_ids, p_table, o_t + (l - 1), m_next, V)
        m_next = m_next & (b_level == l)
        b_n_tokens += m_next.to(tl.int32)
        b_codes, b_length = append_code(b_codes, b_length, tl.where(m_next, b_code, -1), l, address)
    return b_codes, tl.where(b_n_tokens >= address.first_active, b_length, 0), b_n_tokens


@triton.jit
def stands_at_active_level(p_ids, p_table, p_segments, o_t, m_t, V, address: tl.constexpr):
    """Mask of tokens at an active level of a whole SID: the tokens before them have the levels 1, 2, .. in order."""
    LAST: tl.constexpr = address.last_active
    b_level = load_level(p_ids, p_table, o_t, m_t, V)
    m_active = tl.zeros_like(m_t)
    for l in tl.static_range(1, LAST + 1):
        if address.slot_of_level[l - 1] >= 0:
            m_active = m_active | (b_level == l)
    m_active = m_active & (b_level <= o_t + 1)
    for back in tl.static_range(1, LAST):
        m_back = same_segment(p_segments, o_t, o_t - back, m_active & (b_level > back))
        b_before = load_level(p_ids, p_table, o_t - back, m_back, V)
        m_active = m_active & ((b_level <= back) | (m_back & (b_before == b_level - back)))
    return m_active


@triton.jit
def rank_tokens(m_t):
    """Number the marked tokens of a tile [BT]: the rank of each, and how many there are."""
    return tl.cumsum(m_t.to(tl.int32), 0) - 1, tl.sum(m_t.to(tl.int32), 0)


@triton.jit
def ranked_tokens(m_t, b_rank, o_t, o_rank):
    """Offsets [BM] of the marked tokens of rank o_rank: compacts a sparse tile [BT] into dense lanes."""
    m_is = m_t[None, :] & (b_rank[None, :] == o_rank[:, None])  # [BM, BT]
    return tl.sum(tl.where(m_is, o_t[None, :], 0), 1)


def token_blocks(tile: Tile) -> tuple[int, int]:
    """BT tokens a program owns, and BM of them or of its SIDs at a time: BM x BT comparisons fit the registers."""
    BM = min(tile.BM, 16)
    return max(4 * BM, 16), BM
