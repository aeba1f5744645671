"""The dtypes of codes and tables, and the dtype that sums are kept in."""

import torch

from ._choices import QUANTIZATIONS
from ._choices import QUANTIZED_DTYPES as _NAMES

CODE_DTYPES = (torch.int16, torch.int32, torch.int64)
TABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Of the values of quantized tables.
QUANTIZED_DTYPES = {kind: getattr(torch, name) for kind, name in zip(QUANTIZATIONS, _NAMES, strict=True)}
SUM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that S of a quantized table comes out in


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums of a table of `dtype` are kept in; bfloat16 sums would lose small values."""
    return torch.float64 if dtype == torch.float64 else torch.float32
