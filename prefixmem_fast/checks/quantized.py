"""Quantized tables on every backend, against the exact sums of the numbers that they hold."""

from __future__ import annotations

import torch

from .._choices import QUANTIZATIONS
from .._dtypes import SUM_DTYPES
from ..addressing import TokenStream
from ..operation import reference
from ..operation.backends import functions_of
from ..operation.quantization import quantize
from .cases import Case
from .report import Report, sum_bound

_WINDOWS = 8  # a row, each longer than the one before


def check_quantized(report: Report, case: Case, backends: tuple[str, ...]) -> None:
    """Codes, tokens and windows; a product is rounded to float32 before it is added, as one term more would be."""
    spec, dtype = case.spec, case.weight.dtype
    if dtype not in SUM_DTYPES:
        return
    sources = {
        "sums": case.codes,
        "token sums": TokenStream(case.input_ids, case.token_table, case.segment_ids),
        "windows": TokenStream(case.input_ids[:, :_WINDOWS], case.token_table, None),
    }
    for kind in QUANTIZATIONS:
        table = quantize(case.weight, kind)
        numbers = table.values.double() * table.scales.double()[:, None]
        for what, source in sources.items():
            exact, magnitude, terms = (
                reference.forward(source, values, spec) for values in (numbers, numbers.abs(), torch.ones_like(numbers))
            )
            bound = sum_bound(terms + 1, magnitude, exact, dtype)
            for backend in ("reference", *backends):
                functions = functions_of(backend)
                if what == "windows":
                    found = exact.new_empty(exact.shape, dtype=dtype)
                    for t in range(found.shape[1]):
                        out, windows = torch.empty_like(found[:, t]), source.input_ids[:, : t + 1]
                        functions.read_windows(windows, case.token_table, table, spec, out)
                        found[:, t] = out
                else:
                    found = functions.quantized_forward(source, table, spec, dtype)
                report.within(f"{backend} {kind} {what}", case, found, exact, bound)
