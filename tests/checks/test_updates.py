"""What verify expects of the optimizers where a batch touches no row."""

import random

import pytest
import torch

from prefixmem_fast import AddressSpec, optim
from prefixmem_fast.checks.cases import Case
from prefixmem_fast.checks.report import Report
from prefixmem_fast.checks.updates import Settings, check_updates


@pytest.mark.parametrize("grad", ["sparse", "fused"])
@pytest.mark.parametrize("seed", [0, 1])  # text, and codes that have ended
def test_a_batch_that_touches_no_row(seed, grad):
    spec = AddressSpec((4, 5), table_rows=7, heads=1, max_order=2)
    text = torch.zeros(1, 4, dtype=torch.int64)
    weight = torch.randn(spec.total_rows, 4, generator=torch.Generator().manual_seed(0))
    case = Case(spec, torch.full((3, 2), -1), text, torch.zeros(1, 2, dtype=torch.int32), None, weight)
    numbers = {"lr": 0.5, "weight_decay": 0.25, "eps": 1e-8}
    settings = Settings(optim.RowWiseAdagrad, grad, numbers, {"stochastic_rounding": False, "seed": 0})
    report = Report(seed, "cpu", ("reference", "triton", "native", "cpu"))
    check_updates(report, case, ("triton", "native", "cpu"), random.Random(seed), settings)
    assert report.comparisons
    assert report.mismatches == []
