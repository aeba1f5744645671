"""Sums put aside between launches: stored and loaded in tiles whose threads hold what they hold of the table.

A thread holds 8 columns of a table of 16-bit numbers, and 16 bytes are the most that it stores at once. Stored as
float32 these would be 4 columns, and the threads would have to exchange theirs first, every turn and for nothing where
the mask is off. So the sums of such tables go as their upper and their lower 16 bits, each half of the tensor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixmem_fast._dtypes import accumulator


def room_for_sums(count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for `count` sums of rows of `width` of a table of `dtype`."""
    if dtype.itemsize == 2:
        return torch.empty(2, count, width, dtype=torch.int16, device=device)
    return torch.empty(count, width, dtype=accumulator(dtype), device=device)


@triton.jit
def put_aside(p, b_sum, m, half):
    """Store float32 sums, or float64 ones; `half` is how many numbers lie between their two halves."""
    if p.dtype.element_ty == tl.int16:
        b_bits = b_sum.to(tl.int32, bitcast=True)
        tl.store(p, (b_bits >> 16).to(tl.int16), mask=m)
        tl.store(p + half, b_bits.to(tl.int16), mask=m)
    else:
        tl.store(p, b_sum, mask=m)


@triton.jit
def take_aside(p, m, half):
    """Load what `put_aside` has stored, 0 where masked."""
    if p.dtype.element_ty == tl.int16:
        b_upper = tl.load(p, mask=m, other=0).to(tl.int32) << 16
        b_lower = tl.load(p + half, mask=m, other=0).to(tl.int32) & 0xFFFF
        b_sum = (b_upper | b_lower).to(tl.float32, bitcast=True)
    else:
        b_sum = tl.load(p, mask=m, other=0.0)
    return b_sum
