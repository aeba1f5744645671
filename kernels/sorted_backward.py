"""Launchers of the sorting backward: the same sums to a dense gradient, to a list of touched rows, or into an update.

    prefix, full mode    sort the codes -> rows of the runs -> sort and mark rows that runs share -> sum and write
                         -> merge the shared ones
    suffix mode          rows of all terms -> sort -> sum and write

Shapes depend on the batch's shape alone and nothing is read back to the host, so all of it can be captured in a CUDA
graph. The same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixmem_fast._dtypes import accumulator
from prefixmem_fast.addressing import AddressSpec, TokenStream

from .rows import pair_rows, token_codes
from .sorted_prefixes import most_sids, sort_plan_of, sort_prefixes, sum_prefixes
from .sorted_rows import sum_terms, sum_values, terms_of
from .tiles import LAUNCH, blocks, zero_table
from .update import STORE, Destination, Epilogue


@triton.jit(do_not_specialize=["E"])
def mark_shared_kernel(p_rows, p_order, p_ranks, p_slots, p_keys, E, BE: tl.constexpr):
    """Rows [E], sorted, -1 for none, of runs order[e] -> slots [E] of the runs: -1 where another run has the same row,
    else the rank of the row (0 without ranks); and keys [E] to merge by: the row or its rank where shared, else -1."""
    o_e = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    m_e = o_e < E
    b_row = tl.load(p_rows + o_e, mask=m_e, other=-1)  # [BE]
    m_row = m_e & (b_row >= 0)
    m_before = m_row & (o_e > 0)
    m_shared = m_before & (tl.load(p_rows + o_e - 1, mask=m_before, other=-1) == b_row)
    m_after = m_row & (o_e + 1 < E)
    m_shared = m_shared | (m_after & (tl.load(p_rows + o_e + 1, mask=m_after, other=-1) == b_row))
    b_key, b_slot = b_row, tl.zeros_like(b_row)
    if p_ranks is not None:
        b_key = tl.load(p_ranks + o_e, mask=m_row, other=0).to(b_row.dtype)  # [BE]
        b_slot = b_key
    b_run = tl.load(p_order + o_e, mask=m_row, other=0)  # [BE]
    tl.store(p_slots + b_run, tl.where(m_shared, -1, b_slot).to(tl.int32), mask=m_row)  # [BE]
    tl.store(p_keys + o_e, tl.where(m_shared, b_key, -1), mask=m_e)  # [BE]


def dense(grad: Tensor, source: Tensor | TokenStream, spec: AddressSpec) -> Tensor:
    """Dense gradient ``[R, w]`` in the dtype of grad; contiguous codes ``[M, L]`` or a token stream."""
    total = zero_table(spec, grad.shape[-1] // spec.heads, grad.dtype, grad.device)
    _sum(grad, source, spec, Destination(total), STORE)
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
    _sum(grad, source, spec, destination, epilogue, squares)


def padded_rows(grad: Tensor, source: Tensor | TokenStream, spec: AddressSpec) -> tuple[Tensor, Tensor]:
    """The touched rows int64 ``[E]``, ascending, and their sums ``[E, w]``, in the accumulator's dtype.

    E is the number of rows the batch would touch if all were distinct. Entries past the last touched row repeat it with
    zeros; a batch without any touched row gives row 0 with zeros.
    """
    return _sum(grad, source, spec, None, STORE)


def update_sparse(
    rows: Tensor, values: Tensor, destination: Destination, epilogue: Epilogue, squares: list[Tensor] | None
) -> None:
    """Update the rows int64 ``[E]`` of a sparse gradient ``[E, w]``; entries of one row are summed first."""
    if rows.numel():
        rows, order = torch.sort(rows, stable=True)
        sum_values(rows, order, values, accumulator(values.dtype), destination, epilogue, squares)


def _sum(
    grad: Tensor,
    source: Tensor | TokenStream,
    spec: AddressSpec,
    destination: Destination | None,
    epilogue: Epilogue,
    squares: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Sum into `destination`; without one, into a list of the touched rows, which is returned."""
    codes, n_tokens = token_codes(source, spec) if isinstance(source, TokenStream) else (source, None)
    run = _sum_suffixes_of if spec.mode == "suffix" else _sum_prefixes_of
    return run(grad, codes, n_tokens, spec, destination, epilogue, squares)


def _sum_prefixes_of(grad, codes, n_tokens, spec, destination, epilogue, squares):
    ranked = destination is None
    plan = sort_plan_of(spec, ranked)
    W, dtype = grad.shape[-1] // spec.heads, accumulator(grad.dtype)
    if not most_sids(codes, n_tokens, spec) or not plan.orders:
        return _empty(grad, W) if ranked else None
    prefixes = sort_prefixes(codes, n_tokens, spec, plan, _row_dtype(spec))
    slots = shared = touched = None
    if plan.n_checked:
        rows, runs = torch.sort(prefixes.rows, stable=True)
        entries = rows.numel()
        ranks = None
        if ranked:
            ranks, *touched = _rank(rows, W, dtype)
            destination = Destination(touched[1])
        slots = torch.empty((entries,), dtype=torch.int32, device=grad.device)
        keys = torch.empty_like(rows)
        mark_shared_kernel[(blocks(entries, 512),)](rows, runs, ranks, slots, keys, entries, 512, **LAUNCH)
        shared = torch.empty((entries, W), dtype=dtype, device=grad.device)
    sum_prefixes(grad, codes, n_tokens, prefixes, slots, shared, destination, epilogue, spec, plan, squares)
    if plan.n_checked:
        sum_values(keys, runs, shared, dtype, destination, epilogue, squares)
    return touched


def _sum_suffixes_of(grad, codes, n_tokens, spec, destination, epilogue, squares):
    W, dtype = grad.shape[-1] // spec.heads, accumulator(grad.dtype)
    rows = pair_rows(codes, terms_of(spec).pairs, _row_dtype(spec), spec)
    if not rows.numel():
        return _empty(grad, W) if destination is None else None
    keys, order = torch.sort(rows.flatten(), stable=True)
    touched = None
    if destination is None:
        ranks, *touched = _rank(keys, W, dtype)
        keys, destination = torch.where(keys >= 0, ranks, -1), Destination(touched[1])
    sum_terms(keys, order, grad, n_tokens, dtype, destination, epilogue, spec, squares)
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


def _row_dtype(spec: AddressSpec) -> torch.dtype:
    return torch.int32 if spec.total_rows < 1 << 31 else torch.int64
