"""The memory tables: reading them, the gradient of their rows, and a step that trains them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from prefixmem_fast import prefix_rows, reference, token_memory

from ..measure import Mark
from ..providers import (
    GRADIENTS,
    LR,
    READERS,
    SWEEP_READERS,
    SWEEP_TRAINERS,
    TRAINERS,
    EagerTables,
    FusedTable,
    Ours,
    Provider,
)
from ..suite import Case, Contender, benchmark
from ..workloads import BATCHES, HEADS, WIDTH, Workload, no_histories, token_stream, vocabulary_of

SAMPLE = 256  # rows whose first update is checked: those with the most terms, as many others, as many untouched ones
TEXT = 3  # tokens of text between SIDs
CHECKED = 65_536  # SIDs whose S is checked

Grid = list[dict[str, Any]]

QUICK = {"codes": "uniform", "sids": 64, "table_rows": 500, "dtype": "float32"}


def vary(device: str, *changes: dict[str, Any]) -> Grid:
    """The workload that stands for the paper on this device, then the same with each of the changes."""
    middle = {"codes": "uniform", "sids": 16_384, "table_rows": 200_000, "dtype": "float32"}
    if device == "cuda":
        middle = {"codes": "uniform", "sids": 65_536, "table_rows": 2_000_000, "dtype": "bfloat16"}
    return [middle, *({**middle, **change} for change in changes)]


def main_workloads(device: str) -> Grid:
    """On a CPU dense training takes seconds a step, so the second one is left to the sweeps."""
    return vary(device, {"codes": "zipf 1.05"}) if device == "cuda" else vary(device)


def sweep_workloads(device: str) -> Grid:
    """By importance; those of `main_workloads` are not done again."""
    if device == "cuda":
        sizes, tables, dtype = (4096, 1_048_576, 256, 16, 1), (500_000, 5_000_000), "float32"
    else:
        sizes, tables, dtype = (1024, 65_536, 1, 64), (20_000, 2_000_000), "bfloat16"
    codes = [{"codes": codes} for codes in ("zipf 1.05", "hot", "histories", "zipf 0.8", "zipf 1.2")]
    changes = [
        *({"sids": sids} for sids in sizes), *codes[device == "cuda" :], {"table_rows": tables[0]}, {"dtype": dtype},
        {"table_rows": tables[1]},
    ]  # fmt: skip
    return vary(device, *changes)[1:]


@benchmark(main_workloads, QUICK)
def forward(device: str, **given: Any) -> Case:
    """S of a batch of Semantic IDs, by all providers."""
    return _reading(Workload(**given), device, READERS)


@benchmark(sweep_workloads, QUICK)
def forward_sweep(device: str, **given: Any) -> Case:
    """The same over sizes, codes and tables, by fewer providers."""
    return _reading(Workload(**given), device, SWEEP_READERS)


def _reading(workload: Workload, device: str, providers: tuple[type[Provider], ...]) -> Case:
    if reason := _no_codes(workload):
        return _absent([p.reads for p in providers], reason)
    spec, weight, batches = workload.spec, workload.weight(device), workload.batches(device)
    expected = reference.prefix_memory(batches[0][:CHECKED], weight, spec)

    @torch.no_grad()
    def step(one: Provider, turn: int, mark: Mark) -> None:
        one.forward(batches[turn % BATCHES])
        mark("forward")

    @torch.no_grad()
    def check(one: Provider) -> str | None:
        return differs(one.forward(batches[0])[:CHECKED], expected)

    contenders = [_contender(p.reads, p, device, partial(p, spec, weight), workload.table_bytes) for p in providers]
    return Case(contenders, step, check, floors={"forward": workload.reading(batches[0])})


@benchmark(main_workloads, QUICK)
def tokens(device: str, **given: Any) -> Case:
    """S over tokens, where Semantic IDs stand in text."""
    workload = Workload(**given)
    spec, weight = workload.spec, workload.weight(device)
    vocabulary = vocabulary_of(spec)
    table = vocabulary.token_table(device)
    rows = max(workload.sids // 32, 1)
    codes = workload.batches(device)
    batches = [token_stream(batch, vocabulary, rows, TEXT) for batch in codes]
    expected = reference.token_memory(batches[0], table, weight, spec)

    @torch.no_grad()
    def step(read: Callable[[Tensor], Tensor], turn: int, mark: Mark) -> None:
        read(batches[turn % BATCHES])
        mark("forward")

    @torch.no_grad()
    def check(read: Callable[[Tensor], Tensor]) -> str | None:
        return differs(read(batches[0]), expected)

    contenders = [
        Contender(Ours.reads, lambda: lambda ids: token_memory(ids, table, weight, spec)),
        *(Contender(p.reads, partial(EagerTokens, p, spec, weight, table)) for p in (EagerTables, FusedTable)),
    ]
    given_bytes = batches[0].numel() * batches[0].itemsize + expected.numel() * expected.itemsize
    return Case(contenders, step, check, floors={"forward": workload.rows_and(codes[0], given_bytes)})


class EagerTokens:
    """What a user writes over tokens: find those of active levels, collect their codes, read, write back."""

    def __init__(self, provider: type[Provider], spec, weight: Tensor, table: Tensor) -> None:
        self.provider, self.table, self.dtype = provider(spec, weight), table, weight.dtype

    def __call__(self, ids: Tensor) -> Tensor:
        spec = self.provider.spec
        level, code = self.table[ids].unbind(-1)
        out = torch.zeros(*ids.shape, HEADS * WIDTH, device=ids.device, dtype=self.dtype)
        row, column = (level == spec.active_levels[-1]).nonzero(as_tuple=True)
        first = column - (spec.active_levels[-1] - 1)
        codes = torch.stack([code[row, first + i] for i in range(spec.active_levels[-1])], 1).long()
        read = self.provider.forward(codes)
        for a, active in enumerate(spec.active_levels):
            out[row, first + (active - 1)] = read[:, a]
        return out


@benchmark(main_workloads, QUICK)
def gradient(device: str, **given: Any) -> Case:
    """The dense gradient of the tables from that of S; codes are hashed again where a provider does so."""
    workload = Workload(**given)
    spec, weight, batches = workload.spec, workload.weight(device), workload.batches(device)
    grad = workload.gradient(device)
    chosen, sums = sampled_rows(workload, batches[0], grad)
    total = sum(grad[:, a].double().sum() * min(level, spec.max_order) for a, level in enumerate(spec.active_levels))
    scale = grad.double().square().sum().sqrt() * spec.max_order

    def step(one: Provider, turn: int, mark: Mark) -> None:
        out = one.forward(batches[turn % BATCHES])
        mark("forward")
        one.backward(out, grad)
        mark("backward")
        one.optimizer.zero_grad()

    def check(one: Provider) -> str | None:
        one.backward(one.forward(batches[0]), grad)
        found = torch.cat([table.grad for table in one.tables()])
        one.optimizer.zero_grad()
        wrong = differs(found[chosen], sums, 1e-4 if found.itemsize > 2 else 0.1)
        if wrong or found.itemsize == 2:  # half precision rounds every row, so its total says nothing
            return wrong
        off = abs(found.double().sum() - total)
        return f"all rows together are off by {off:.3g}" if off > 1e-4 * scale else None

    contenders = [
        _contender(f"{p.reads}, {p.gradient}", p, device, partial(p, spec, weight), 2 * workload.table_bytes)
        for p in GRADIENTS
    ]
    return Case(contenders, step, check, floors={"backward": workload.dense_gradient(batches[0])})


@benchmark(main_workloads, QUICK)
def training(device: str, **given: Any) -> Case:
    """A step of the tables, forward, gradient and update, by all providers."""
    return _training(Workload(**given), device, TRAINERS, memory=True)


@benchmark(sweep_workloads, QUICK)
def training_sweep(device: str, **given: Any) -> Case:
    """The same over sizes, codes and tables, by those whose cost follows the rows touched."""
    return _training(Workload(**given), device, SWEEP_TRAINERS)


def _training(
    workload: Workload, device: str, providers: tuple[type[Provider], ...], memory: bool = False
) -> Case:  # fmt: skip
    if reason := _no_codes(workload):
        return _absent([p.trains() for p in providers], reason)
    spec, batches, grad = workload.spec, workload.batches(device), workload.gradient(device)
    codes, weight = batches[0], workload.weight(device)
    expected = reference.prefix_memory(codes[:CHECKED], weight, spec)
    chosen, sums = sampled_rows(workload, codes, grad)
    before = weight[chosen].double()
    del weight

    def step(one: Provider, turn: int, mark: Mark) -> None:
        out = one.forward(batches[turn % BATCHES])
        mark("forward")
        one.backward(out, grad)
        mark("backward")
        one.update()
        mark("update")

    def check(one: Provider) -> str | None:
        out = one.forward(codes)
        if wrong := differs(out.detach()[:CHECKED], expected):
            return wrong
        one.backward(out, grad)
        one.update()
        return wrong_update(one.rows(chosen), one.first_step(before, sums))

    contenders = [
        _contender(
            p.trains(), p, device, lambda p=p: p(spec, workload.weight(device)), p.copies * workload.table_bytes
        )
        for p in providers
    ]  # fmt: skip
    update = workload.training(codes)
    return Case(
        contenders, step, check, held=(lambda one: one.held()) if memory else None,
        alone=lambda one: sorts(lambda: step(one, 0, _unmarked)),
        floors={"backward + update": update, "step": update + workload.reading(codes)},
        totals={"backward + update": ("backward", "update"), "step": ("forward", "backward", "update")},
    )  # fmt: skip


def _unmarked(phase: str) -> None:
    pass


def sorts(step: Callable[[], None]) -> dict[str, Callable[[], None]]:
    """The sorts of one step by themselves: those that it asks torch for, on the same keys."""
    calls: list[Callable[[], object]] = []

    def recording(function: Callable) -> Callable:
        def record(*arguments, **options):
            calls.append(partial(function, *arguments, **options))
            return function(*arguments, **options)

        return record

    with (
        mock.patch.object(torch, "sort", recording(torch.sort)),
        mock.patch.object(torch, "argsort", recording(torch.argsort)),
    ):
        step()
    return {"sorts": lambda: [call() for call in calls]} if calls else {}


def sampled_rows(workload: Workload, codes: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Some rows, ascending, and their exact gradients float64 ``[.., w]``; untouched rows are among them."""
    spec = workload.spec
    generator = torch.Generator(codes.device).manual_seed(0)
    rows = prefix_rows(codes, spec)[:, spec.active_levels[-1] - 1]  # [M, N, H], -1 past the last level
    found, terms = rows[rows >= 0].unique(return_counts=True)
    most = found[terms.topk(min(SAMPLE, len(found))).indices]
    some = found[torch.randperm(len(found), generator=generator, device=codes.device)[:SAMPLE]]
    others = torch.randint(spec.total_rows, (SAMPLE,), generator=generator, device=codes.device)
    chosen = torch.cat([most, some, others[~torch.isin(others, found)]]).unique()

    sums = torch.zeros(len(chosen), WIDTH, dtype=torch.float64, device=codes.device)
    by_head = grad.view(*grad.shape[:2], HEADS, WIDTH)
    for order in range(1, spec.max_order + 1):
        levels = [a for a, level in enumerate(spec.active_levels) if level >= order]
        for head in range(HEADS if levels else 0):
            row = rows[:, order - 1, head].contiguous()
            place = torch.searchsorted(chosen, row).clamp(max=len(chosen) - 1)
            here = (chosen[place] == row).nonzero().squeeze(1)
            sums.index_add_(0, place[here], by_head[here, :, head][:, levels].double().sum(1))
    return chosen, sums


def differs(found: Tensor, expected: Tensor, tolerance: float | None = None) -> str | None:
    """How a result is wrong, or None; half-precision sums of four rows round four times."""
    if found.shape != expected.shape:
        return f"its shape is {tuple(found.shape)}, the reference's {tuple(expected.shape)}"
    if tolerance is None:
        tolerance = 3e-2 if min(found.itemsize, expected.itemsize) == 2 else 1e-5
    found, expected = found.double(), expected.double()
    allowed = tolerance * (expected.abs() + expected.square().mean().sqrt())
    off = ~((found - expected).abs() <= allowed)  # NaN is off
    if not off.any():
        return None
    most = (found - expected).abs().max()
    return f"{off.double().mean():.2%} of the values differ from the reference, by up to {most:.3g}"


def wrong_update(found: Tensor, expected: Tensor) -> str | None:
    """How rows after the first step are wrong, or None.

    Adam's first step is the sign of the gradient, which rounding may turn where the sum is nearly zero, hence a share
    of values; half precision sums in half precision elsewhere.
    """
    half = found.itemsize == 2
    allowed = (0.05 if half else 1e-3) * LR + (2**-7 if half else 1e-6) * expected.abs()
    share = (~((found.double() - expected).abs() <= allowed)).double().mean()
    if share <= (0.1 if half else 1e-3):
        return None
    return f"{share:.2%} of the values of {len(found)} rows differ from the reference after the first update"


def _contender(
    name: str, provider: type[Provider], device: str, make: Callable[[], Provider], needs: int
) -> Contender:  # fmt: skip
    reason = provider.missing(device)
    return Contender(name, None if reason else make, reason, needs)


def _no_codes(workload: Workload) -> str | None:
    return no_histories() if workload.codes == "histories" else None


def _absent(names: list[str], reason: str) -> Case:
    return Case([Contender(name, None, reason) for name in names], _nothing, _nothing)


def _nothing(*arguments: Any) -> None:
    pass
