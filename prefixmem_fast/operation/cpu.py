"""PrefixMem for training on a CPU: the reference's results by a path whose temporary tensors stay in the cache.

forward    a running sum over levels, a few SIDs at a time
gradient   one stable sort of the codes orders all prefixes; prefixes nest, so the sums of order n come from the
           sums of order n + 1; rows that several prefixes share by a hash collision are merged last
then       chunks of unique rows with their sums become a dense gradient, a sparse one, or an update
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dtypes import accumulator
from ..addressing import AddressSpec, TokenStream, prefix_rows, window_codes
from ..addressing.addresses import cut_prefix, order_rows
from .interface import QuantizedTable, RowSums
from .quantization import dequantized
from .rules import RowUpdate

__all__ = [
    "dense_gradient",
    "forward",
    "fused_update",
    "prefix_rows",
    "quantized_forward",
    "read_windows",
    "row_sums",
    "sparse_update",
]

# Bytes of one temporary tensor: it stays in a level-2 cache, while larger ones wait for new pages.
_CHUNK_BYTES = 1 << 20


def _chunks(total: int, bytes_each: int) -> Iterator[slice]:
    size = max(_CHUNK_BYTES // max(bytes_each, 1), 1)
    return (slice(low, min(low + size, total)) for low in range(0, total, size))


def _gather(table: Tensor | QuantizedTable, rows: Tensor) -> Tensor:
    """table[rows] ``[E, w]``: bags of one row, because embedding_bag prefetches and index_select does not."""
    if isinstance(table, QuantizedTable):  # which embedding_bag does not take
        return dequantized(table, rows)
    return F.embedding_bag(rows[:, None], table, mode="sum")


# Forward


def forward(source: Tensor | TokenStream, weight: Tensor, spec: AddressSpec) -> Tensor:
    """S; see `reference.forward`."""
    return _forward(source, weight, weight.shape[1], spec, weight.dtype)


def quantized_forward(
    source: Tensor | TokenStream, table: QuantizedTable, spec: AddressSpec, dtype: torch.dtype
) -> Tensor:
    """S of a quantized table; see `reference.quantized_forward`."""
    return _forward(source, table, table.values.shape[1], spec, dtype)


def _forward(
    source: Tensor | TokenStream,
    table: Tensor | QuantizedTable,
    row_width: int,
    spec: AddressSpec,
    dtype: torch.dtype,
) -> Tensor:
    width = spec.heads * row_width
    if isinstance(source, TokenStream):
        out = torch.zeros((source.input_ids.numel(), width), dtype=dtype)
        token_sids = _find_sids(source, spec)
        sids = _Sids(*cut_prefix(token_sids.codes, spec))
    else:
        out = torch.empty((len(source), len(spec.active_levels), width), dtype=dtype)
        sids = _Sids(*cut_prefix(source, spec))
    for part in _chunks(len(sids.codes), width * 4):
        zeros = torch.zeros((len(sids.codes[part]), spec.heads, row_width), dtype=accumulator(dtype))
        for a, total in _level_sums(_Sids(sids.codes[part], sids.length[part]), table, zeros, spec):
            if isinstance(source, TokenStream):
                level = spec.active_levels[a]
                here = token_sids.tokens[part] >= level
                out[token_sids.first[part][here] + (level - 1)] = total.flatten(1)[here].to(out.dtype)
            else:
                out[part, a] = total.flatten(1)
    return out.view(*source.input_ids.shape, width) if isinstance(source, TokenStream) else out


class _Sids(NamedTuple):
    """The Semantic IDs of a batch, wherever they stand."""

    codes: Tensor  # int64 [M, L]; -1 from the end of the prefix on
    length: Tensor  # int64 [M], codes before the prefix ends
    grad: Tensor | None = None  # [M, A, H * w], gradient of S


class _TokenSids(NamedTuple):
    """The Semantic IDs of a token stream ``[B, T]``."""

    codes: Tensor  # int64 [M, L]; -1 past the last active level that has a token
    first: Tensor  # int64 [M]: the token of level l is at place first + l - 1 of the flattened stream
    tokens: Tensor  # int64 [M], the last level of which there is a token


def _find_sids(stream: TokenStream, spec: AddressSpec) -> _TokenSids:
    codes, level = window_codes(stream, spec)
    flat = level.flatten()
    begin = spec.item_levels if spec.history else 1  # the first level of which a window has a token
    first = (flat == begin).nonzero().squeeze(1) - (begin - 1)
    last_place = len(flat) - 1
    tokens = torch.full_like(first, begin)
    for l in range(begin + 1, spec.levels + 1):
        tokens += flat[(first + (l - 1)).clamp(max=last_place)] == l  # in this row: none goes on in a later row
    codes = codes.flatten(0, 1)[first + tokens - 1]
    read = torch.zeros_like(tokens)
    for active in spec.active_levels:
        read = torch.where(tokens >= active, active, read)
    codes = torch.where(torch.arange(spec.levels) < read[:, None], codes, -1)
    return _TokenSids(codes, first, tokens)


def _level_sums(
    sids: _Sids, table: Tensor | QuantizedTable, zeros: Tensor, spec: AddressSpec
) -> Iterator[tuple[int, Tensor]]:
    """(index of the active level, S ``[M, H, w]`` in the accumulator's dtype), by ascending level; from `zeros`."""
    total = zeros
    summed = 0
    for a, level in enumerate(spec.active_levels):
        if spec.mode != "prefix":
            total = torch.zeros_like(total)
            summed = 0
        for order in spec.orders_at(level):
            if order > summed:
                rows, alive = _order_rows(sids, level, order, spec)
                read = _gather(table, rows.flatten()).view(total.shape)
                if not alive.all():
                    read = torch.where(alive[:, None, None], read, 0)
                total += read
        summed = max(spec.orders_at(level), default=0) if spec.mode == "prefix" else 0
        yield a, total


def _order_rows(sids: _Sids, level: int, order: int, spec: AddressSpec) -> tuple[Tensor, Tensor]:
    """Rows ``[M, H]`` and where they exist ``[M]``; where they do not, the row is any."""
    first, last = spec.window(level, order)
    window = sids.codes[:, first - 1 : last].clamp(min=0)
    return order_rows(window, order, spec), sids.length >= last


# Gradient


def dense_gradient(
    grad: Tensor, source: Tensor | TokenStream, spec: AddressSpec, deterministic: bool = False
) -> Tensor:
    """``[R, w]`` of the dtype of `grad`, the same bits run after run."""
    total = torch.zeros((spec.total_rows, grad.shape[-1] // spec.heads), dtype=grad.dtype)
    for rows, sums in _in_chunks(_groups(grad, source, spec)):
        total.index_copy_(0, rows, sums.to(grad.dtype))
    return total


def row_sums(grad: Tensor, source: Tensor | TokenStream, spec: AddressSpec, dtype: torch.dtype) -> RowSums:
    """The touched rows and their sums in `dtype`, held once."""
    width = grad.shape[-1] // spec.heads
    most = grad.numel() // width * spec.max_order  # a bound on the rows; memory past them is never touched
    sums = torch.empty((most, width), dtype=dtype)
    rows: list[Tensor] = []
    end = most  # filled from the back, as the last order comes first
    for group in _groups(grad, source, spec):
        start = end - len(group.rows)
        place = start
        for part in group.sums:
            sums[place : place + len(part)] = part
            place += len(part)
        rows.insert(0, group.rows)
        end = start
    return RowSums(torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64), sums[end:], True)


def fused_update(grad: Tensor, source: Tensor | TokenStream, spec: AddressSpec, update: RowUpdate) -> None:
    """Update the touched rows of the update's table, each once, a chunk at a time."""
    for rows, sums in _in_chunks(_groups(grad, source, spec)):
        update.apply(rows, sums, _gather)


def sparse_update(grad: Tensor, update: RowUpdate) -> None:
    """Update the rows of a sparse gradient ``[R, w]``; entries of one row are summed first, in float32."""
    rows, values = grad._indices()[0], grad._values()
    if grad.is_coalesced() or bool((rows[1:] > rows[:-1]).all()):
        for part in _chunks(len(rows), values.shape[1] * values.element_size()):
            update.apply(rows[part], values[part], _gather)
        return
    values = values.to(accumulator(values.dtype))
    merged = _merged(_Source(rows, torch.arange(len(rows)), values))
    for touched, sums in _in_chunks(iter([merged])):
        update.apply(touched, sums, _gather)


class _Group(NamedTuple):
    """The touched rows of one order, int64 ``[U]``, ascending and each once, and their sums ``[.., w]`` in chunks."""

    rows: Tensor
    sums: Iterator[Tensor]


def _groups(grad: Tensor, source: Tensor | TokenStream, spec: AddressSpec) -> Iterator[_Group]:
    """A group for each order, the last order first; its sums, in the accumulator's dtype, are to be taken before the
    next group."""
    if isinstance(source, TokenStream):
        token_sids = _find_sids(source, spec)
        grad = grad.reshape(-1, grad.shape[-1])
        levels = token_sids.first.new_tensor(spec.active_levels)
        here = token_sids.tokens[:, None] >= levels  # [M, A]
        places = (token_sids.first[:, None] + (levels - 1)).clamp(max=max(len(grad) - 1, 0))
        grad, source = torch.where(here[..., None], grad[places], 0), token_sids.codes
    return _order_sums(_Sids(*cut_prefix(source, spec), grad), spec)


def _in_chunks(groups: Iterator[_Group]) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows ``[U]`` and sums ``[U, w]``, a chunk at a time."""
    for rows, sums in groups:
        start = 0
        for part in sums:
            yield rows[start : start + len(part)], part
            start += len(part)


class _Source(NamedTuple):
    """What adds to the rows of one order: value ``vectors[index[e]]`` to row ``rows[e]``."""

    rows: Tensor  # int64 [E]
    index: Tensor  # int64 [E]
    vectors: Tensor  # [V, w]


def _order_sums(sids: _Sids, spec: AddressSpec) -> Iterator[_Group]:
    if not len(sids.codes):
        return
    grad = sids.grad.to(accumulator(sids.grad.dtype)).contiguous()
    sids = sids._replace(grad=grad)
    sources = _window_sources(sids, spec) if spec.mode == "suffix" else _prefix_sources(sids, spec)
    yield from map(_merged, sources)  # map lets go of a source before the next is made


def _merged(source: _Source) -> _Group:
    if not len(source.rows):
        return _Group(source.rows, iter(()))
    rows, order = torch.sort(source.rows, stable=True)
    new = torch.ones_like(rows, dtype=torch.bool)
    torch.ne(rows[1:], rows[:-1], out=new[1:])
    starts = new.nonzero().squeeze(1)
    ends = torch.cat([starts[1:], starts.new_tensor([len(rows)])])
    index = source.index[order]

    def sums() -> Iterator[Tensor]:
        for part in _chunks(len(starts), source.vectors.shape[1] * source.vectors.element_size()):
            low, high = starts[part][0].item(), ends[part][-1].item()
            yield _segment_sums(source.vectors, index[low:high], starts[part] - low)

    return _Group(rows[starts], sums())


def _segment_sums(vectors: Tensor, index: Tensor, starts: Tensor) -> Tensor:
    """Sums of vectors[index] ``[E, d]`` over the segments that begin at `starts`, each in order; one fused loop."""
    return F.embedding_bag(index, vectors, starts, mode="sum")


def _window_sources(sids: _Sids, spec: AddressSpec) -> Iterator[_Source]:
    """Suffix mode, by descending order: every active level feeds rows of its own."""
    M, A = sids.grad.shape[:2]
    vectors = sids.grad.view(M * A * spec.heads, -1)
    heads = torch.arange(spec.heads)
    for order in range(spec.max_order, 0, -1):
        rows, index = [], []
        for a, level in enumerate(spec.active_levels):
            if order in spec.orders_at(level):
                row, alive = _order_rows(sids, level, order, spec)
                sid = alive.nonzero()
                rows.append(row[alive].flatten())
                index.append(((sid * A + a) * spec.heads + heads).flatten())
        if rows:
            yield _Source(torch.cat(rows), torch.cat(index), vectors)


def _prefix_sources(sids: _Sids, spec: AddressSpec) -> Iterator[_Source]:
    """Prefix and full mode, by descending order: the sums of all SIDs of one prefix, for each distinct prefix.

    Sorted by their codes, the SIDs of every prefix of every order stand side by side. Order n reads the gradient of
    level n and, in prefix mode, of all levels above: its sums are those of order n + 1 and level n's.
    """
    M, A = sids.grad.shape[:2]
    vectors = sids.grad.view(M * A, -1)
    last = min(spec.active_levels[-1], spec.max_order)
    by_code = _argsort_prefixes(sids.codes[:, :last], spec)
    codes, length = sids.codes[by_code, :last], sids.length[by_code]
    differs = torch.ones((M, last), dtype=torch.bool)
    torch.ne(codes[1:], codes[:-1], out=differs[1:])

    def level_sums(levels: list[int], starts: Tensor) -> Tensor:
        slots = torch.tensor([spec.active_levels.index(level) for level in levels])
        return _segment_sums(vectors, (by_code[:, None] * A + slots).flatten(), starts * len(levels))

    sums = inner = None
    for order in range(last, 0, -1):
        levels = [a for a in spec.active_levels if a == order or (a > order == last and spec.mode == "prefix")]
        if spec.mode == "full" and not levels:
            continue
        starts = differs[:, :order].any(1).nonzero().squeeze(1)
        if inner is None or spec.mode == "full":
            sums = level_sums(levels, starts)
        else:
            sums = _segment_sums(sums, torch.arange(len(inner)), torch.searchsorted(inner, starts))
            if levels:
                sums += level_sums(levels, starts)
        inner = starts
        distinct = _Sids(codes[starts], length[starts])
        rows, alive = _order_rows(distinct, order, order, spec)
        kept = (alive.nonzero() * spec.heads + torch.arange(spec.heads)).flatten()
        yield _Source(rows[alive].flatten(), kept, sums.view(len(sums) * spec.heads, -1))


def _argsort_prefixes(codes: Tensor, spec: AddressSpec) -> Tensor:
    """Order that sorts codes ``[M, n]`` lexicographically, stable; packed into as few 63-bit keys as hold them."""
    keys: list[Tensor] = []
    left = 0
    for position in reversed(range(codes.shape[1])):  # the last code is the least significant
        bits = spec.window_sizes[position].bit_length()
        if bits > left:
            keys.append(torch.zeros_like(codes[:, 0]))
            left = 63
        keys[-1] += (codes[:, position] + 1) << (63 - left)
        left -= bits
    order = torch.argsort(keys[0], stable=True)
    for key in keys[1:]:
        order = order[torch.argsort(key[order], stable=True)]
    return order


# Windows


def read_windows(
    windows: Tensor, token_table: Tensor, table: Tensor | QuantizedTable, spec: AddressSpec, out: Tensor
) -> None:
    """S of the last token of each window; see `reference.read_windows`."""
    row_width = out.shape[1] // spec.heads
    out.copy_(_forward(TokenStream(windows, token_table), table, row_width, spec, out.dtype)[:, -1])
