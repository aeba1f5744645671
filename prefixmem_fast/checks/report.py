"""What a verification found, and the bounds that it holds results to.

A sum of k values accumulated with unit roundoff u, in any order, is off by at most k * u * sum|v|. Rounding it to the
table's dtype adds one unit in the last place. `sum_bound` is that bound, so no tolerance is a guess.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._dtypes import accumulator as accumulator_of
from .cases import Case


@dataclass
class Report:
    """What a verification found; errors are fractions of the derived bound, so anything above 1 is a mismatch."""

    seed: int
    device: str
    backends: tuple[str, ...]
    cases: int = 0
    batches: int = 0
    comparisons: int = 0
    mismatches: list[str] = field(default_factory=list)
    worst: dict[str, dict[str, float]] = field(default_factory=dict)

    def equal(self, what: str, case: Case, result: Tensor, expected: Tensor) -> None:
        self.comparisons += 1
        if result.shape != expected.shape or result.dtype != expected.dtype or not torch.equal(result, expected):
            self.mismatches.append(f"{what}: not equal bit for bit; {case}")

    def within(self, what: str, case: Case, result: Tensor, exact: Tensor, bound: Tensor) -> None:
        self.comparisons += 1
        if result.shape != exact.shape or not torch.isfinite(result).all():
            self.mismatches.append(f"{what}: shape {tuple(result.shape)} or an element that is not finite; {case}")
            return
        if not result.numel():
            return
        error = (result.double() - exact).abs()
        share = (error / bound).max().item()
        worst = self.worst.setdefault(str(result.dtype).removeprefix("torch."), {"absolute": 0.0, "of_bound": 0.0})
        worst["absolute"] = max(worst["absolute"], error.max().item())
        worst["of_bound"] = max(worst["of_bound"], share)
        if share > 1:
            self.mismatches.append(f"{what}: {share:.3g} times the derived bound; {case}")

    def between(self, what: str, case: Case, result: Tensor, low: Tensor, high: Tensor) -> None:
        """Every element, ends included."""
        self.comparisons += 1
        inside = result.shape == low.shape and bool(((low <= result) & (result <= high)).all())
        if not inside:
            self.mismatches.append(f"{what}: outside of what rounding allows; {case}")


def sum_bound(terms: Tensor, magnitude: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest error of sums of `terms` values with absolute sum `magnitude`, rounded to `dtype`; all float64.

    Accumulation is in float32, or float64 for float64. One unit in the last place, not half of one, is granted to the
    final rounding: the Triton interpreter truncates to bfloat16. Atomics flush subnormal numbers.
    """
    accumulator = torch.finfo(accumulator_of(dtype))
    final = torch.finfo(dtype)
    subnormal = final.smallest_normal * final.eps
    return (
        terms * (accumulator.eps / 2) * magnitude * 1.01
        + final.eps * exact.abs()
        + terms * accumulator.smallest_normal
        + subnormal
    )


def exact_sums(operation: Callable[[Tensor], Tensor], values: Tensor) -> tuple[Tensor, Tensor]:
    """A sum that is linear in `values`, in float64, and how far a sum in the dtype of `values` may be from it."""
    exact = operation(values.double())
    terms, magnitude = operation(torch.ones_like(values).double()), operation(values.double().abs())
    return exact, sum_bound(terms, magnitude, exact, values.dtype)
