"""What the codes of a catalogue look like: codebooks, prefixes, items that share a SID, and rows that prefixes share.

All of it is counted, over the items or over the interactions of a data set; nothing is estimated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks
from ..addressing import AddressSpec, item_windows
from ..addressing.addresses import order_rows

TOPS = (1, 10, 100)
_STATE_BYTES = 4  # row-wise Adagrad keeps one float32 a row


def prefix_groups(codes: Tensor, sizes: Sequence[int]) -> Iterator[tuple[Tensor, int]]:
    """For each prefix length the number of its prefix at each row, and how many distinct prefixes there are.

    Args:
        codes: int64 ``[rows, L]``, whole prefixes.
        sizes: K_1 .. K_L.

    Yields:
        int64 ``[rows]``, numbers in the order of the codes; and their count.
    """
    group = codes.new_zeros(len(codes))
    for code, size in zip(codes.unbind(1), sizes, strict=True):
        # Numbers stay below rows x K, which fits 63 bits.
        distinct, group = torch.unique(group * size + code, return_inverse=True)
        yield group, len(distinct)


def codebook_use(codes: Tensor, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """How the items use the codes of each level.

    Returns:
        for each level its `size` K, the codes `used`, the `perplexity` (the number of codes that would be used as
        evenly), and `most_used`, the share of items with the most frequent code.
    """
    found = []
    for level, (code, size) in enumerate(zip(codes.unbind(1), sizes, strict=True), 1):
        share = torch.bincount(code).double() / len(code)
        share = share[share > 0]
        perplexity = float((-(share * share.log()).sum()).exp())
        found.append(
            {
                "level": level,
                "size": size,
                "used": len(share),
                "perplexity": perplexity,
                "most_used": float(share.max()),
            }
        )
    return found


def shared_sids(codes: Tensor) -> dict[str, Any]:
    """Items that share a SID: `distinct` SIDs, `items` that share theirs, and the `largest` group and its row.

    Args:
        codes: int64 ``[items, L]``.
    """
    _, group, count = torch.unique(codes, dim=0, return_inverse=True, return_counts=True)
    largest = int(count.max())
    return {
        "distinct": len(count),
        "items": int((count[group] > 1).sum()),
        "largest": largest,
        "largest_row": int((group == count.argmax()).nonzero()[0]),
    }


def first_rows(group: Tensor, count: int) -> Tensor:
    """int64 ``[count]``: a row of each group."""
    rows = group.new_zeros(count)
    rows[group.flip(0)] = torch.arange(len(group)).flip(0)
    return rows


def table_use(codes: Tensor, spec: AddressSpec) -> list[dict[str, Any]]:
    """Where the distinct prefixes of windows live, for each order that has rows.

    Args:
        codes: int64 ``[rows, spec.levels]``: SIDs, or the windows of a spec with history.
        spec: with ``mode`` "prefix" or "full", whose order n reads the first n codes.

    Returns:
        for each order whether it is `exact`, its `table_rows` (of one head), distinct `prefixes`, rows `occupied` and
        prefixes `sharing` a row with another, each by head, and `sharing_all`: those that share the rows of all heads.
    """
    if spec.mode == "suffix":
        raise ValueError("the spec has mode = 'suffix', whose orders read no prefixes; give mode = 'prefix' or 'full'")
    found = []
    for order, (group, count) in enumerate(prefix_groups(codes, spec.window_sizes), 1):
        if order > spec.max_order or not spec.rows_per_order[order - 1]:
            continue
        rows = order_rows(codes[first_rows(group, count), :order], order, spec)
        occupied, sharing, sharing_all = _sharing(rows)
        found.append(
            {
                "order": order,
                "exact": order in spec.exact_orders,
                "table_rows": spec.rows_per_order[order - 1],
                "prefixes": count,
                "occupied": occupied,
                "sharing": sharing,
                "sharing_all": sharing_all,
            }
        )
    return found


def _sharing(rows: Tensor) -> tuple[list[int], list[int], int]:
    """Of rows int64 ``[prefixes, H]`` for each head the distinct ones, and the prefixes whose row another one has too;
    and how many prefixes have all their rows in common with another."""
    occupied, sharing, together = [], [], rows.new_zeros(len(rows))
    for head in rows.unbind(1):
        distinct, place, count = torch.unique(head, return_inverse=True, return_counts=True)
        occupied.append(len(distinct))
        sharing.append(int(count[count > 1].sum()))
        together = torch.unique(together * len(rows) + place, return_inverse=True)[1]
    count = torch.bincount(together)
    return occupied, sharing, int(count[count > 1].sum())


def table_bytes(spec: AddressSpec, memory_dim: int) -> dict[str, int]:
    """Bytes of the tables in float32, and with the state of row-wise Adagrad beside them.

    Raises:
        TypeError, ValueError: memory_dim is no positive multiple of the spec's heads.
    """
    width, rest = divmod(_checks.positive("memory_dim", memory_dim), spec.heads)
    if rest:
        raise ValueError(f"memory_dim = {memory_dim} is not a multiple of heads = {spec.heads}; give one that is")
    return {
        "rows": spec.total_rows,
        "float32": spec.total_rows * width * 4,
        "with_row_adagrad": spec.total_rows * (width * 4 + _STATE_BYTES),
    }


def hot_prefixes(codes: Tensor, sizes: Sequence[int], histories: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """How unevenly interactions fall on prefixes.

    Args:
        codes: int64 ``[items, L]``.
        histories: for each user int64 ``[n]``, rows of `codes`.

    Returns:
        for each length the distinct `prefixes` that interactions have, the share of interactions of the `top` 1, 10 and
        100 most frequent, the `hottest` prefix, and `half`: how many prefixes have half of all interactions.
    """
    met = torch.from_numpy(np.bincount(np.concatenate(histories), minlength=len(codes)))
    total, found = int(met.sum()), []
    for length, (group, count) in enumerate(prefix_groups(codes, sizes), 1):
        by_prefix = met.new_zeros(count).index_add_(0, group, met)
        falling, order = by_prefix.sort(descending=True, stable=True)
        share = falling.cumsum(0).double() / total
        hottest = codes[first_rows(group, count)[order[0]], :length]
        found.append(
            {
                "length": length,
                "prefixes": int((by_prefix > 0).sum()),
                "top": {str(top): float(share[min(top, count) - 1]) for top in TOPS},
                "half": int((share < 0.5).sum()) + 1,
                "hottest": hottest.tolist(),
            }
        )
    return found


def transition_windows(codes: Tensor, spec: AddressSpec, histories: Sequence[np.ndarray], lags: int = 1) -> Tensor:
    """The windows of cross-item orders that histories have: each item with one that stands `spec.history` before it.

    Args:
        codes: int64 ``[items, L]``.
        spec: of `AddressSpec.cross_item`.
        histories: see `hot_prefixes`.
        lags: how many items are read in this way, the one `spec.history` back, the one before it, and so on.

    Returns:
        int64 ``[transitions, 2L]``. The item that is to come after a history counts for none.
    """
    specs = [replace(spec, history=spec.history + lag) for lag in range(lags)]
    return torch.cat([_windows_of(codes, each, histories) for each in specs])


def _windows_of(codes: Tensor, spec: AddressSpec, histories: Sequence[np.ndarray]) -> Tensor:
    rows = torch.from_numpy(np.concatenate(histories))
    place = torch.from_numpy(np.concatenate([np.arange(len(history)) for history in histories]))
    # All users' items in one row of items; a window that begins in another user's history is left out.
    return item_windows(codes[rows], spec)[: len(rows)][place >= spec.history]
