"""Addresses in registers: codes, the prefix hash, the row of an order. Every kernel takes its rows from here.

`Address` is the AddressSpec as compile-time constants: the modulus and the primes become immediates, and unused orders
vanish. Levels and orders count from 1; tuples are indexed from 0.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl

from prefixmem_fast.addressing import AddressSpec


class Address(NamedTuple):
    codebook_sizes: tuple[int, ...]  # by level of the window
    multipliers: tuple[tuple[int, ...], ...]  # [position][head]
    rows: tuple[int, ...]  # rows of one head's table, by order
    starts: tuple[int, ...]  # first row of an order's block
    exact: tuple[bool, ...]  # by order
    slot_of_level: tuple[int, ...]  # index of the level among the active ones, -1 where inactive
    levels: int  # codes a SID, or a window of two
    item_levels: int  # L, codes a SID
    gap: int  # tokens of the items between the two of a window, which are not read
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
        codebook_sizes=spec.window_sizes,
        multipliers=spec.multipliers,
        rows=spec.rows_per_order,
        starts=tuple(heads[0] for heads in spec.offsets),
        exact=tuple(n in spec.exact_orders for n in range(1, spec.max_order + 1)),
        slot_of_level=tuple(
            spec.active_levels.index(level) if level in spec.active_levels else -1
            for level in range(1, spec.levels + 1)
        ),
        levels=spec.levels,
        item_levels=spec.item_levels,
        gap=spec.gap,
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
        b_code = tl.load(p_codes + o_m * L + (l - 1), mask=m_m, other=-1)  # [BM]
        b_codes, b_length = append_code(b_codes, b_length, b_code, l, address)
    return b_codes, b_length
