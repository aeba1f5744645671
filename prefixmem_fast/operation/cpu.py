"""PrefixMem for training on a CPU: the reference's results by a path whose temporary tensors stay in the cache.

forward    a running sum over levels, a few SIDs at a time
backward   one stable sort of the codes orders all prefixes; prefixes nest, so the sums of order n come from the
           sums of order n + 1; rows that several prefixes share by a hash collision are merged last
destination  chunks of unique rows with their sums, which become a dense gradient, a sparse one, or an update
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..addressing.spec import AddressSpec
from . import reference

# Bytes of one temporary tensor: it stays in a level-2 cache, while larger ones wait for new pages.
_CHUNK_BYTES = 1 << 20


def chunks(total: int, bytes_each: int) -> Iterator[slice]:
    size = max(_CHUNK_BYTES // max(bytes_each, 1), 1)
    return (slice(low, min(low + size, total)) for low in range(0, total, size))


def gather(table: Tensor, rows: Tensor) -> Tensor:
    """table[rows] ``[E, w]``: bags of one row, because embedding_bag prefetches and index_select does not."""
    return F.embedding_bag(rows[:, None], table, mode="sum")


class Sids(NamedTuple):
    """The Semantic IDs of a batch, wherever they stand."""

    codes: Tensor  # int64 [M, L]; -1 from the end of the prefix on
    length: Tensor  # int64 [M], codes before the prefix ends
    grad: Tensor | None = None  # [M, A, H * w], gradient of S


def _cut(codes: Tensor, spec: AddressSpec) -> Sids:
    length = reference.prefix_length(codes, spec)
    return Sids(torch.where(torch.arange(spec.levels) < length[:, None], codes.long(), -1), length)


class TokenSids(NamedTuple):
    """The Semantic IDs of a token stream ``[B, T]``."""

    codes: Tensor  # int64 [M, L]; -1 past the last active level that has a token
    first: Tensor  # int64 [M], place of the level-1 token in the flattened stream
    tokens: Tensor  # int64 [M], how many tokens follow one another


def _find_sids(input_ids: Tensor, table: Tensor, spec: AddressSpec, segment_ids: Tensor | None) -> TokenSids:
    codes, level = reference.token_codes(input_ids, table, spec, segment_ids)
    flat = level.flatten()
    first = (flat == 1).nonzero().squeeze(1)
    last_place = len(flat) - 1
    tokens = torch.ones_like(first)
    for l in range(2, spec.levels + 1):
        tokens += flat[(first + (l - 1)).clamp(max=last_place)] == l  # in this row: a later row begins with level 1
    codes = codes.flatten(0, 1)[first + tokens - 1]
    read = torch.zeros_like(tokens)
    for active in spec.active_levels:
        read = torch.where(tokens >= active, active, read)
    codes = torch.where(torch.arange(spec.levels) < read[:, None], codes, -1)
    return TokenSids(codes, first, tokens)


def _level_sums(sids: Sids, weight: Tensor, spec: AddressSpec) -> Iterator[tuple[int, Tensor]]:
    """(index of the active level, S ``[M, H, w]`` in the accumulator's dtype), by ascending level."""
    total = torch.zeros((len(sids.codes), spec.heads, weight.shape[1]), dtype=reference.accumulator(weight.dtype))
    summed = 0
    for a, level in enumerate(spec.active_levels):
        if spec.mode != "prefix":
            total = torch.zeros_like(total)
            summed = 0
        for order in spec.orders_at(level):
            if order > summed:
                rows, alive = _order_rows(sids, level, order, spec)
                read = gather(weight, rows.flatten()).view(total.shape)
                if not alive.all():
                    read = torch.where(alive[:, None, None], read, 0)
                total += read
        summed = max(spec.orders_at(level), default=0) if spec.mode == "prefix" else 0
        yield a, total


def _order_rows(sids: Sids, level: int, order: int, spec: AddressSpec) -> tuple[Tensor, Tensor]:
    """Rows ``[M, H]`` and where they exist ``[M]``; where they do not, the row is any."""
    first, last = spec.window(level, order)
    window = sids.codes[:, first - 1 : last].clamp(min=0)
    return reference.order_rows(window, order, spec), sids.length >= last


def prefix_memory(codes: Tensor, weight: Tensor, spec: AddressSpec) -> Tensor:
    """S of codes ``[M, L]``: ``[M, A, H * w]``; see `reference.prefix_memory`."""
    width = spec.heads * weight.shape[1]
    out = torch.empty((len(codes), len(spec.active_levels), width), dtype=weight.dtype)
    sids = _cut(codes, spec)
    for part in chunks(len(codes), width * 4):
        for a, total in _level_sums(Sids(sids.codes[part], sids.length[part]), weight, spec):
            out[part, a] = total.flatten(1)
    return out


def token_memory(
    input_ids: Tensor, token_table: Tensor, weight: Tensor, spec: AddressSpec, segment_ids: Tensor | None = None
) -> Tensor:
    """S over a token stream ``[B, T]``: ``[B, T, H * w]``; see `reference.token_memory`."""
    width = spec.heads * weight.shape[1]
    out = torch.zeros((input_ids.numel(), width), dtype=weight.dtype)
    found = _find_sids(input_ids, token_table, spec, segment_ids)
    sids = _cut(found.codes, spec)
    for part in chunks(len(sids.codes), width * 4):
        first, tokens = found.first[part], found.tokens[part]
        for a, total in _level_sums(Sids(sids.codes[part], sids.length[part]), weight, spec):
            level = spec.active_levels[a]
            here = tokens >= level
            out[first[here] + (level - 1)] = total.flatten(1)[here].to(out.dtype)
    return out.view(*input_ids.shape, width)


class Group(NamedTuple):
    """The touched rows of one order, int64 ``[U]``, ascending and each once, and their sums ``[.., w]`` in chunks."""

    rows: Tensor
    sums: Iterator[Tensor]


def row_gradient(grad: Tensor, codes: Tensor, spec: AddressSpec) -> Iterator[Group]:
    """Gradient of `prefix_memory` with respect to the rows that it read, an order at a time.

    Args:
        grad: ``[M, A, H * w]``, gradient of S.
        codes: integer ``[M, L]``.

    Yields:
        a group for each order, the last order first; sums are float32 (float64 for a float64 gradient) and are to be
        taken before the next group.
    """
    return _row_sums(_cut(codes, spec)._replace(grad=grad), spec)


def token_row_gradient(
    grad: Tensor, input_ids: Tensor, token_table: Tensor, spec: AddressSpec, segment_ids: Tensor | None = None
) -> Iterator[Group]:
    """`row_gradient` of `token_memory`: from ``[B, T, H * w]``."""
    found = _find_sids(input_ids, token_table, spec, segment_ids)
    grad = grad.reshape(-1, grad.shape[-1])
    levels = found.first.new_tensor(spec.active_levels)
    here = found.tokens[:, None] >= levels  # [M, A]
    places = (found.first[:, None] + (levels - 1)).clamp(max=max(len(grad) - 1, 0))
    by_level = torch.where(here[..., None], grad[places], 0)
    return _row_sums(_cut(found.codes, spec)._replace(grad=by_level), spec)


def in_chunks(groups: Iterator[Group]) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows ``[U]`` and sums ``[U, w]``, a chunk at a time."""
    for rows, sums in groups:
        start = 0
        for part in sums:
            yield rows[start : start + len(part)], part
            start += len(part)


def as_list(groups: Iterator[Group], most: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All rows ``[U]``, ascending, and their sums ``[U, w]``, held once.

    Args:
        most: a bound on U; memory past U is reserved and never touched.
    """
    values = torch.empty((most, width), dtype=dtype)
    rows: list[Tensor] = []
    end = most  # filled from the back, as the last order comes first
    for group in groups:
        start = end - len(group.rows)
        place = start
        for part in group.sums:
            values[place : place + len(part)] = part
            place += len(part)
        rows.insert(0, group.rows)
        end = start
    return torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64), values[end:]


def prefix_memory_backward(grad: Tensor, codes: Tensor, spec: AddressSpec) -> Tensor:
    """Dense gradient ``[R, w]`` of the dtype of `grad`."""
    return _dense(row_gradient(grad, codes, spec), grad, spec)


def token_memory_backward(
    grad: Tensor, input_ids: Tensor, token_table: Tensor, spec: AddressSpec, segment_ids: Tensor | None = None
) -> Tensor:
    """Dense gradient ``[R, w]`` of the dtype of `grad`."""
    return _dense(token_row_gradient(grad, input_ids, token_table, spec, segment_ids), grad, spec)


def _dense(groups: Iterator[Group], grad: Tensor, spec: AddressSpec) -> Tensor:
    total = torch.zeros((spec.total_rows, grad.shape[-1] // spec.heads), dtype=grad.dtype)
    for rows, values in in_chunks(groups):
        total.index_copy_(0, rows, values.to(grad.dtype))
    return total


class Source(NamedTuple):
    """What adds to the rows of one order: value ``vectors[index[e]]`` to row ``rows[e]``."""

    rows: Tensor  # int64 [E]
    index: Tensor  # int64 [E]
    vectors: Tensor  # [V, w]


def _row_sums(sids: Sids, spec: AddressSpec) -> Iterator[Group]:
    if not len(sids.codes):
        return
    grad = sids.grad.to(reference.accumulator(sids.grad.dtype)).contiguous()
    sids = sids._replace(grad=grad)
    sources = _window_sources(sids, spec) if spec.mode == "suffix" else _prefix_sources(sids, spec)
    yield from map(_merged, sources)  # map lets go of a source before the next is made


def merge(rows: Tensor, values: Tensor) -> Group:
    """Sums of values ``[E, w]`` by rows ``[E]``."""
    return _merged(Source(rows, torch.arange(len(rows)), values.to(reference.accumulator(values.dtype))))


def _merged(source: Source) -> Group:
    if not len(source.rows):
        return Group(source.rows, iter(()))
    rows, order = torch.sort(source.rows, stable=True)
    new = torch.ones_like(rows, dtype=torch.bool)
    torch.ne(rows[1:], rows[:-1], out=new[1:])
    starts = new.nonzero().squeeze(1)
    ends = torch.cat([starts[1:], starts.new_tensor([len(rows)])])
    index = source.index[order]

    def sums() -> Iterator[Tensor]:
        for part in chunks(len(starts), source.vectors.shape[1] * source.vectors.element_size()):
            low, high = starts[part][0].item(), ends[part][-1].item()
            yield _segment_sums(source.vectors, index[low:high], starts[part] - low)

    return Group(rows[starts], sums())


def _segment_sums(vectors: Tensor, index: Tensor, starts: Tensor) -> Tensor:
    """Sums of vectors[index] ``[E, d]`` over the segments that begin at `starts`, each in order; one fused loop."""
    return F.embedding_bag(index, vectors, starts, mode="sum")


def _window_sources(sids: Sids, spec: AddressSpec) -> Iterator[Source]:
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
            yield Source(torch.cat(rows), torch.cat(index), vectors)


def _prefix_sources(sids: Sids, spec: AddressSpec) -> Iterator[Source]:
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
        found = Sids(codes[starts], length[starts])
        rows, alive = _order_rows(found, order, order, spec)
        kept = (alive.nonzero() * spec.heads + torch.arange(spec.heads)).flatten()
        yield Source(rows[alive].flatten(), kept, sums.view(len(sums) * spec.heads, -1))


def _argsort_prefixes(codes: Tensor, spec: AddressSpec) -> Tensor:
    """Order that sorts codes ``[M, n]`` lexicographically, stable; packed into as few 63-bit keys as hold them."""
    keys: list[Tensor] = []
    left = 0
    for position in reversed(range(codes.shape[1])):  # the last code is the least significant
        bits = spec.codebook_sizes[position].bit_length()
        if bits > left:
            keys.append(torch.zeros_like(codes[:, 0]))
            left = 63
        keys[-1] += (codes[:, position] + 1) << (63 - left)
        left -= bits
    order = torch.argsort(keys[0], stable=True)
    for key in keys[1:]:
        order = order[torch.argsort(key[order], stable=True)]
    return order
