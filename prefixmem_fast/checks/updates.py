"""The optimizers of every backend against the oracle: each rule, over sparse gradients and in the backward pass.

The gradient holds -1, 0 and 1 alone, so the sums of a row are exact whatever their order, and what is left are the
roundings of the rule: fewer than 64 of them, those of a GPU's approximate roots and divisions included. A step is held
to the oracle's step from the same table and state, within those roundings and the rounding to the table's dtype. The
oracle takes rows one by one; batches of the sizes of training are held to the reference's rules in float64 instead.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .. import optim
from .._dtypes import accumulator
from ..addressing import TokenStream
from ..operation import prefix_memory, reference, token_memory
from ..operation.rounding import random_bits, stochastic_round
from ..operation.rules import RULES, Hyper, decay
from . import oracle
from .cases import Case
from .report import Report

_ROUNDINGS = 64
_STEPS = 2
_RULES = (optim.SGD, optim.RowWiseAdagrad, optim.RowWiseAdam, optim.LazyAdam)


class Settings(NamedTuple):
    """How a table is trained."""

    make: type[optim.RowOptimizer]
    grad: str
    numbers: dict[str, Any]
    rounding: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.make.__name__} {self.grad}, {self.numbers}, stochastic {self.rounding['stochastic_rounding']}"

    @property
    def seed(self) -> int | None:
        return self.rounding["seed"] if self.rounding["stochastic_rounding"] else None


def random_settings(rng: random.Random) -> Settings:
    make, grad = rng.choice(_RULES), rng.choice(("sparse", "fused"))
    numbers: dict[str, Any] = {"lr": rng.choice((0.5, 0.01)), "weight_decay": rng.choice((0.0, 0.25))}
    if make is not optim.SGD:
        numbers["eps"] = rng.choice((1e-8, 0.5))
    if make in (optim.RowWiseAdam, optim.LazyAdam):
        numbers["betas"] = rng.choice(((0.75, 0.875), (0.0, 0.5)))
    rounding = {"stochastic_rounding": rng.random() < 0.75, "seed": rng.randrange(1 << 63)}
    return Settings(make, grad, numbers, rounding)


def check_updates(
    report: Report, case: Case, backends: tuple[str, ...], rng: random.Random, settings: Settings
) -> None:
    """Some steps of one rule, the same on every backend, over codes or a token stream."""
    stream = TokenStream(case.input_ids, case.token_table, case.segment_ids)
    source = rng.choice((case.codes, stream))
    shape = reference.forward(source, case.weight, case.spec).shape
    grads = [torch.tensor([rng.choice((-1.0, 0.0, 1.0)) for _ in range(shape.numel())]) for _ in range(_STEPS)]
    grads = [g.reshape(shape).to(case.weight.device, torch.float64) for g in grads]
    sums = [reference.row_sums(g, source, case.spec, torch.float64) for g in grads]
    weight = case.weight
    if (
        settings.grad == "sparse"
        and weight.dtype == torch.bfloat16
        and any(s.sums.abs().amax() > 256 for s in sums if len(s.rows))
    ):
        weight = weight.float()  # such a sum is not exact in a sparse gradient of the table's dtype
    for backend in ("reference", *backends):
        for step in _steps(weight, source, grads, case, backend, settings):
            rows, total, _ = sums[step.number]
            if backend == "triton" and settings.grad == "sparse" and not len(rows) and step.was_taken:
                # Its lists have a length that nothing on the host depends on; without any row they name row 0.
                rows, total = rows.new_zeros(1), total.new_zeros(1, total.shape[1])
            _check_step(report, case, f"{backend} {settings}", step, rows, total, settings)


def check_updates_at_size(report: Report, case: Case, backends: tuple[str, ...], number: int) -> None:
    """Steps over a batch of any size, on the device, against the rules in float64; `number` picks rule and gradient."""
    make, grad = _RULES[number % len(_RULES)], ("fused", "sparse")[number // len(_RULES) % 2]
    numbers: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.25}
    if make in (optim.RowWiseAdam, optim.LazyAdam):
        numbers["betas"] = (0.75, 0.875)
    generator = torch.Generator(case.weight.device).manual_seed(number)
    shape = reference.forward(case.codes, case.weight, case.spec).shape
    grads = [
        torch.randint(-1, 2, shape, generator=generator, device=case.weight.device).double() for _ in range(_STEPS)
    ]
    sums = [reference.row_sums(g, case.codes, case.spec, torch.float64) for g in grads]
    if case.weight.itemsize == 2 and any(s.sums.abs().amax() > 256 for s in sums if len(s.rows)):
        grad = "fused"  # such a sum is not exact in a sparse gradient of the table's dtype
    settings = Settings(make, grad, numbers, {"stochastic_rounding": True, "seed": number})
    for backend in backends or ("reference",):
        for step in _steps(case.weight, case.codes, grads, case, backend, settings):
            _check_step_at_size(report, case, f"{backend} {settings}", step, *sums[step.number][:2], settings)


class _Before:
    """A table and the state of its optimizer before a step."""

    def __init__(self, table: Tensor, state: dict[str, Tensor]) -> None:
        self.table = table.detach().clone()
        self.state = {name: value.clone() for name, value in state.items()}


class _Step(NamedTuple):
    """A step that was taken, and the table and state before it."""

    optimizer: optim.RowOptimizer
    table: Tensor
    before: _Before
    number: int

    @property
    def was_taken(self) -> bool:
        state = self.optimizer.state[self.table]
        return bool(state) and int(state["step"]) > int(self.before.state.get("step", 0))


def _steps(
    weight: Tensor, source: Tensor | TokenStream, grads: list[Tensor], case: Case, backend: str, settings: Settings
) -> Iterator[_Step]:
    table = nn.Parameter(weight.detach().clone())
    optimizer = settings.make([table], **settings.numbers, **settings.rounding)
    for number, dS in enumerate(grads):
        before = _Before(table, optimizer.state[table])
        options = {"backend": backend, "grad": settings.grad}
        if isinstance(source, TokenStream):
            S = token_memory(*source[:2], table, case.spec, segment_ids=source[2], **options)
        else:
            S = prefix_memory(source, table, case.spec, **options)
        S.backward(dS.to(S))
        optimizer.step()
        optimizer.zero_grad()
        yield _Step(optimizer, table, before, number)


def _check_step(
    report: Report, case: Case, what: str, taken: _Step, rows: Tensor, sums: Tensor, settings: Settings
) -> None:
    optimizer, table, before, _ = taken
    dtype, state, numbers, seed = table.dtype, optimizer.state[table], settings.numbers, settings.seed
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


def _check_step_at_size(
    report: Report, case: Case, what: str, step: _Step, rows: Tensor, sums: Tensor, settings: Settings
) -> None:
    """As `_check_step`, by the reference's rule in float64 on all touched rows at once; the others keep their bits."""
    table, state, rule, t = step.table.detach(), step.optimizer.state[step.table], step.optimizer.rule, step.number + 1
    names = [name for name in RULES[rule].state if name in state]
    for value, old in [(table, step.before.table), *((state[n], step.before.state.get(n)) for n in names)]:
        kept = torch.zeros_like(value) if old is None else old.clone()
        kept[rows] = value[rows]
        report.equal(f"{what}: untouched rows", case, value, kept)
    beta1, beta2 = settings.numbers.get("betas", (0.0, 0.0))
    numbers = settings.numbers["lr"], settings.numbers["weight_decay"], step.optimizer.defaults.get("eps", 0.0)
    hyper = Hyper(*numbers, beta1, beta2, 1 - beta1**t, 1 - beta2**t)
    w, unit = step.before.table[rows].double(), torch.finfo(accumulator(table.dtype)).eps / 2
    held = [step.before.state.get(n, torch.zeros_like(state[n]))[rows].double() for n in names]
    new, *new_state = RULES[rule].update(decay(w, hyper), sums, *held, hyper)
    # What the errors of rounding are in proportion to: the row, and its largest move with these sizes.
    move = RULES[rule].update(torch.zeros_like(w), sums.abs(), *(h.abs() for h in held), hyper)[0]
    error = _ROUNDINGS * unit * (w.abs() + move.abs())
    ends = []
    for off in (-error, error):
        value = new + off
        if table.dtype == torch.bfloat16:
            bits = random_bits(settings.seed, torch.tensor(t, device=rows.device), rows, w.shape[1])
            value = stochastic_round(value.float(), bits).double()
        elif table.dtype == torch.float16:
            kept = torch.finfo(table.dtype)
            value = value + off.sign() * (kept.eps * value.abs() + kept.smallest_normal * kept.eps)
        ends.append(value)
    if len(rows):
        report.equal(f"{what}: steps", case, state["step"].cpu(), torch.tensor(t))
    report.between(f"{what}: rows", case, table[rows].double(), *ends)
    most = sums.abs().amax(1) if len(rows) else sums.new_zeros(0)
    for name, value, old in zip(names, new_state, held, strict=True):
        slack = value.abs() + old.abs()
        slack = _ROUNDINGS * unit * (slack + (most[:, None] if value.dim() == 2 else most))
        report.between(f"{what}: {name}", case, state[name][rows].double(), value - slack, value + slack)


def _rounded(values: np.ndarray, dtype: torch.dtype, bits: list[int] | None, error: np.ndarray) -> np.ndarray:
    """`values` as the table holds them; where they are rounded to nearest, one unit further in the sign of `error`."""
    if bits is not None:
        return np.array([oracle.stochastic_bfloat16(v, b) for v, b in zip(values.tolist(), bits, strict=True)])
    if dtype in (torch.float32, torch.float64):
        return values
    kept = torch.finfo(dtype)
    return values + np.sign(error) * (kept.eps * np.abs(values) + kept.smallest_normal * kept.eps)
