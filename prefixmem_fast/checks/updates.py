"""The optimizers of every backend against the oracle: each rule, over sparse gradients and in the backward pass.

The gradient holds -1, 0 and 1 alone, so the sums of a row are exact whatever their order, and what is left are the
roundings of the rule: fewer than 64 of them, those of a GPU's approximate roots and divisions included. A step is held
to the oracle's step from the same table and state, within those roundings and the rounding to the table's dtype.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import optim
from .._dtypes import accumulator
from ..addressing import TokenStream
from ..operation import prefix_memory, reference, token_memory
from . import oracle
from .cases import Case
from .report import Report

_ROUNDINGS = 64
_STEPS = 2
_RULES = (optim.SGD, optim.RowWiseAdagrad, optim.RowWiseAdam, optim.LazyAdam)


def check_updates(report: Report, case: Case, backends: tuple[str, ...], rng: random.Random) -> None:
    """Some steps of one rule with random numbers, the same on every backend, over codes or a token stream."""
    make, grad = rng.choice(_RULES), rng.choice(("sparse", "fused"))
    numbers: dict[str, Any] = {"lr": rng.choice((0.5, 0.01)), "weight_decay": rng.choice((0.0, 0.25))}
    if make is not optim.SGD:
        numbers["eps"] = rng.choice((1e-8, 0.5))
    if make in (optim.RowWiseAdam, optim.LazyAdam):
        numbers["betas"] = rng.choice(((0.75, 0.875), (0.0, 0.5)))
    settings = {"stochastic_rounding": rng.random() < 0.75, "seed": rng.randrange(1 << 63)}
    stream = TokenStream(case.input_ids, case.token_table, case.segment_ids)
    source = rng.choice((case.codes, stream))
    shape = reference.forward(source, case.weight, case.spec).shape
    grads = [torch.tensor([rng.choice((-1.0, 0.0, 1.0)) for _ in range(shape.numel())]) for _ in range(_STEPS)]
    grads = [g.reshape(shape).to(case.weight.device, torch.float64) for g in grads]
    sums = [reference.row_sums(g, source, case.spec, torch.float64) for g in grads]
    weight = case.weight
    if (
        grad == "sparse"
        and weight.dtype == torch.bfloat16
        and any(s.sums.abs().amax() > 256 for s in sums if len(s.rows))
    ):
        weight = weight.float()  # such a sum is not exact in a sparse gradient of the table's dtype
    for backend in ("reference", *backends):
        table = nn.Parameter(weight.detach().clone())
        optimizer = make([table], **numbers, **settings)
        for dS, (rows, total, _) in zip(grads, sums, strict=True):
            before = _Before(table, optimizer.state[table])
            options = {"backend": backend, "grad": grad}
            if isinstance(source, TokenStream):
                S = token_memory(*source[:2], table, case.spec, segment_ids=source[2], **options)
            else:
                S = prefix_memory(source, table, case.spec, **options)
            S.backward(dS.to(S))
            optimizer.step()
            optimizer.zero_grad()
            what = f"{backend} {make.__name__} {grad}, {numbers}, stochastic {settings['stochastic_rounding']}"
            seed = settings["seed"] if settings["stochastic_rounding"] else None
            _check_step(report, case, what, optimizer, table, before, rows, total, numbers, seed)


class _Before:
    """A table and the state of its optimizer before a step."""

    def __init__(self, table: Tensor, state: dict[str, Tensor]) -> None:
        self.table = table.detach().clone()
        self.state = {name: value.clone() for name, value in state.items()}


def _check_step(
    report: Report,
    case: Case,
    what: str,
    optimizer: optim.RowOptimizer,
    table: Tensor,
    before: _Before,
    rows: Tensor,
    sums: Tensor,
    numbers: dict[str, Any],
    seed: int | None,
) -> None:
    dtype, state = table.dtype, optimizer.state[table]
    low, high = (before.table.double().cpu().clone() for _ in range(2))
    bounds = {
        name: [before.state.get(name, torch.zeros_like(value)).double().cpu().clone() for _ in range(2)]
        for name, value in state.items()
        if name != "step"
    }
    step = int(before.state["step"]) + 1 if before.state else 1
    unit = torch.finfo(accumulator(dtype)).eps / 2
    for row, gradient in zip(rows.tolist(), sums.cpu().numpy(), strict=True):
        held = {name: ends[0][row].numpy() for name, ends in bounds.items()}
        w = before.table[row].double().cpu().numpy()
        new, new_state, size = oracle.updated_row(optimizer.rule, w, gradient, held, step, numbers)
        error = _ROUNDINGS * unit * size
        bits = None
        if dtype == torch.bfloat16 and seed is not None:
            bits = oracle.random_bits(seed, step, row, len(w))
        low[row], high[row] = (torch.from_numpy(_rounded(new + e, dtype, bits, e)) for e in (-error, error))
        for name, value in new_state.items():
            slack = _ROUNDINGS * unit * (np.abs(value) + np.abs(held[name]) + np.abs(gradient).max())
            bounds[name][0][row], bounds[name][1][row] = (torch.as_tensor(value + s) for s in (-slack, slack))
    if len(rows):
        report.equal(f"{what}: steps", case, state["step"].cpu(), torch.tensor(step))
    report.between(f"{what}: rows", case, table.detach().double().cpu(), low, high)
    for name, (least, most) in bounds.items():
        report.between(f"{what}: {name}", case, state[name].double().cpu(), least, most)


def _rounded(values: np.ndarray, dtype: torch.dtype, bits: list[int] | None, error: np.ndarray) -> np.ndarray:
    """`values` as the table holds them; where they are rounded to nearest, one unit further in the sign of `error`."""
    if bits is not None:
        return np.array([oracle.stochastic_bfloat16(v, b) for v, b in zip(values.tolist(), bits, strict=True)])
    if dtype in (torch.float32, torch.float64):
        return values
    kept = torch.finfo(dtype)
    return values + np.sign(error) * (kept.eps * np.abs(values) + kept.smallest_normal * kept.eps)
