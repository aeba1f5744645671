"""What becomes of a row's summed gradient: stored, or spent on an update of the row. Every backward kernel ends here.

The updates are those of `prefixmem_fast/operation/rules.py`, in registers: the row and its state are read once and
written once. What is read (`load_rows`) and what is done with it (`write_rows`) stand apart, so that a kernel can read
a turn ahead of its sums.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Hashable
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import Device, aligned, current_device


class Destination(NamedTuple):
    """Run-time arguments: a table of sums, or the weight with its optimizer's state and numbers.

    Triton passes a float in 32 bits, so a number of a float64 table comes as two (see `pair`). All are floats whatever
    their value: a kernel would be compiled anew for an integer of another size.
    """

    table: Tensor  # [R, W]
    first_moment: Tensor | None = None  # first moment [R, W]
    second_moment: Tensor | None = None  # second moment or sum, [R] or [R, W]
    step: Tensor | None = None  # int64: for the corrections and the random bits
    lr: Tensor | tuple[float, float] = (0.0, 0.0)
    weight_decay: tuple[float, float] = (0.0, 0.0)
    eps: tuple[float, float] = (0.0, 0.0)
    beta1: tuple[float, float] = (0.0, 0.0)
    beta2: tuple[float, float] = (0.0, 0.0)
    log_beta1: tuple[float, float] = (0.0, 0.0)  # ln beta
    log_beta2: tuple[float, float] = (0.0, 0.0)
    seed: tuple[float, float] = (0.0, 0.0)  # lower and upper 16 bits, mixed already
    squares: Tensor | None = None  # sum of the squared gradient, one a program


class Epilogue(NamedTuple):
    """Compile-time arguments: the name of the update's rule, and which of its optional parts it has."""

    rule: str = "store"
    decays: bool = False
    scheduled: bool = False  # lr is read from memory
    rounds: bool = False  # stochastically, to bfloat16
    small: bool = False  # offsets into the table fit 32 bits
    warps: int = 1  # of a program


STORE = Epilogue()


@lru_cache(maxsize=64)
def pair(number: float) -> tuple[float, float]:
    """The nearest float32, and the rest."""
    upper = struct.unpack("f", struct.pack("f", number))[0]
    return upper, number - upper if math.isfinite(upper) else 0.0


def logarithm(beta: float) -> tuple[float, float]:
    return pair(math.log(beta) if beta else float("-inf"))


def halves(word: int) -> tuple[float, float]:
    """The lower and the upper 16 bits of 32, as floats."""
    return float(word & 0xFFFF), float(word >> 16)


class Ending(NamedTuple):
    """What becomes of the sums of a step, and what Triton compiles kernels anew for by it."""

    destination: Destination
    epilogue: Epilogue
    squares: list[Tensor] | None  # gains a tensor with the sum of squares of each program; None asks for none
    kind: tuple[Hashable, ...]
    device: Device

    def of_programs(self, programs: int, dtype: torch.dtype) -> Destination:
        """The destination of one launch, with room for its sums of squares."""
        if self.squares is None:
            return self.destination
        self.squares.append(torch.empty(programs, dtype=dtype, device=self.destination.table.device))
        return self.destination._replace(squares=self.squares[-1])


def ending_of(
    destination: Destination, epilogue: Epilogue, squares: list[Tensor] | None = None, deterministic: bool = False
) -> Ending:
    device = current_device(deterministic)
    table, lr = destination.table, destination.lr
    epilogue = epilogue._replace(small=table.numel() < 1 << 31)
    if epilogue.rule == "store":
        kind = epilogue, squares is None, table.dtype, aligned(table)
        return Ending(destination, epilogue, squares, kind, device)
    tensors = table, destination.first_moment, destination.second_moment, destination.step
    kind = (
        epilogue,
        squares is None,
        *(None if tensor is None else tensor.dtype for tensor in tensors),
        *map(aligned, tensors),
        *((lr.dtype, aligned(lr)) if epilogue.scheduled else ()),
    )
    return Ending(destination, epilogue, squares, kind, device)


@triton.jit
def correction_of(b_step, log_beta, ACC: tl.constexpr):
    """1 - beta^t of Adam, without the cancellation that a small t brings in float32."""
    b_x = b_step * log_beta[0] + b_step * log_beta[1]
    if tl.float64 == ACC:
        b_correction = 1 - tl.exp(b_x)
    else:
        b_series = 1 + b_x / 6 * (1 + b_x / 7)
        b_series = 1 + b_x / 2 * (1 + b_x / 3 * (1 + b_x / 4 * (1 + b_x / 5 * b_series)))
        b_correction = tl.where(b_x > -0.5, -b_x * b_series, 1 - tl.exp(b_x))
    return b_correction


@triton.jit
def number(p, ACC: tl.constexpr):
    b_number = p[0]
    if tl.float64 == ACC:
        b_number = tl.zeros([], ACC) + p[0] + p[1]
    return b_number


@triton.jit
def load_numbers(destination, ACC: tl.constexpr, epilogue: tl.constexpr):
    """The numbers of a step, once a program: lr, what decays a row, eps, both betas, what corrects both moments, the
    key of the random bits."""
    eps, beta1, beta2 = number(destination.eps, ACC), number(destination.beta1, ACC), number(destination.beta2, ACC)
    unbias1, unbias2, key = 1.0, 1.0, 0
    if epilogue.scheduled:
        lr = tl.load(destination.lr).to(ACC)
    else:
        lr = number(destination.lr, ACC)
    keeps = 1 - lr * number(destination.weight_decay, ACC)
    if epilogue.rule == "row_adam" or epilogue.rule == "lazy_adam":
        b_step = tl.load(destination.step).to(ACC)
        unbias1 = 1 / correction_of(b_step, destination.log_beta1, ACC)
        unbias2 = 1 / correction_of(b_step, destination.log_beta2, ACC)
    if epilogue.rounds:
        b_step = (tl.load(destination.step) & 0xFFFFFFFF).to(tl.uint32)
        b_seed = (b_step * 0).to(tl.float32)
        b_seed = (b_seed + destination.seed[0]).to(tl.uint32) + ((b_seed + destination.seed[1]).to(tl.uint32) << 16)
        key = mix(b_seed ^ b_step)
    return lr, keeps, eps, beta1, beta2, unbias1, unbias2, key


@triton.jit
def mix(b):
    """See `prefixmem_fast/operation/rounding.py`; b is uint32."""
    b = b ^ (b >> 16)
    b = b * 0x21F0AAAD
    b = b ^ (b >> 15)
    b = b * 0xD35A2D97
    return b ^ (b >> 15)


@triton.jit
def round_stochastically(b, b_row, o_w, key):
    """float32 [BB, BH, BW] of rows [BB, BH] to bfloat16."""
    b_word = b_row.to(tl.uint32)
    if b_row.dtype == tl.int64:
        b_word = b_word + (b_row >> 32).to(tl.uint32) * 0x9E3779B9
    b_key = mix(key ^ b_word)
    b_pair = ((o_w // 2 + 1).to(tl.uint32) * 0x9E3779B9 | 1)[None, None, :]
    b_word = b_key[:, :, None] * b_pair
    b_word = b_word ^ (b_word >> 15)
    b_multiplier = tl.where(o_w % 2 == 0, 0x21F0AAAD, 0xD35A2D97).to(tl.uint32)[None, None, :]
    b_random = (b_word * b_multiplier >> 16).to(tl.int32)
    # Infinity keeps its bits under any sum with 16 bits. The bits of NaN may be all ones, and then would run over.
    b_bits = tl.minimum(b.to(tl.int32, bitcast=True), 0x7FFF0000) + b_random
    return (b_bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def elements(b_row, m_row, o_w, W: tl.constexpr, epilogue: tl.constexpr):
    """Offsets [BB, BH, BW] of the elements of rows [BB, BH], and their mask."""
    if not epilogue.small:
        b_row = b_row.to(tl.int64)
    return (b_row * W)[:, :, None] + o_w[None, None, :], m_row[:, :, None] & (o_w < W)[None, None, :]


@triton.jit
def load_rows(destination, b_row, m_row, o_w, W: tl.constexpr, epilogue: tl.constexpr):
    """What an update reads of rows [BB, BH] where m_row, as it is stored: the row, the second and the first moment."""
    o_e, m_e = elements(b_row, m_row, o_w, W, epilogue)
    b_read = ()
    if epilogue.rule != "store":
        b_read = b_read + (tl.load(destination.table + o_e, mask=m_e, other=0.0),)  # [BB, BH, BW]
        if epilogue.rule == "row_adagrad" or epilogue.rule == "row_adam":
            b_read = b_read + (tl.load(destination.second_moment + b_row, mask=m_row, other=0.0),)  # [BB, BH]
        elif epilogue.rule == "lazy_adam":
            b_read = b_read + (tl.load(destination.second_moment + o_e, mask=m_e, other=0.0),)  # [BB, BH, BW]
        if destination.first_moment is not None:
            b_read = b_read + (tl.load(destination.first_moment + o_e, mask=m_e, other=0.0),)  # [BB, BH, BW]
    return b_read


@triton.jit
def write_rows(destination, numbers, b_read, b_row, b_sum, m_row, o_w, W: tl.constexpr, epilogue: tl.constexpr):
    """Sums [BB, BH, BW] of rows [BB, BH] where m_row, with what `load_rows` has read of them. Returns the sums of the
    squared gradient [BB, BH]. A tile holds whole rows unless they are only stored."""
    p_table = destination.table
    o_e, m_e = elements(b_row, m_row, o_w, W, epilogue)
    if epilogue.warps > 1:
        tl.debug_barrier()  # no warp stores what another one has yet to load
    b_squares = tl.sum(b_sum * b_sum, 2)
    if epilogue.rule == "store":
        tl.store(p_table + o_e, b_sum.to(p_table.dtype.element_ty), mask=m_e)  # [BB, BH, BW]
    else:
        lr, keeps, eps, beta1, beta2, unbias1, unbias2, key = numbers
        b_w = b_read[0].to(b_sum.dtype)
        if epilogue.decays:
            b_w = b_w * keeps
        if epilogue.rule == "sgd":
            b_w = b_w - lr * b_sum
        elif epilogue.rule == "row_adagrad":
            b_total = b_read[1] + b_squares / W
            tl.store(destination.second_moment + b_row, b_total, mask=m_row)  # [BB, BH]
            b_rate = -lr / (tl.sqrt(b_total) + eps)
            b_w = tl.fma(b_rate[:, :, None], b_sum, b_w)
        else:
            b_mean = b_sum
            if destination.first_moment is not None:
                b_first = beta1 * b_read[2] + (1 - beta1) * b_sum
                tl.store(destination.first_moment + o_e, b_first, mask=m_e)  # [BB, BH, BW]
                b_mean = b_first * unbias1
            if epilogue.rule == "row_adam":
                b_second = beta2 * b_read[1] + (1 - beta2) * (b_squares / W)
                tl.store(destination.second_moment + b_row, b_second, mask=m_row)  # [BB, BH]
                b_rate = -lr / (tl.sqrt(b_second * unbias2) + eps)
                b_w = tl.fma(b_rate[:, :, None], b_mean, b_w)
            else:
                b_second = beta2 * b_read[1] + (1 - beta2) * (b_sum * b_sum)
                tl.store(destination.second_moment + o_e, b_second, mask=m_e)  # [BB, BH, BW]
                b_w = b_w - lr / (tl.sqrt(b_second * unbias2) + eps) * b_mean
        if epilogue.rounds:
            tl.store(p_table + o_e, round_stochastically(b_w, b_row, o_w, key), mask=m_e)
        else:
            tl.store(p_table + o_e, b_w.to(p_table.dtype.element_ty), mask=m_e)  # [BB, BH, BW]
    return b_squares


@triton.jit
def store_squares(destination, b_squares):
    """A program's sum of the squares [..] of the rows that it wrote."""
    if destination.squares is not None:
        i_program = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
        tl.store(destination.squares + i_program, tl.sum(b_squares))
