"""Parity of every backend with the reference, and of the reference with the integer oracle, over random configurations.

Rows are compared bit for bit. A sum of k values accumulated with unit roundoff u, in any order, is off by at most
k * u * sum|v|, and rounding it to the table's dtype adds one unit in the last place; `sum_bound` is that bound, so no
tolerance here is a guess.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._choices import MODES
from .._dtypes import accumulator as accumulator_of
from ..addressing import AddressSpec, TokenStream
from ..operation import prefix_memory, prefix_rows, reference, token_memory
from . import oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The oracle's loops are slow; larger cases are left to the backends.
_ORACLE_SIDS = 8


@dataclass(frozen=True)
class Case:
    """One random configuration with its inputs."""

    spec: AddressSpec
    codes: Tensor  # [M, L]
    input_ids: Tensor  # [B, T]
    token_table: Tensor  # [V, 2]
    segment_ids: Tensor | None
    weight: Tensor  # [R, w]

    def __str__(self) -> str:
        s = self.spec
        return (
            f"AddressSpec({s.codebook_sizes}, {s.max_order}, {s.heads}, {s.table_rows}, {s.mode!r}, "
            f"{s.addressing!r}, {s.active_levels}, seed={s.seed}), width {self.weight.shape[1]}, "
            f"{self.weight.dtype}, codes {self.codes.dtype} {tuple(self.codes.shape)}, "
            f"input_ids {tuple(self.input_ids.shape)}{', packed' if self.segment_ids is not None else ''}"
        )


@dataclass
class Report:
    """What a verification result; errors are fractions of the derived bound, so anything above 1 is a mismatch."""

    seed: int
    device: str
    backends: tuple[str, ...]
    cases: int = 0
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


def random_spec(rng: random.Random) -> AddressSpec:
    """Small sizes of every kind: one level to six, one-row tables, mixed codebooks, exact and hashed orders."""
    levels, orders = rng.randint(1, 6), rng.randint(1, 5)
    largest = rng.choice((2, 5, 12, 300, 70_000, 3_000_000_000))
    sizes = [rng.randint(1, largest) for _ in range(levels)]
    rows = rng.choice((1, 7, 64, 500))
    return AddressSpec(
        codebook_sizes=sizes,
        max_order=orders,
        heads=rng.randint(1, 5),
        table_rows=rng.choice((rows, [rng.randint(1, rows) for _ in range(orders)])),
        mode=rng.choice(MODES),
        addressing=rng.choice(("auto", "hash")),
        active_levels=sorted(rng.sample(range(1, levels + 1), rng.randint(1, levels))),
        seed=rng.randrange(1 << 32),
    )


def random_codes(rng: random.Random, spec: AddressSpec, sids: int, invalid: float) -> list[list[int]]:
    """SIDs with duplicates and shared prefixes; a share `invalid` of them is cut or damaged."""
    pool = [[rng.randrange(size) for size in spec.codebook_sizes] for _ in range(max(sids // 3, 1))]
    result = []
    for _ in range(sids):
        sid, other, keep = rng.choice(pool), rng.choice(pool), rng.randint(0, spec.levels)
        sid = sid[:keep] + other[keep:]
        if rng.random() < invalid:
            cut = rng.randrange(spec.levels)
            sid = [*sid[:cut], rng.choice((-1, -(1 << 14), spec.codebook_sizes[cut])), *sid[cut + 1 :]]
        result.append(sid)
    return result


def random_tokens(rng: random.Random, spec: AddressSpec, shape: tuple[int, int]) -> tuple[list[list[int]], list]:
    """Rows of whole SIDs, cut SIDs, text and noise, over a shuffled vocabulary: input ids and the token table."""
    entries = [(0, 0), (0, 0), (0, 0)]
    by_level: list[list[int]] = []
    for level, size in enumerate(spec.codebook_sizes, 1):
        codes = rng.sample(range(min(size, 1 << 30)), min(3, size))
        by_level.append(list(range(len(entries), len(entries) + len(codes))))
        entries += [(level, code) for code in codes]
    shuffled = list(range(len(entries)))
    rng.shuffle(shuffled)
    table = [[0, 0] for _ in entries]
    for place, entry in zip(shuffled, entries, strict=True):
        table[place] = list(entry)

    rows = []
    for _ in range(shape[0]):
        row: list[int] = []
        while len(row) < shape[1]:
            kind = rng.random()
            if kind < 0.6:
                row += [shuffled[rng.choice(ids)] for ids in by_level]
            elif kind < 0.8:
                row += [shuffled[rng.choice(ids)] for ids in by_level[: rng.randint(1, spec.levels)]]
            else:
                row.append(rng.choice((rng.randrange(len(entries)), -100, len(entries) + 5)))
        cut = rng.randint(0, len(row) - shape[1])
        rows.append(row[cut : cut + shape[1]])
    return rows, table


def random_case(rng: random.Random, device: str) -> Case:
    spec = random_spec(rng)
    codes = torch.tensor(
        random_codes(rng, spec, rng.choice((0, 1, 5, 33, 70)), rng.choice((0.0, 0.3))), dtype=torch.int64
    ).reshape(-1, spec.levels)
    widest = codes.abs().max().item() if codes.numel() else 0
    allowed = [d for d in (torch.int16, torch.int32, torch.int64) if widest <= torch.iinfo(d).max]
    shape = rng.choice(((0, 4), (1, 1), (2, 37), (3, 20)))
    ids, table = random_tokens(rng, spec, shape)
    segments = torch.tensor(
        [sorted(rng.randrange(3) for _ in range(shape[1])) for _ in range(shape[0])], dtype=torch.int64
    ).reshape(shape)
    generator = torch.Generator().manual_seed(rng.randrange(1 << 32))
    width = rng.choice((1, 3, 8, 20, 64))
    weight = torch.randn(spec.total_rows, width, generator=generator, dtype=torch.float64)
    return Case(
        spec,
        codes.to(device, rng.choice(allowed)),
        torch.tensor(ids, dtype=rng.choice((torch.int32, torch.int64))).reshape(shape).to(device),
        torch.tensor(table, dtype=torch.int32, device=device),
        segments.to(device) if rng.random() < 0.5 else None,
        weight.to(device, rng.choice(DTYPES)),
    )


def verify(backends: tuple[str, ...], cases: int, seed: int, device: str) -> Iterator[Report]:
    """Check `cases` random configurations, yielding the growing report after each.

    Args:
        backends: backends other than the reference to hold against it; may be empty.
        device: where the tensors live.
    """
    report = Report(seed, device, ("reference", *backends))
    for number in range(cases):
        rng = random.Random(f"{seed}/{number}")
        case = random_case(rng, device)
        generator = torch.Generator().manual_seed(rng.randrange(1 << 32))
        _check_oracle(report, case)
        _check_codes(report, case, backends, generator)
        _check_tokens(report, case, backends, generator)
        report.cases += 1
        yield report


def _check_oracle(report: Report, case: Case) -> None:
    """The reference against Python integers and float64 loops, on the case's first SIDs and first row of tokens."""
    spec, weight = case.spec.to_dict(), case.weight.double().cpu()
    codes = case.codes[:_ORACLE_SIDS]
    rows = torch.from_numpy(oracle.prefix_rows(codes.cpu().numpy(), spec))
    result = prefix_rows(codes, case.spec, backend="reference").cpu()
    report.equal("reference rows against the oracle", case, result, rows)

    wide = weight.to(codes.device, copy=True).requires_grad_()
    memory = prefix_memory(codes, wide, case.spec, backend="reference")
    terms = torch.full_like(memory, case.spec.max_order, dtype=torch.float64).detach().cpu()
    exact = torch.from_numpy(oracle.prefix_memory(codes.cpu().numpy(), weight.numpy(), spec))
    magnitude = torch.from_numpy(oracle.prefix_memory(codes.cpu().numpy(), weight.abs().numpy(), spec))
    bound = 2 * sum_bound(terms, magnitude, exact, torch.float64)
    report.within("reference sums against the oracle", case, memory.detach().cpu(), exact, bound)

    grad = torch.ones_like(memory)
    memory.backward(grad)
    exact = torch.from_numpy(oracle.prefix_memory_backward(grad.cpu().numpy(), codes.cpu().numpy(), spec))
    bound = 2 * sum_bound(exact, exact, exact, torch.float64)
    report.within("reference gradient against the oracle", case, wide.grad.cpu(), exact, bound)

    ids = case.input_ids[:1]
    segments = None if case.segment_ids is None else case.segment_ids[:1]
    result = token_memory(ids, case.token_table, wide.detach(), case.spec, segment_ids=segments, backend="reference")
    arrays = (ids.cpu().numpy(), case.token_table.cpu().numpy())
    segments = None if segments is None else segments.cpu().numpy()
    exact = torch.from_numpy(oracle.token_memory(*arrays, weight.numpy(), spec, segments))
    magnitude = torch.from_numpy(oracle.token_memory(*arrays, weight.abs().numpy(), spec, segments))
    terms = torch.full_like(exact, case.spec.max_order)
    bound = 2 * sum_bound(terms, magnitude, exact, torch.float64)
    report.within("reference tokens against the oracle", case, result.cpu(), exact, bound)


def _check_codes(report: Report, case: Case, backends: tuple[str, ...], generator: torch.Generator) -> None:
    spec, codes = case.spec, case.codes
    rows = prefix_rows(codes, spec, backend="reference")
    for backend in backends:
        report.equal(f"{backend} rows", case, prefix_rows(codes, spec, backend=backend), rows)
    _check_sums(
        report,
        case,
        "",
        backends,
        generator,
        lambda weight, **options: prefix_memory(codes, weight, spec, **options),
        codes,
    )


def _check_tokens(report: Report, case: Case, backends: tuple[str, ...], generator: torch.Generator) -> None:
    stream = TokenStream(case.input_ids, case.token_table, case.segment_ids)
    _check_sums(
        report,
        case,
        "token ",
        backends,
        generator,
        lambda weight, **options: token_memory(*stream[:2], weight, case.spec, segment_ids=stream[2], **options),
        stream,
    )


def _check_sums(report, case, kind, backends, generator, operation, source) -> None:
    """One operation, forward and gradients, on every backend, against float64 and its derived bounds."""
    weight, spec = case.weight, case.spec
    exact, bound = exact_sums(lambda weight: reference.forward(source, weight, spec), weight)
    grad = torch.randn(exact.shape, generator=generator, dtype=torch.float64).to(weight)
    exact_grad, grad_bound = exact_sums(lambda grad: reference.dense_gradient(grad, source, spec), grad)
    touched_rows = reference.row_sums(grad, source, spec, grad.dtype).rows

    for backend in ("reference", *backends):
        leaf = weight.detach().clone().requires_grad_()
        for deterministic in (False, True):
            out = operation(leaf, backend=backend, deterministic=deterministic)
            report.within(f"{backend} {kind}sums", case, out.detach(), exact, bound)
            (result,) = torch.autograd.grad(out, leaf, grad, retain_graph=deterministic)
            report.within(f"{backend} {kind}gradient", case, result, exact_grad, grad_bound)
        (again,) = torch.autograd.grad(out, leaf, grad)
        report.equal(f"{backend} {kind}gradient, deterministic, twice", case, again, result)

        operation(leaf, backend=backend, grad="sparse").backward(grad)
        sparse = leaf.grad.coalesce()
        if len(touched_rows):  # a batch without any gives Triton's fixed number of entries nothing to repeat
            report.equal(f"{backend} {kind}touched rows", case, sparse.indices()[0], touched_rows)
        report.within(f"{backend} {kind}sparse gradient", case, sparse.to_dense(), exact_grad, grad_bound)
