"""Quantized tables on every backend, against the exact sums of the numbers that they hold."""

from __future__ import annotations

import torch

from .._choices import QUANTIZATIONS
from .._dtypes import SUM_DTYPES
from ..addressing import TokenStream
from ..operation import reference
from ..operation.backends import functions_of
from ..operation.interface import PrefixState
from ..operation.quantization import quantize
from .cases import Case
from .report import Report, sum_bound

_STEPS = 8  # of decoding


def check_quantized(report: Report, case: Case, backends: tuple[str, ...]) -> None:
    """Codes, tokens and steps; a product is rounded to float32 before it is added, as one term more would be."""
    spec, dtype = case.spec, case.weight.dtype
    if dtype not in SUM_DTYPES:
        return
    sources = {
        "sums": case.codes,
        "token sums": TokenStream(case.input_ids, case.token_table, case.segment_ids),
        "decoding step": TokenStream(case.input_ids[:, :_STEPS], case.token_table, None),
    }
    if spec.history:  # its steps are token sums
        del sources["decoding step"]
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
                if what != "decoding step":
                    found = functions.quantized_forward(source, table, spec, dtype)
                elif not source.input_ids.numel():
                    continue
                else:
                    copies, (batch, _) = functions.state_copies(table.values, spec), source.input_ids.shape
                    state = PrefixState(
                        source.input_ids.new_full((copies, batch, spec.levels), -1, dtype=torch.int64),
                        source.input_ids.new_zeros((copies, batch), dtype=torch.int64),
                        numbers.new_zeros((batch, spec.heads, numbers.shape[1]), dtype=torch.float32),
                    )
                    rest = case.token_table, state, table, spec, dtype
                    steps = [functions.quantized_decoding_step(ids, *rest) for ids in source.input_ids.unbind(1)]
                    found = torch.stack(steps, 1)
                report.within(f"{backend} {kind} {what}", case, found, exact, bound)
