"""What becomes of a row's summed gradient: stored, or spent on an update of the row. Every backward kernel ends here.

The updates are those of `prefixmem_fast/operation/rules.py`, in registers: the row and its state are read once and
written once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Destination(NamedTuple):
    """Run-time arguments: a table of sums, or the weight with its optimizer's state and numbers."""

    table: Tensor  # [R, W]
    first_moment: Tensor | None = None  # first moment [R, W]
    second_moment: Tensor | None = None  # second moment or sum, [R] or [R, W]
    step: Tensor | None = None  # int64, for the random bits
    correction1: Tensor | None = None
    correction2: Tensor | None = None
    lr: Tensor | float = 0.0
    weight_decay: float = 0.0
    eps: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    seed: int = 0  # mixed already
    squares: Tensor | None = None  # sum of the squared gradient, one a program


class Epilogue(NamedTuple):
    """Compile-time arguments: the name of the update's rule, and which of its optional parts it has."""

    rule: str = "store"
    decays: bool = False
    scheduled: bool = False  # lr is read from memory
    rounds: bool = False  # stochastically, to bfloat16


STORE = Epilogue()


def with_squares(
    destination: Destination, squares: list[Tensor] | None, programs: int, dtype: torch.dtype
) -> Destination:
    """The destination of one launch, with room for a sum of squares a program, added to `squares`; None asks none."""
    if squares is None:
        return destination
    squares.append(torch.empty((programs,), dtype=dtype, device=destination.table.device))
    return destination._replace(squares=squares[-1])


@triton.jit
def mix(b):
    """See `prefixmem_fast/operation/rounding.py`; b is uint32."""
    b = b ^ (b >> 16)
    b = b * 0x21F0AAAD
    b = b ^ (b >> 15)
    b = b * 0xD35A2D97
    return b ^ (b >> 15)


@triton.jit
def round_stochastically(b, b_row, o_w, p_step, seed):
    """float32 [BB, BH, BW] of rows [BB, BH] to bfloat16."""
    b_key = (tl.zeros_like(b_row) + seed).to(tl.uint32)
    b_key = mix(b_key ^ (tl.load(p_step) & 0xFFFFFFFF).to(tl.uint32))
    b_key = mix(b_key ^ (b_row & 0xFFFFFFFF).to(tl.uint32))
    b_key = mix(b_key ^ (b_row >> 32).to(tl.uint32))
    b_pair = (o_w // 2 + 1).to(tl.uint32) * 0x9E3779B9
    b_word = mix(b_key[:, :, None] + b_pair[None, None, :])
    b_random = tl.where((o_w % 2 == 0)[None, None, :], b_word & 0xFFFF, b_word >> 16).to(tl.int32)
    b_bits = b.to(tl.int32, bitcast=True)
    m_finite = (b_bits & 0x7F800000) != 0x7F800000
    b_bits = tl.where(m_finite, b_bits + b_random, b_bits)
    return (b_bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def write_rows(destination, b_row, b_sum, m_row, o_w, W: tl.constexpr, epilogue: tl.constexpr):
    """Sums [BB, BH, BW] of rows [BB, BH] where m_row; the tile holds whole rows unless they are only stored."""
    p_table = destination.table
    o_e = (b_row * W)[:, :, None] + o_w[None, None, :]
    m_e = m_row[:, :, None] & (o_w < W)[None, None, :]
    if epilogue.rule == "store":
        tl.store(p_table + o_e, b_sum.to(p_table.dtype.element_ty), mask=m_e)  # [BB, BH, BW]
    else:
        if epilogue.scheduled:
            lr = tl.load(destination.lr).to(b_sum.dtype)
        else:
            lr = destination.lr
        b_w = tl.load(p_table + o_e, mask=m_e, other=0.0).to(b_sum.dtype)  # [BB, BH, BW]
        if epilogue.decays:
            b_w = b_w * (1 - lr * destination.weight_decay)
        if epilogue.rule == "sgd":
            b_w = b_w - lr * b_sum
        elif epilogue.rule == "row_adagrad":
            p_total = destination.second_moment + b_row
            b_total = tl.load(p_total, mask=m_row, other=0.0) + tl.sum(b_sum * b_sum, 2) / W  # [BB, BH]
            tl.store(p_total, b_total, mask=m_row)  # [BB, BH]
            b_w = b_w - (lr / (tl.sqrt(b_total) + destination.eps))[:, :, None] * b_sum
        else:
            b_mean = b_sum
            if destination.first_moment is not None:
                b_first = tl.load(destination.first_moment + o_e, mask=m_e, other=0.0)  # [BB, BH, BW]
                b_first = destination.beta1 * b_first + (1 - destination.beta1) * b_sum
                tl.store(destination.first_moment + o_e, b_first, mask=m_e)  # [BB, BH, BW]
                b_mean = b_first / tl.load(destination.correction1)
            correction = tl.load(destination.correction2)
            if epilogue.rule == "row_adam":
                p_second = destination.second_moment + b_row
                b_second = tl.load(p_second, mask=m_row, other=0.0)  # [BB, BH]
                b_second = destination.beta2 * b_second + (1 - destination.beta2) * (tl.sum(b_sum * b_sum, 2) / W)
                tl.store(p_second, b_second, mask=m_row)  # [BB, BH]
                b_w = b_w - (lr / (tl.sqrt(b_second / correction) + destination.eps))[:, :, None] * b_mean
            else:
                p_second = destination.second_moment + o_e
                b_second = tl.load(p_second, mask=m_e, other=0.0)  # [BB, BH, BW]
                b_second = destination.beta2 * b_second + (1 - destination.beta2) * (b_sum * b_sum)
                tl.store(p_second, b_second, mask=m_e)  # [BB, BH, BW]
                b_w = b_w - lr / (tl.sqrt(b_second / correction) + destination.eps) * b_mean
        if epilogue.rounds:
            tl.store(p_table + o_e, round_stochastically(b_w, b_row, o_w, destination.step, destination.seed), mask=m_e)
        else:
            tl.store(p_table + o_e, b_w.to(p_table.dtype.element_ty), mask=m_e)  # [BB, BH, BW]


@triton.jit
def store_squares(destination, b_squares):
    """A program's sum of the squares [..] of the rows that it wrote."""
    if destination.squares is not None:
        i_program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tl.store(destination.squares + i_program, tl.sum(b_squares))
