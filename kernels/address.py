"""Device functions that all kernels share: codes in registers, the prefix hash, the row of an order.

Names inside the kernels: `o_` offsets, `m_` masks, `p_` pointer tiles, `b_` loaded or computed blocks, `i_` program
indices. Tile shapes: BM SIDs, BH heads, BW columns of a head's row, BT tokens.

`Address` is the AddressSpec as compile-time constants: the modulus and the primes become immediates, and unused orders
vanish. Levels and orders count from 1; tuples are indexed from 0.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixmem_fast.spec import AddressSpec


class Address(NamedTuple):
    codebook_sizes: tuple[int, ...]
    multipliers: tuple[tuple[int, ...], ...]  # [position][head]
    rows: tuple[int, ...]  # rows of one head's table, by order
    starts: tuple[int, ...]  # first row of an order's block
    exact: tuple[bool, ...]  # by order
    slot_of_level: tuple[int, ...]  # index of the level among the active ones, -1 where inactive
    levels: int  # L, codes a SID
    orders: int  # orders that exist at some level
    heads: int
    active: int  # A, number of active levels
    first_active: int
    last_active: int
    mode: str
    wide: bool  # 64-bit products and indices


@lru_cache(maxsize=64)
def address_of(spec: AddressSpec) -> Address:
    return Address(
        codebook_sizes=spec.codebook_sizes,
        multipliers=spec.multipliers,
        rows=spec.rows_per_order,
        starts=tuple(heads[0] for heads in spec.offsets),
        exact=tuple(n in spec.exact_orders for n in range(1, spec.max_order + 1)),
        slot_of_level=tuple(
            spec.active_levels.index(level) if level in spec.active_levels else -1
            for level in range(1, spec.levels + 1)
        ),
        levels=spec.levels,
        orders=min(spec.max_order, spec.levels),
        heads=spec.heads,
        active=len(spec.active_levels),
        first_active=spec.active_levels[0],
        last_active=spec.active_levels[-1],
        mode=spec.mode,
        wide=spec.product_bits > 31 or max(spec.rows_per_order) >= 1 << 31,
    )


@triton.jit
def hash_factor(b_code, o_h, POSITION: tl.constexpr, address: tl.constexpr):
    """c * p[position, h] as [BM, BH]. The primes are immediates, picked by selects: nothing is read from memory."""
    H: tl.constexpr = address.heads
    PRIMES: tl.constexpr = address.multipliers[POSITION]
    b_prime = tl.full(o_h.shape, PRIMES[0], b_code.dtype)
    for h in tl.static_range(1, H):
        b_prime = tl.where(o_h == h, PRIMES[h], b_prime)
    return b_code[:, None] * b_prime[None, :]


@triton.jit
def order_rows(b_codes, b_length, o_h, LEVEL: tl.constexpr, ORDER: tl.constexpr, address: tl.constexpr):
    """Rows of one order at one level for BM SIDs and BH heads.

    b_codes is a tuple of [BM] codes, b_length [BM] the number of codes before the prefix ends.
    Returns int64 [BM, BH] and the mask [BM] of rows that exist.
    """
    FIRST: tl.constexpr = LEVEL - ORDER if address.mode == "suffix" else 0
    ROWS: tl.constexpr = address.rows[ORDER - 1]
    START: tl.constexpr = address.starts[ORDER - 1]
    if address.exact[ORDER - 1]:
        b_index = b_codes[0]
        for i in tl.static_range(1, ORDER):
            b_index = b_index * address.codebook_sizes[i] + b_codes[i]
        b_index = b_index[:, None]
    else:
        b_index = hash_factor(b_codes[FIRST], o_h, 0, address)
        for i in tl.static_range(1, ORDER):
            b_index = b_index ^ hash_factor(b_codes[FIRST + i], o_h, i, address)
        b_index = b_index % ROWS
    b_row = b_index.to(tl.int64) + (START + o_h.to(tl.int64) * ROWS)[None, :]
    return b_row, b_length >= FIRST + ORDER


@triton.jit
def append_code(b_codes, b_length, b_code, LEVEL: tl.constexpr, address: tl.constexpr):
    """Take in the code of a level: keep and count it while the prefix lives; an invalid one ends the prefix."""
    INDEX: tl.constexpr = tl.int64 if address.wide else tl.int32
    SIZE: tl.constexpr = address.codebook_sizes[LEVEL - 1]
    b_code = b_code.to(tl.int64)
    m_valid = (b_code >= 0) & (b_code < SIZE) & (b_length == LEVEL - 1)
    return b_codes + (tl.where(m_valid, b_code, 0).to(INDEX),), b_length + m_valid.to(tl.int32)


@triton.jit
def load_sid_codes(p_codes, o_m, m_m, LAST: tl.constexpr, address: tl.constexpr):
    """Codes of levels 1 .. LAST of BM SIDs as a tuple of [BM], and how many stand before the prefix ends."""
    L: tl.constexpr = address.levels
    b_codes = ()
    b_length = tl.zeros_like(o_m).to(tl.int32)
    for l in tl.static_range(1, LAST + 1):
        b_code = tl.load(p_codes + o_m * L + (l - 1), mask=m_m, other=-1)
        b_codes, b_length = append_code(b_codes, b_length, b_code, l, address)
    return b_codes, b_length


@triton.jit
def load_token(p_ids, p_table, o_t, m_t, V):
    """(level, code) of tokens; level 0 where masked or outside the table."""
    b_id = tl.load(p_ids + o_t, mask=m_t, other=-1).to(tl.int64)
    m_known = (b_id >= 0) & (b_id < V)
    b_level = tl.load(p_table + b_id * 2, mask=m_known, other=0)
    b_code = tl.load(p_table + b_id * 2 + 1, mask=m_known, other=-1)
    return b_level, b_code


@triton.jit
def same_segment(p_segments, o_t, o_other, m_t):
    """Mask of tokens in one packed segment; everything is one segment where none are given."""
    if p_segments is not None:
        b_segment = tl.load(p_segments + o_t, mask=m_t, other=0)
        m_t = m_t & (b_segment == tl.load(p_segments + o_other, mask=m_t, other=0))
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
    b_chain = tl.zeros_like(b_length)
    for l in tl.static_range(1, LAST + 1):
        m_next = m_t & (b_chain == l - 1) & (o_t + (l - 1) < T)
        if l > 1:
            m_next = same_segment(p_segments, o_t, o_t + (l - 1), m_next)
        b_level, b_code = load_token(p_ids, p_table, o_t + (l - 1), m_next, V)
        m_next = m_next & (b_level == l)
        b_chain += m_next.to(tl.int32)
        b_codes, b_length = append_code(b_codes, b_length, tl.where(m_next, b_code, -1), l, address)
    return b_codes, tl.where(b_chain >= address.first_active, b_length, 0), b_chain


@triton.jit
def rank_tokens(m_t):
    """Number the marked tokens of a tile [BT]: the rank of each, and how many there are."""
    return tl.cumsum(m_t.to(tl.int32), 0) - 1, tl.sum(m_t.to(tl.int32), 0)


@triton.jit
def ranked_tokens(m_t, b_rank, o_t, o_rank):
    """Offsets [BM] of the marked tokens of rank o_rank: compacts a sparse tile [BT] into dense lanes."""
    m_is = m_t[None, :] & (b_rank[None, :] == o_rank[:, None])  # [BM, BT]
    return tl.sum(tl.where(m_is, o_t[None, :], 0), 1)


@triton.jit
def column_tile(i_block, H: tl.constexpr, W: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr):
    """Heads and columns of tile i_block of a row of H x W: offsets [BH], [BW], element offsets and mask [1, BH, BW]."""
    N_W: tl.constexpr = (W + BW - 1) // BW
    o_h = i_block // N_W * BH + tl.arange(0, BH)
    o_w = i_block % N_W * BW + tl.arange(0, BW)
    o_d = (o_h[:, None] * W + o_w[None, :])[None, :, :]
    m_d = ((o_h < H)[:, None] & (o_w < W)[None, :])[None, :, :]
    return o_h, o_w, o_d, m_d


@triton.jit
def token_tile(T, BT: tl.constexpr):
    """Row (int64) and token offsets [BT] within it of this program's tile; a tile never spans two rows."""
    n_tiles = (T + BT - 1) // BT
    return (tl.program_id(0) // n_tiles).to(tl.int64), tl.program_id(0) % n_tiles * BT + tl.arange(0, BT)


def zero_table(spec: AddressSpec, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table of zeros to sum a dense gradient in."""
    return torch.zeros((spec.total_rows, width), dtype=dtype, device=device)


class Tile(NamedTuple):
    """Block sizes of one launch, and how many column tiles cover a row of H x W."""

    BM: int
    BH: int
    BW: int
    columns: int


def tile_of(heads: int, width: int, dtype: torch.dtype, budget: int) -> Tile:
    """A tile whose accumulator takes `budget` bytes a program: float64 for a float64 table, else float32."""
    elements = budget // (8 if dtype == torch.float64 else 4)
    BW = min(triton.next_power_of_2(width), elements)
    BH = min(triton.next_power_of_2(heads), elements // BW)
    BM = min(elements // (BH * BW), 64)
    return Tile(BM, BH, BW, triton.cdiv(heads, BH) * triton.cdiv(width, BW))


def token_tile_of(tile: Tile) -> int:
    """BT, tokens a program owns: the SIDs among them should fill the BM lanes at about one SID in four tokens."""
    return max(4 * tile.BM, 16)


# Sums hold no product to contract; naming the option keeps the bits equal across Triton's changing defaults.
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}
