"""Cross-item rows that several items back share, of their whole SIDs or their first codes: an encoder against sums over
the oracle's windows, item by item."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..encoder import PrefixMem, PrefixMemConfig
from ..operation import reference
from ..sid import SIDVocabulary
from . import oracle
from .cases import Case
from .decoding import vocabulary_of
from .report import Report, exact_sums


def check_lags(report: Report, case: Case, backends: tuple[str, ...]) -> None:
    """S of the case's tokens under several lags, of whole items and of their first codes; see `PrefixMemConfig`."""
    spec = case.spec
    vocabulary = vocabulary_of(case) if spec.history else None
    if vocabulary is None or not case.input_ids.numel():
        return
    _check(report, case, backends, vocabulary, 2, None)
    if spec.item_levels > 1:
        _check(report, case, backends, vocabulary, 3, 1)
        _check(report, case, backends, vocabulary, 1, spec.item_levels - 1)


def _check(
    report: Report, case: Case, backends: tuple[str, ...], vocabulary: SIDVocabulary, lags: int, first: int | None
) -> None:
    spec, width, dtype = case.spec, case.spec.heads * case.weight.shape[1], case.weight.dtype
    exact = bound = rounded = 0.0
    for lag in range(lags):
        sums, error = exact_sums(lambda weight, lag=lag: _at_tokens(case, weight, lag, first), case.weight)
        share = 2.0**-lag  # what lag_weights start at
        exact, bound = exact + share * sums, bound + share * error
        rounded = rounded + share * (sums.abs() + error)
    bound = bound + lags * torch.finfo(dtype).eps * rounded  # each item's sum is rounded before they are added
    config = PrefixMemConfig(spec, width, width, lags=lags, earlier_codes=first)
    for backend in ("reference", *backends):
        encoder = PrefixMem(config, backend=backend, device=case.weight.device, dtype=dtype)
        with torch.no_grad():
            encoder.memory.weight.copy_(case.weight)
            found = encoder.read_tokens(case.input_ids, vocabulary, case.segment_ids)
        report.within(f"{backend} {lags} lags of {first or 'all'} codes", case, found, exact, bound)


def _at_tokens(case: Case, weight: Tensor, lag: int, first: int | None) -> Tensor:
    """S ``[B, T, H * w]`` of one item back."""
    spec, table = case.spec, case.token_table.tolist()
    of_lag, out = replace(spec, history=spec.history + lag).to_dict(), []
    for b, ids in enumerate(case.input_ids.tolist()):
        segments = None if case.segment_ids is None else case.segment_ids[b].tolist()
        windows = oracle.token_windows(ids, table, of_lag, segments)
        codes = torch.tensor([codes for _, codes in windows], device=weight.device)
        if first is not None:  # codes that do not count are 0, as hashes and mixed radices leave them out
            codes[:, first : spec.item_levels].clamp_(max=0)
        levels = torch.tensor([level for level, _ in windows], device=weight.device)
        S = reference.forward(codes, weight, spec)  # [T, A, H * w]
        here = levels[:, None] == torch.tensor(spec.active_levels, device=weight.device)
        out.append(torch.where(here[..., None], S, 0.0).sum(1))
    return torch.stack(out)
