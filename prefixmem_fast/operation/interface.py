"""What every backend offers: the same functions, and the tuples that go in and out of them.

    prefix_rows(codes, spec)                                 the rows themselves
    forward(source, weight, spec)                            S
    dense_gradient(grad, source, spec, deterministic)        dS to a gradient of the table's shape
    row_sums(grad, source, spec, dtype)                      dS to the touched rows and their sums
    fused_update(grad, source, spec, update)                 dS to an update of the touched rows
    sparse_update(grad, update)                              a sparse gradient to an update of its rows
    state_copies(weight, spec)                               copies of a prefix state that a step needs
    decoding_step(tokens, token_table, state, weight, spec)  one token of each sequence to S
    quantized_forward(source, table, spec, dtype)            S of a quantized table
    quantized_decoding_step(tokens, token_table, state, table, spec, dtype)

`source` is codes ``[M, L]`` or a `TokenStream`, `grad` is dS, `update` a `RowUpdate`. `table` is a `QuantizedTable`,
whose S is summed in float32 and rounded once, to `dtype`: float32, bfloat16 or float16. There is no gradient of it.
`state_copies` takes its values for `weight`.
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
    "state_copies",
    "decoding_step",
    "quantized_forward",
    "quantized_decoding_step",
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


class PrefixState(NamedTuple):
    """Where each of B sequences stands within a SID.

    Attributes:
        codes: int64 ``[copies, B, L]``, the codes of the SID under way, then -1.
        level: int64 ``[copies, B]``, how many they are; 0 after text.
        total: ``[B, H, w]``, S of that level, in the accumulator's dtype.
    """

    codes: Tensor
    level: Tensor
    total: Tensor
