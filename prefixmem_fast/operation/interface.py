"""What every backend offers: the same functions, and the tuples that go in and out of them.

    prefix_rows(codes, spec)                                 the rows themselves
    forward(source, weight, spec)                            S
    dense_gradient(grad, source, spec, deterministic)        dS to a gradient of the table's shape
    row_sums(grad, source, spec, dtype)                      dS to the touched rows and their sums
    fused_update(grad, source, spec, update)                 dS to an update of the touched rows
    sparse_update(grad, update)                              a sparse gradient to an update of its rows
    quantized_forward(source, table, spec, dtype)            S of a quantized table
    read_windows(windows, token_table, table, spec, out)     S of the last token of each window, of either table

`source` is codes ``[M, L]`` or a `TokenStream`, `grad` is dS, `update` a `RowUpdate`. `table` is a `QuantizedTable`,
whose S is summed in float32 and rounded once, to `dtype`: float32, bfloat16 or float16. There is no gradient of it.
`windows` are tokens ``[n, W]``, and `out` is contiguous ``[n, H * w]``; nothing is returned.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

FUNCTIONS = (
    "prefix_rows",
    "forward",
    "dense_gradient",
    "row_sums",
    "fused_update",
    "sparse_update",
    "quantized_forward",
    "read_windows",
)


class QuantizedTable(NamedTuple):
    """A fused table of 8 bits a number, with a scale a row.

    The row that it stands for is ``float32(values[row]) * scales[row]``, each product rounded to float32; S adds these
    in float32, from 0, by ascending order.

    Attributes:
        values: int8 or float8_e4m3fn ``[R, w]``, all of them numbers.
        scales: float32 ``[R]``, not negative.
    """

    values: Tensor
    scales: Tensor


class RowSums(NamedTuple):
    """The touched rows and the sums of their gradients.

    Attributes:
        rows: int64 ``[U]``, ascending.
        sums: ``[U, w]``.
        unique: whether each row is there once. From a GPU the number of entries is fixed, so that nothing waits for a
            count: those past the last touched row repeat it with zeros.
    """

    rows: Tensor
    sums: Tensor
    unique: bool
