"""Memory rows summed over orders, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dtypes import accumulator
from .interface import QuantizedTable
from .quantization import dequantized


def sum_orders(rows: Tensor, table: Tensor | QuantizedTable, dtype: torch.dtype) -> Tensor:
    """Rows ``[..., N, H]``, -1 for none, to S ``[..., H * w]`` in `dtype`."""
    width = (table.values if isinstance(table, QuantizedTable) else table).shape[1]
    total = torch.zeros((*rows.shape[:-2], rows.shape[-1], width), dtype=accumulator(dtype), device=rows.device)
    for row in rows.unbind(-2):  # [..., H]
        total = total + torch.where(row[..., None] >= 0, read_rows(table, row.clamp(min=0)), 0)
    return total.to(dtype).flatten(-2)


def read_rows(table: Tensor | QuantizedTable, rows: Tensor) -> Tensor:
    """Rows in the accumulator's dtype."""
    if isinstance(table, QuantizedTable):
        return dequantized(table, rows)
    return table[rows].to(accumulator(table.dtype))
