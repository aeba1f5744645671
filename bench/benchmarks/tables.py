"""The memory tables: reading them, the gradient of their rows, and a step that trains them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from prefixmem_fast import prefix_rows, token_memory
from prefixmem_fast.addressing import TokenStream
from prefixmem_fast.operation import reference

from ..registry import Case, Contender, Mark, benchmark, unmarked
from .providers import (
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
from .workloads import (
    BATCHES,
    HEADS,
    WIDTH,
    Workload,
    no_histories,
    token_stream,
    vocabulary_of,
)

SAMPLE = 24  # rows of each table that are checked: those with the most terms, as many others, and untouched ones
FEW_TERMS = 64  # that half precision sums well enough to be checked
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
    codes = codes[device == "cuda" :]
    changes = [
        *({"sids": sids} for sids in sizes[:2]),
        codes[0],
        *({"sids": sids} for sids in sizes[2:]),
        *codes[1:],
        {"table_rows": tables[0]},
        {"dtype": dtype},
        {"table_rows": tables[1]},
    ]
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
    expected = reference.forward(batches[0][:CHECKED], weight, spec)

    @torch.no_grad()
    def step(provider: Provider, turn: int, mark: Mark) -> None:
        provider.forward(batches[turn % BATCHES])
        mark("forward")

    @torch.no_grad()
    def check(provider: Provider) -> str | None:
        return differs(provider.forward(batches[0])[:CHECKED], expected)

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
    expected = reference.forward(TokenStream(batches[0], table), weight, spec)

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
    sample = sampled_rows(workload, batches[0], grad)
    total = sum(grad[:, a].double().sum() * min(level, spec.max_order) for a, level in enumerate(spec.active_levels))
    scale = grad.double().square().sum().sqrt() * spec.max_order

    def step(provider: Provider, turn: int, mark: Mark) -> None:
        out = provider.forward(batches[turn % BATCHES])
        mark("forward")
        provider.backward(out, grad)
        mark("backward")
        provider.optimizer.zero_grad()

    def check(provider: Provider) -> str | None:
        provider.backward(provider.forward(batches[0]), grad)
        gradient = torch.cat([table.grad for table in provider.tables()])
        provider.optimizer.zero_grad()
        judged = sample.judged(provider, gradient)
        tolerance = 1e-4 if gradient.itemsize > 2 else 0.1
        wrong = differs(gradient[sample.rows][judged], sample.sums[judged], tolerance)
        if wrong or gradient.itemsize == 2:  # half precision rounds every row, so its total says nothing
            return wrong
        off = abs(gradient.double().sum() - total)
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


def _training(workload: Workload, device: str, providers: tuple[type[Provider], ...], memory: bool = False) -> Case:
    if reason := _no_codes(workload):
        return _absent([p.trains() for p in providers], reason)
    spec, batches, grad = workload.spec, workload.batches(device), workload.gradient(device)
    codes, weight = batches[0], workload.weight(device)
    expected = reference.forward(codes[:CHECKED], weight, spec)
    sample = sampled_rows(workload, codes, grad)
    before = weight[sample.rows].double()
    del weight

    def step(provider: Provider, turn: int, mark: Mark) -> None:
        out = provider.forward(batches[turn % BATCHES])
        mark("forward")
        provider.backward(out, grad)
        mark("backward")
        provider.update()
        mark("update")

    def check(provider: Provider) -> str | None:
        out = provider.forward(codes)
        if wrong := differs(out.detach()[:CHECKED], expected):
            return wrong
        provider.backward(out, grad)
        provider.update()
        return wrong_update(provider, sample, before)

    contenders = [
        _contender(p.trains(), p, device, lambda p=p: p(spec, workload.weight(device)), p.needs(workload))
        for p in providers
    ]
    update = workload.training(codes)
    return Case(
        contenders,
        step,
        check,
        state_bytes=Provider.state_bytes if memory else None,
        alone=lambda provider: sorts(lambda: step(provider, 0, unmarked)),
        floors={"backward + update": update, "step": update + workload.reading(codes)},
        totals={"backward + update": ("backward", "update"), "step": ("forward", "backward", "update")},
    )


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


class Sample(NamedTuple):
    """Some rows of every table, ascending, untouched ones among them."""

    rows: Tensor  # int64 [U]
    sums: Tensor  # float64 [U, w], their exact gradients
    terms: Tensor  # int64 [U], reads that add to them
    table: Tensor  # int64 [U], which (order, head)

    def judged(self, provider: Provider, values: Tensor) -> Tensor:
        """Which rows are checked: half precision of others sums many terms badly, and is not wrong for that."""
        if values.itemsize > 2 or isinstance(provider, Ours):
            return torch.ones_like(self.rows, dtype=torch.bool)
        return self.terms <= FEW_TERMS


def sampled_rows(workload: Workload, codes: Tensor, grad: Tensor) -> Sample:
    """The sample of a batch and a gradient of S."""
    spec, device = workload.spec, codes.device
    generator = torch.Generator(device).manual_seed(0)
    read = prefix_rows(codes, spec)[:, spec.active_levels[-1] - 1]  # [M, N, H], -1 past the last level
    by_head = grad.view(*grad.shape[:2], HEADS, WIDTH)
    columns = []
    for order in range(1, spec.max_order + 1):
        levels = [a for a, level in enumerate(spec.active_levels) if level >= order]
        for head in range(HEADS):
            row = read[:, order - 1, head].contiguous()
            touched, terms = row[row >= 0].unique(return_counts=True)
            most = touched[terms.topk(min(SAMPLE, len(touched))).indices]
            some = touched[torch.randperm(len(touched), generator=generator, device=device)[:SAMPLE]]
            any_rows = torch.randint(spec.rows_per_order[order - 1], (SAMPLE,), generator=generator, device=device)
            others = spec.offsets[order - 1][head] + any_rows
            rows = torch.cat([most, some, others[~torch.isin(others, touched)]]).unique()
            place = torch.searchsorted(rows, row).clamp(max=len(rows) - 1)
            here = (rows[place] == row).nonzero().squeeze(1)
            sums = torch.zeros(len(rows), WIDTH, dtype=torch.float64, device=device)
            if levels:
                sums.index_add_(0, place[here], by_head[here, :, head][:, levels].double().sum(1))
            count = torch.bincount(place[here], minlength=len(rows))
            columns.append((rows, sums, count, torch.full_like(rows, len(columns))))
    return Sample(*(torch.cat(column) for column in zip(*columns, strict=True)))


def differs(result: Tensor, expected: Tensor, tolerance: float | None = None) -> str | None:
    """How a result is wrong, or None; half-precision sums of four rows round four times."""
    if result.shape != expected.shape:
        return f"its shape is {tuple(result.shape)}, the reference's {tuple(expected.shape)}"
    if tolerance is None:
        tolerance = 3e-2 if min(result.itemsize, expected.itemsize) == 2 else 1e-5
    result, expected = result.double(), expected.double()
    allowed = tolerance * (expected.abs() + expected.square().mean().sqrt())
    off = ~((result - expected).abs() <= allowed)  # NaN is off
    if not off.any():
        return None
    most = (result - expected).abs().max()
    return f"{off.double().mean():.2%} of the values differ from the reference, by up to {most:.3g}"


def wrong_update(provider: Provider, sample: Sample, before: Tensor) -> str | None:
    """How a table's rows after the first step are wrong, or None.

    Adam's first step is the sign of the gradient, which rounding may turn where the sum is nearly zero: half precision
    is not judged there, and a few values of each table may differ.
    """
    updated, expected = provider.rows(sample.rows), provider.first_step(before, sample.sums)
    half = updated.itemsize == 2
    allowed = (0.05 if half else 1e-3) * LR + (2**-7 if half else 1e-6) * expected.abs()
    off = ~((updated.double() - expected).abs() <= allowed)
    judged = sample.judged(provider, updated)[:, None].expand_as(off)
    if half:
        size = sample.sums.square().mean(1, keepdim=True).sqrt()
        judged = judged & ((sample.sums.abs() > 0.1 * size) | (size == 0))
    for table in sample.table.unique():
        here = judged & (sample.table == table)[:, None]
        share = (off & here).sum() / here.sum().clamp(min=1)
        if share > (0.01 if half else 2e-3):
            order, head = divmod(int(table), HEADS)
            return f"{share:.2%} of the values of order {order + 1}, head {head}, are wrong after the first update"
    return None


def _contender(name: str, provider: type[Provider], device: str, make: Callable[[], Provider], needs: int) -> Contender:
    reason = provider.missing(device)
    return Contender(name, None if reason else make, reason, needs, provider.warm_up)


def _no_codes(workload: Workload) -> str | None:
    return no_histories() if workload.codes == "histories" else None


def _absent(names: list[str], reason: str) -> Case:
    return Case([Contender(name, None, reason) for name in names], lambda *_: None, lambda *_: None)
