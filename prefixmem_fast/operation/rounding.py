"""Stochastic rounding of float32 to bfloat16, from a counter-based generator.

    bits(x) + r, r uniform in 0 .. 2^16 - 1, cut to the upper 16 bits

rounds x up with a probability equal to the part that is cut off, so the expected result is x. r depends on nothing but
(seed, step, row, column): the same bits on every backend, whatever the launch.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio, odd
MULTIPLIERS = (0x21F0AAAD, 0xD35A2D97)


def _signed(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers in which every input bit reaches every output bit.

    x ^= x >> 16; x *= a; x ^= x >> 15; x *= b; x ^= x >> 15, unsigned and modulo 2^32; a and b from C. Wellons' search
    for such functions ("hash prospector").
    """
    x = x ^ (x >> 16 & 0xFFFF)
    x = x * _signed(MULTIPLIERS[0])
    x = x ^ (x >> 15 & 0x1FFFF)
    x = x * _signed(MULTIPLIERS[1])
    return x ^ (x >> 15 & 0x1FFFF)


def mix_word(x: int) -> int:
    """`mix` of one unsigned integer."""
    x = (x ^ x >> 16) * MULTIPLIERS[0] & 0xFFFFFFFF
    x = (x ^ x >> 15) * MULTIPLIERS[1] & 0xFFFFFFFF
    return x ^ x >> 15


@lru_cache(maxsize=64)
def mix_seed(seed: int) -> int:
    """What the words of a step and a row are mixed into: 0 .. 2^32 - 1."""
    return mix_word(mix_word(seed & 0xFFFFFFFF) ^ seed >> 32 & 0xFFFFFFFF)


def random_bits(seed: int, step: Tensor, rows: Tensor, width: int) -> Tensor:
    """int32 ``[U, width]`` in 0 .. 2^16 - 1, for rows ``[U]`` of the table and its step (a 0-dimensional tensor).

    One 32-bit word serves two columns: its product with the first multiplier gives the even one the upper 16 bits, that
    with the second the odd one.
    """
    key = mix(_low_word(step) ^ _signed(mix_seed(seed)))
    key = mix(key ^ (_low_word(rows) + _low_word(rows >> 32) * _signed(GOLDEN)))
    pair = torch.arange(1, (width + 1) // 2 + 1, dtype=torch.int32, device=rows.device)
    words = key[:, None] * (pair * _signed(GOLDEN) | 1)
    words = words ^ (words >> 15 & 0x1FFFF)
    bits = [words * _signed(multiplier) >> 16 & 0xFFFF for multiplier in MULTIPLIERS]
    return torch.stack(bits, dim=2).flatten(1)[:, :width]


def _low_word(x: Tensor) -> Tensor:
    """The lower 32 bits of int64, as int32."""
    return (((x & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).to(torch.int32)


def stochastic_round(x: Tensor, random: Tensor) -> Tensor:
    """float32 to bfloat16 with random integers of 16 bits; infinities and NaN stay what they are."""
    bits = x.contiguous().view(torch.int32)
    rounded = ((bits + random) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isfinite(), rounded, x.to(torch.bfloat16))
