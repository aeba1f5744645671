"""Semantic IDs in a token stream: device functions that find them, follow them and pack them into lanes.

A token of level l belongs to a SID where the l - 1 tokens before it have the levels 1 .. l - 1 in that order, in the
same row and the same packed segment. The table [V, 2] gives (level, code) of every vocabulary id, level 0 for text.

A window of two items is read as one long SID. Its tokens have the levels 1 .. L and 1 .. L again; those of the items
between the two, `gap` of them, have to follow the same pattern, and their codes are not read.
"""

from __future__ import annotations

from collections.abc import Hashable

import triton
import triton.language as tl

from prefixmem_fast.addressing import TokenStream

from .address import append_code
from .tiles import Tile, aligned


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
def load_entry(p_table, b_id, V):
    """(level, code) of vocabulary ids [BT]; level 0 outside the table."""
    m_known = (b_id >= 0) & (b_id < V)
    b_level = tl.load(p_table + b_id * 2, mask=m_known, other=0)  # [BT]
    b_code = tl.load(p_table + b_id * 2 + 1, mask=m_known, other=-1)  # [BT]
    return b_level, b_code


@triton.jit
def load_token(p_ids, p_table, o_t, m_t, V):
    """(level, code) of tokens; level 0 where masked or outside the table."""
    return load_entry(p_table, tl.load(p_ids + o_t, mask=m_t, other=-1).to(tl.int64), V)


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

    Returns the tuple of [BM] codes, how many stand before the prefix ends, and the last level of which there is a
    token: that of level l stands at o_t + l - 1 + gap. A SID cut before the first active level is given length 0: none
    of its rows is used.
    """
    LAST: tl.constexpr = address.last_active
    ITEM: tl.constexpr = address.item_levels
    GAP: tl.constexpr = address.gap
    b_ids, m_ids = (), ()  # every token, then every entry: one after the other they would be as many trips to memory
    for i in tl.static_range(LAST + GAP):
        m_t = m_t & (o_t + i < T)
        b_ids = b_ids + (tl.load(p_ids + o_t + i, mask=m_t, other=-1).to(tl.int64),)  # [BM]
        m_ids = m_ids + (m_t if i == 0 else same_segment(p_segments, o_t, o_t + i, m_t),)
    b_levels, b_all = (), ()
    for i in tl.static_range(LAST + GAP):
        b_level, b_code = load_entry(p_table, b_ids[i], V)
        b_levels, b_all = b_levels + (b_level,), b_all + (b_code,)
    b_codes = ()
    b_length = tl.zeros_like(o_t).to(tl.int32)
    b_n_tokens = tl.zeros_like(b_length)
    for i in tl.static_range(LAST + GAP):
        m_next = m_ids[i] & (b_n_tokens == i) & (b_levels[i] == i % ITEM + 1)
        b_n_tokens += m_next.to(tl.int32)
        if i < ITEM:
            b_codes, b_length = append_code(b_codes, b_length, tl.where(m_next, b_all[i], -1), i + 1, address)
        elif i >= ITEM + GAP:
            b_codes, b_length = append_code(b_codes, b_length, tl.where(m_next, b_all[i], -1), i + 1 - GAP, address)
    if GAP > 0:
        b_n_tokens = tl.maximum(b_n_tokens - GAP, 0)
    return b_codes, tl.where(b_n_tokens >= address.first_active, b_length, 0), b_n_tokens


@triton.jit
def load_codes_before(p_ids, p_table, p_segments, o_t, m_t, V, address: tl.constexpr):
    """What the tokens o_t [BM] of a row stand for: their level, 0 where that is not an active one or their SID is
    broken; the codes of their SIDs from the first one on, as a tuple of [BM]; how many stand before the prefix ends;
    and the codes as they look back, the token's own first.
    """
    LAST: tl.constexpr = address.last_active
    ITEM: tl.constexpr = address.item_levels
    GAP: tl.constexpr = address.gap
    b_ids, m_ids = (), ()  # every token, then every entry: one after the other they would be as many trips to memory
    for back in tl.static_range(LAST + GAP):
        m_back = m_t & (o_t >= back)
        b_ids = b_ids + (tl.load(p_ids + o_t - back, mask=m_back, other=-1).to(tl.int64),)  # [BM]
        m_ids = m_ids + (m_back if back == 0 else same_segment(p_segments, o_t, o_t - back, m_back),)
    b_levels, b_before = (), ()
    for back in tl.static_range(LAST + GAP):
        b_level, b_code = load_entry(p_table, b_ids[back], V)
        b_levels, b_before = b_levels + (tl.where(m_ids[back], b_level, 0),), b_before + (b_code,)
    b_level = tl.zeros_like(b_levels[0])
    for l in tl.static_range(1, LAST + 1):
        if address.slot_of_level[l - 1] >= 0:
            m_whole = b_levels[0] == (l - 1) % ITEM + 1
            for back in tl.static_range(1, l + GAP):
                m_whole = m_whole & (b_levels[back] == (l + GAP - back - 1) % ITEM + 1)
            b_level = tl.where(m_whole, l, b_level)
    b_codes = ()
    b_length = tl.zeros_like(b_level)
    for position in tl.static_range(1, LAST + 1):
        b_code = tl.full(b_level.shape, -1, b_before[0].dtype)
        for l in tl.static_range(position, LAST + 1):
            if position <= ITEM:
                b_code = tl.where(b_level == l, b_before[l - position + GAP], b_code)
            else:
                b_code = tl.where(b_level == l, b_before[l - position], b_code)
        b_codes, b_length = append_code(b_codes, b_length, b_code, position, address)
    return b_level, b_codes, b_length, b_before


@triton.jit
def last_codes(b_before, m_m, COUNT: tl.constexpr, address: tl.constexpr):
    """The last COUNT codes up to tokens, first to last, of codes that look back; 0 where masked."""
    INDEX: tl.constexpr = tl.int64 if address.wide else tl.int32
    b_last = ()
    for i in tl.static_range(COUNT):
        b_last = b_last + (tl.where(m_m, b_before[COUNT - 1 - i], 0).to(INDEX),)
    return b_last


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


def kind_of_stream(stream: TokenStream) -> tuple[Hashable, ...]:
    """What Triton compiles the kernels of a token stream anew for; see `Launch`."""
    input_ids, token_table, segment_ids = stream
    segments = None if segment_ids is None else segment_ids.dtype
    narrow = input_ids.shape[1] < 1 << 31, token_table.shape[0] < 1 << 31
    return input_ids.dtype, segments, token_table.dtype, aligned(token_table), *narrow
