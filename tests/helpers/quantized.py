"""How far the numbers of a quantized table, and their sums, may be from those of the table that was quantized."""

import torch

from prefixmem_fast.operation import reference

KINDS = ["int8", "fp8"]
_UNIT = 2.0**-24  # half a unit in float32's last place


def element_bound(weight, scales, kind):
    """How far a number of a quantized table may be from that of `weight` ``[R, w]``; see operation/quantization.py."""
    x, scales = weight.double().abs(), scales.double()[:, None]
    step = scales / 2 if kind == "int8" else torch.maximum(x * 2**-4, scales * 2**-10)
    return step + 3 * _UNIT * x + _UNIT * scales


def sum_error_bound(source, weight, table, spec, kind):
    """How far S of a quantized table, in float32, may be from the exact S of `weight`."""

    def summed(values):
        return reference.forward(source, values, spec)

    bound = element_bound(weight, table.scales, kind)
    magnitude = summed(weight.double().abs() + bound)
    return summed(bound) + summed(torch.ones_like(bound)) * _UNIT * magnitude * 1.01
