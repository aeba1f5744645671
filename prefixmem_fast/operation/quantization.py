"""A table to 8 bits a number with a scale a row, and back.

    int8   scale = max|row| / 127    values = round(row / scale), ties to even
    fp8    scale = max|row| / 448    values = row / scale rounded to e4m3 (4 bits of exponent, 3 of mantissa)

Let x be a number of the table and y what its value stands for. With u = 2^-24, half a unit in float32's last place:

    int8   |y - x| <= scale / 2                        + 3 u |x| + u scale
    fp8    |y - x| <= max(2^-4 |x|, 2^-10 scale)       + 3 u |x| + u scale

The first terms are half a step of the values: 1 in int8; in e4m3 at most 2^-3 of a number's own power of two from 2^-6
on, and 2^-9 below. Dividing by the scale and multiplying by it are two roundings to float32. S adds N such numbers, so
its error is at most the sum of theirs, and what a sum of N float32 numbers is rounded by.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from .._choices import QUANTIZATIONS
from .._dtypes import QUANTIZED_DTYPES, SUM_DTYPES
from .interface import QuantizedTable

_LARGEST = {"int8": 127.0, "fp8": 448.0}  # value
_CHUNK_BYTES = 16 << 20  # of float32 rows at a time
# The least scale: below it float32 is subnormal, and a scale would be off by more than a rounding.
_TINY = torch.finfo(torch.float32).tiny


@torch.no_grad()
def quantize(weight: Tensor, kind: str) -> QuantizedTable:
    """A table in 8 bits a number, a chunk of rows at a time.

    Args:
        weight: float32, bfloat16 or float16 ``[R, w]``.
        kind: "int8" or "fp8", which is e4m3.

    Returns:
        the table on the same device. A row of zeros has scale 0; scales of others are at least 2^-126.

    Raises:
        TypeError, ValueError: an argument is not as stated, or a row holds an infinity or NaN.
    """
    _checks.choice("kind", kind, QUANTIZATIONS)
    if isinstance(weight, Tensor) and weight.dtype == torch.float64:
        raise TypeError(
            "weight has dtype torch.float64, and quantized tables are read in float32; convert with .float()"
        )
    _checks.tensor("weight", weight, SUM_DTYPES, 2, "[R, w]")
    values = torch.empty(weight.shape, dtype=QUANTIZED_DTYPES[kind], device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    step = max(_CHUNK_BYTES // (4 * max(weight.shape[1], 1)), 1)
    for start in range(0, len(weight), step):
        rows = weight[start : start + step].float()
        peak = rows.abs().amax(1)  # NaN where the row holds one
        if not peak.isfinite().all():
            row = start + int(peak.isfinite().logical_not().nonzero()[0])
            raise ValueError(f"weight[{row}] holds an infinity or NaN, which has no scale; give rows of finite numbers")
        scale = (peak / _LARGEST[kind]).clamp(min=_TINY)
        rows = (rows / scale[:, None]).clamp(-_LARGEST[kind], _LARGEST[kind])
        values[start : start + step] = (rows.round() if kind == "int8" else rows).to(values.dtype)
        scales[start : start + step] = torch.where(peak > 0, scale, 0)
    return QuantizedTable(values, scales)


def dequantized(table: QuantizedTable, rows: Tensor) -> Tensor:
    """The rows ``[..., w]`` that a quantized table stands for, in float32, at int64 ``[...]``.

    Values may also be uint8, the bits of e4m3, for runtimes that know no such dtype.
    """
    values, scales = table
    if values.dtype == torch.uint8:
        read = scales.new_tensor(_E4M3)[values[rows].long()]
    elif values.dtype == torch.int8:
        read = values[rows].float()
    else:
        read = values.view(torch.int8)[rows].view(values.dtype).float()  # bytes: torch indexes few kinds of float8
    return read * scales[rows][..., None]


def _e4m3(bits: int) -> float:
    """The number that 8 bits stand for: a sign, 4 bits of exponent, 3 of mantissa. The two NaN are not told apart."""
    exponent, mantissa = bits >> 3 & 15, bits & 7
    number = (8 + mantissa if exponent else mantissa) * 2.0 ** (max(exponent, 1) - 10)
    return -number if bits >> 7 else number


_E4M3 = tuple(map(_e4m3, range(256)))
