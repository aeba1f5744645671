"""Parity of every backend with the reference, and of the reference with the integer oracle.

Random configurations are small and of every kind. Fixed shapes are compiled once and run over batches of the sizes of
training. Rows are compared bit for bit, sums within the bound that their summands give. `updates.py` holds the
optimizers to the same cases, `decoding.py` single steps, `quantized.py` tables of 8 bits a number, `lags.py` cross-item
rows that several items share and `search.py` constrained search.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from .._environment import installed_version
from ..addressing import TokenStream
from ..operation import prefix_memory, prefix_rows, reference, token_memory
from . import oracle
from .cases import Case, another_batch, batches_of, random_case
from .decoding import check_decoding
from .lags import check_lags
from .quantized import check_quantized
from .report import Report, exact_sums, sum_bound
from .search import check_search, check_trie
from .updates import check_updates, check_updates_at_size, random_settings

# The oracle's loops are slow; larger cases are left to the backends.
_ORACLE_SIDS = 8


def verify(
    backends: tuple[str, ...], cases: int, seed: int, device: str, batches: int = 1, until: float = math.inf
) -> Iterator[Report]:
    """Check `cases` random configurations, yielding the growing report after each.

    Args:
        backends: backends other than the reference to hold against it; may be empty.
        device: where the tensors live.
        batches: of each configuration; what it compiles is compiled for the first.
        until: start no batch but the first of a configuration from then on, by `time.monotonic`.
    """
    report = Report(seed, device, ("reference", *backends))
    for number in range(cases):
        rng = random.Random(f"{seed}/{number}")
        case = random_case(rng, device)
        generator = torch.Generator().manual_seed(rng.randrange(1 << 32))
        settings = random_settings(rng)
        for batch in range(batches):
            if batch and time.monotonic() >= until:
                break
            case = another_batch(rng, case) if batch else case
            _check_oracle(report, case)
            _check_codes(report, case, backends, generator)
            _check_tokens(report, case, backends, generator)
            check_updates(report, case, backends, rng, settings)
            check_decoding(report, case, backends, rng)
            check_quantized(report, case, backends)
            check_lags(report, case, backends)
            report.batches += 1
        check_trie(report, case, rng)
        if number == 0 and installed_version("transformers") is not None:
            check_search(report, case, rng)
        report.cases += 1
        yield report


def verify_shapes(
    backends: tuple[str, ...], names: tuple[str, ...], seed: int, device: str, batches: int, largest: int
) -> Iterator[Report]:
    """Check the first `batches` batches of fixed shapes, a batch of each in turn, yielding the report after each.

    Args:
        names: of `cases.SHAPES`.
        largest: SIDs of the largest batch.
    """
    report = Report(seed, device, ("reference", *backends))
    generator = torch.Generator(device).manual_seed(seed)
    turns = zip(*(batches_of(name, device, seed, largest) for name in names), strict=True)
    for number, turn in enumerate(itertools.islice(turns, batches)):
        for case in turn:
            if number == 0:
                _check_oracle(report, case)
            _check_codes(report, case, backends, generator)
            _check_tokens(report, case, backends, generator)
            check_updates_at_size(report, case, backends, number)
            if number == 0:
                some = replace(case, input_ids=case.input_ids[:, :40])
                check_decoding(report, some, backends, random.Random(seed))
                check_quantized(report, case, backends)
            report.cases += number == 0
            report.batches += 1
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
    grad = torch.randn(exact.shape, generator=generator, device=generator.device, dtype=torch.float64).to(weight)
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
