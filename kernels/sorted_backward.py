"""Launchers of the sorting backward: the same sums to a dense gradient, to a list of touched rows, or into an update.

    prefix, full mode    sort the codes -> claim the rows of the runs, and mark those that runs share -> sum and write
                         -> merge the shared ones
    the same, crowded    where the batch is large beside the table, or the rows are to be listed: sort the rows of the
                         runs instead of claiming them
    suffix mode          rows of all terms -> sort -> sum and write

Shapes depend on the batch's shape alone and nothing is read back to the host, so all of it can be captured in a CUDA
graph. The same input gives the same bits.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from prefixmem_fast._dtypes import accumulator
from prefixmem_fast.addressing import AddressSpec, TokenStream

from .aside import room_for_sums
from .rows import pair_rows, token_codes
from .shared_rows import Layout, make_claims, mark_claims, mark_sorted, merge_rows
from .sorted_codes import SortPlan, most_sids, sort_plan_of, sort_prefixes
from .sorted_prefixes import sum_prefixes
from .sorted_rows import sum_terms, sum_values, terms_of
from .tiles import index_dtype, zero_table
from .update import STORE, Destination, Ending, Epilogue, ending_of


def dense(grad: Tensor, source: Tensor | TokenStream, spec: AddressSpec) -> Tensor:
    """Dense gradient ``[R, w]`` in the dtype of grad; contiguous codes ``[M, L]`` or a token stream."""
    total = zero_table(spec, grad.shape[-1] // spec.heads, grad.dtype, grad.device)
    _sum(grad, source, spec, ending_of(Destination(total), STORE, deterministic=True))
    return total


def update(
    grad: Tensor,
    source: Tensor | TokenStream,
    spec: AddressSpec,
    destination: Destination,
    epilogue: Epilogue,
    squares: list[Tensor] | None,
) -> None:
    """Update the touched rows of the destination's table, each once; `squares` gains the sum of their squares."""
    _sum(grad, source, spec, ending_of(destination, epilogue, squares))


def padded_rows(grad: Tensor, source: Tensor | TokenStream, spec: AddressSpec) -> tuple[Tensor, Tensor]:
    """The touched rows int64 ``[E]``, ascending, and their sums ``[E, w]``, in the accumulator's dtype.

    E is the number of rows the batch would touch if all were distinct. Entries past the last touched row repeat it with
    zeros; a batch without any touched row gives row 0 with zeros.
    """
    return _sum(grad, source, spec, None)


def update_sparse(
    rows: Tensor, values: Tensor, destination: Destination, epilogue: Epilogue, squares: list[Tensor] | None
) -> None:
    """Update the rows int64 ``[E]`` of a sparse gradient ``[E, w]``; entries of one row are summed first."""
    if rows.numel():
        rows, order = torch.sort(rows, stable=True)
        sum_values(rows, order, values, accumulator(values.dtype), ending_of(destination, epilogue, squares))


def _sum(
    grad: Tensor, source: Tensor | TokenStream, spec: AddressSpec, ending: Ending | None
) -> tuple[Tensor, Tensor] | None:
    """Sum into an ending's destination; without one, into a list of the touched rows, which is returned."""
    codes, n_tokens = token_codes(source, spec) if isinstance(source, TokenStream) else (source, None)
    run = _sum_suffixes_of if spec.mode == "suffix" else _sum_prefixes_of
    return run(grad, codes, n_tokens, spec, ending)


def _sum_prefixes_of(grad, codes, n_tokens, spec, ending):
    ranked = ending is None
    plan = sort_plan_of(spec, ranked)
    W, dtype = grad.shape[-1] // spec.heads, accumulator(grad.dtype)
    most = most_sids(codes, n_tokens, spec)
    if not most or not plan.orders:
        return _empty(grad, W) if ranked else None
    layout = Layout(plan.n_claimed * spec.heads, plan.n_aside * spec.heads, len(plan.orders) * spec.heads)
    slots = most * layout.slots
    chained = 0 < slots < (1 << 31) - 1 and not crowded(most, plan, spec)
    claims = make_claims(slots, grad.device) if chained else None
    prefixes = sort_prefixes(codes, n_tokens, spec, plan, None if ranked else claims)
    keys = touched = runs = None
    if chained and not ranked:
        mark_claims(prefixes.targets, claims, layout)
    elif slots:
        rows, runs = torch.sort(prefixes.targets[:, : plan.n_aside].reshape(-1), stable=True)
        ranks = None
        if ranked:
            ranks, *touched = _rank(rows, W, dtype)
            ending = ending_of(Destination(touched[1]), STORE)
        keys = mark_sorted(rows, runs, ranks, prefixes.targets, claims, layout)
    aside = room_for_sums(slots, W, grad.dtype, grad.device)
    sum_prefixes(grad, prefixes, aside, ending, spec, plan)
    if chained:
        merge_rows(prefixes.targets, claims, aside, ending, layout)
    elif slots:
        sum_values(keys, runs, aside, dtype, ending)
    return touched


@lru_cache(maxsize=64)
def _least_crowded(plan: SortPlan, spec: AddressSpec) -> int:
    """The most SIDs with which no order can have more runs than rows."""
    aside = [(math.prod(spec.window_sizes[:n]), spec.rows_per_order[n - 1]) for n in plan.orders[: plan.n_aside]]
    return min((rows for prefixes, rows in aside if prefixes > rows), default=1 << 63)


def crowded(most: int, plan: SortPlan, spec: AddressSpec) -> bool:
    """Whether so many runs of one order may meet in so few rows that chains would be long."""
    return most > _least_crowded(plan, spec)


def _sum_suffixes_of(grad, codes, n_tokens, spec, ending):
    W, dtype = grad.shape[-1] // spec.heads, accumulator(grad.dtype)
    rows = pair_rows(codes, terms_of(spec).pairs, index_dtype(spec.total_rows), spec)
    if not rows.numel():
        return _empty(grad, W) if ending is None else None
    keys, order = torch.sort(rows.flatten(), stable=True)
    touched = None
    if ending is None:
        ranks, *touched = _rank(keys, W, dtype)
        keys, ending = torch.where(keys >= 0, ranks, -1), ending_of(Destination(touched[1]), STORE)
    sum_terms(keys, order, grad, n_tokens, dtype, ending, spec)
    return touched


def _rank(rows: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of sorted rows ``[E]``, -1 for none: each one's rank among the distinct ones, and the padded list to fill."""
    new = torch.ones_like(rows, dtype=torch.bool)
    torch.ne(rows[1:], rows[:-1], out=new[1:])
    new &= rows >= 0
    ranks = torch.cumsum(new, 0) - 1
    touched = rows[-1:].clamp(min=0).long().repeat(len(rows) + 1)  # one more, for entries that open no run
    touched.scatter_(0, torch.where(new, ranks, len(rows)), rows.long())
    return ranks, touched[:-1], torch.zeros((len(rows), width), dtype=dtype, device=rows.device)


def _empty(grad: Tensor, width: int) -> tuple[Tensor, Tensor]:
    return grad.new_empty((0,), dtype=torch.int64), grad.new_empty((0, width))
