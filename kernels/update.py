"""What becomes of a row's summed gradient: stored, or spent on an update of the row. Every backward kernel ends here.

The updates are those of `prefixmem_fast/optim/rules.py`, in registers: the row and its state are read once and written
once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from prefixmem_fast.optim.rows import RowUpdate


class Destination(NamedTuple):
    """Run-time arguments: a table of sums, or the weight with its optimizer's state and numbers."""

    table: Tensor  # [R, W]
    first: Tensor | None = None  # first moment [R, W]
    second: Tensor | None = None  # second moment or sum, [R] or [R, W]
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


class Rule(NamedTuple):
    """Compile-time arguments: which update, and which of the optional parts it has."""

    name: str = "store"
    decays: bool = False
    scheduled: bool = False  # lr is read from memory
    rounds: bool = False  # stochastically, to bfloat16


STORE = Rule()


def counting(destination: Destination, update: RowUpdate | None, programs: int, dtype: torch.dtype) -> Destination:
    """The destination of one launch, with room for its sums of squares where the update asks for them."""
    if update is None or update.squares is None:
        return destination
    squares = torch.empty((programs,), dtype=dtype, device=destination.table.device)
    update.squares.append(squares)
    return destination._replace(squares=squares)


def destination_of(update: RowUpdate) -> tuple[Destination, Rule]:
    from prefixmem_fast.optim.rounding import mix_seed

    hyper, state = update.hyper, update.state
    first, second = [None, None, *state][-2:]
    adam = len(state) == 2
    destination = Destination(
        update.weight, first, second, update.step if update.seed is not None else None,
        hyper.correction1 if adam else None, hyper.correction2 if adam else None, hyper.lr, float(hyper.weight_decay),
        float(hyper.eps), float(hyper.beta1), float(hyper.beta2), 0 if update.seed is None else mix_seed(update.seed),
    )  # fmt: skip
    return destination, Rule(
        update.rule, hyper.weight_decay != 0, isinstance(hyper.lr, Tensor), update.seed is not None
    )


@triton.jit
def mix(b):
    """See `prefixmem_fast/optim/rounding.py`; b is uint32."""
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
def finish_rows(destination, b_row, b_sum, m_row, o_w, W: tl.constexpr, rule: tl.constexpr):
    """Sums [BB, BH, BW] of rows [BB, BH] where m_row; the tile holds whole rows unless they are only stored."""
    p_table = destination.table
    o_e = (b_row * W)[:, :, None] + o_w[None, None, :]
    m_e = m_row[:, :, None] & (o_w < W)[None, None, :]
    if rule.name == "store":
        tl.store(p_table + o_e, b_sum.to(p_table.dtype.element_ty), mask=m_e)
    else:
        if rule.scheduled:
            lr = tl.load(destination.lr).to(b_sum.dtype)
        else:
            lr = destination.lr
        b_w = tl.load(p_table + o_e, mask=m_e, other=0.0).to(b_sum.dtype)
        if rule.decays:
            b_w = b_w * (1 - lr * destination.weight_decay)
        if rule.name == "sgd":
            b_w = b_w - lr * b_sum
        elif rule.name == "row_adagrad":
            p_total = destination.second + b_row
            b_total = tl.load(p_total, mask=m_row, other=0.0) + tl.sum(b_sum * b_sum, 2) / W
            tl.store(p_total, b_total, mask=m_row)
            b_w = b_w - (lr / (tl.sqrt(b_total) + destination.eps))[:, :, None] * b_sum
        else:
            b_mean = b_sum
            if destination.first is not None:
                b_first = tl.load(destination.first + o_e, mask=m_e, other=0.0)
                b_first = destination.beta1 * b_first + (1 - destination.beta1) * b_sum
                tl.store(destination.first + o_e, b_first, mask=m_e)
                b_mean = b_first / tl.load(destination.correction1)
            correction = tl.load(destination.correction2)
            if rule.name == "row_adam":
                p_second = destination.second + b_row
                b_second = tl.load(p_second, mask=m_row, other=0.0)
                b_second = destination.beta2 * b_second + (1 - destination.beta2) * (tl.sum(b_sum * b_sum, 2) / W)
                tl.store(p_second, b_second, mask=m_row)
                b_w = b_w - (lr / (tl.sqrt(b_second / correction) + destination.eps))[:, :, None] * b_mean
            else:
                p_second = destination.second + o_e
                b_second = tl.load(p_second, mask=m_e, other=0.0)
                b_second = destination.beta2 * b_second + (1 - destination.beta2) * (b_sum * b_sum)
                tl.store(p_second, b_second, mask=m_e)
                b_w = b_w - lr / (tl.sqrt(b_second / correction) + destination.eps) * b_mean
        if rule.rounds:
            tl.store(p_table + o_e, round_stochastically(b_w, b_row, o_w, destination.step, destination.seed), mask=m_e)
        else:
            tl.store(p_table + o_e, b_w.to(p_table.dtype.element_ty), mask=m_e)


@triton.jit
def store_squares(destination, b_squares):
    """A program's sum of the squares [..] of the rows that it finished."""
    if destination.squares is not None:
        i_program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tl.store(destination.squares + i_program, tl.sum(b_squares))
