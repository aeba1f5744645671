"""A third implementation, in Python integers and float64 loops, that shares nothing with the others but the primes.

It reads only what `AddressSpec.to_dict()` writes out, so it also shows that the JSON alone determines every row.
`prefixmem verify` and the tests hold the reference and the kernels against it. It takes seconds where the others take
microseconds.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def row(codes: list[int], level: int, order: int, head: int, spec: dict[str, Any]) -> int:
    """Row of one (level, order, head) for one SID of Python integers; -1 where there is none."""
    sizes = spec["codebook_sizes"]
    mode = spec["mode"]
    if order > level or order > spec["max_order"] or (mode == "full" and order != level):
        return -1
    last = order if mode == "prefix" else level
    if any(not 0 <= codes[k] < sizes[k] for k in range(last)):
        return -1
    gram = codes[level - order : level] if mode == "suffix" else codes[:order]
    if order in spec["exact_orders"]:
        place, index = 1, 0
        for k in reversed(range(order)):
            index += gram[k] * place
            place *= sizes[k]
    else:
        index = 0
        for code, primes in zip(gram, spec["multipliers"], strict=False):
            index ^= code * primes[head]
        index %= spec["rows_per_order"][order - 1]
    return spec["offsets"][order - 1][head] + index


def prefix_rows(codes: np.ndarray, spec: dict[str, Any]) -> np.ndarray:
    """Rows of every SID: integer ``[M, L]`` to int64 ``[M, L, N, H]``."""
    levels, orders, heads = len(spec["codebook_sizes"]), spec["max_order"], spec["heads"]
    rows = np.empty((len(codes), levels, orders, heads), np.int64)
    for m, sid in enumerate(codes.tolist()):
        for level in range(levels):
            for order in range(orders):
                for head in range(heads):
                    rows[m, level, order, head] = row(sid, level + 1, order + 1, head, spec)
    return rows


def prefix_memory(codes: np.ndarray, weight: np.ndarray, spec: dict[str, Any]) -> np.ndarray:
    """S of every SID: ``[M, L]`` and ``[R, w]`` to float64 ``[M, A, H * w]``."""
    rows = prefix_rows(codes, spec)
    out = np.zeros((len(codes), len(spec["active_levels"]), spec["heads"], weight.shape[1]))
    for m, a, n, h in _places(out.shape[0], spec):
        r = rows[m, spec["active_levels"][a] - 1, n, h]
        if r >= 0:
            out[m, a, h] += weight[r].astype(np.float64)
    return out.reshape(*out.shape[:2], out.shape[2] * out.shape[3])


def prefix_memory_backward(grad: np.ndarray, codes: np.ndarray, spec: dict[str, Any]) -> np.ndarray:
    """Gradient of the table: ``[M, A, H * w]`` to float64 ``[R, w]``."""
    rows = prefix_rows(codes, spec)
    grad = grad.reshape(*grad.shape[:2], spec["heads"], grad.shape[2] // spec["heads"]).astype(np.float64)
    out = np.zeros((spec["total_rows"], grad.shape[-1]))
    for m, a, n, h in _places(grad.shape[0], spec):
        r = rows[m, spec["active_levels"][a] - 1, n, h]
        if r >= 0:
            out[r] += grad[m, a, h]
    return out


def _places(sids: int, spec: dict[str, Any]):
    return np.ndindex(sids, len(spec["active_levels"]), spec["max_order"], spec["heads"])


def token_levels(input_ids: list[int], table: list[list[int]], levels: int, segments: list[int] | None) -> list[int]:
    """Level of each token of one row within its SID, 0 for text; every token looks back on its own."""
    own = [table[i][0] if 0 <= i < len(table) else 0 for i in input_ids]
    result = []
    for t, level in enumerate(own):
        start = t - level + 1
        whole = 1 <= level <= levels and start >= 0 and own[start : t + 1] == list(range(1, level + 1))
        whole = whole and (segments is None or len(set(segments[start : t + 1])) == 1)
        result.append(level if whole else 0)
    return result


def token_memory(
    input_ids: np.ndarray,
    table: np.ndarray,
    weight: np.ndarray,
    spec: dict[str, Any],
    segments: np.ndarray | None = None,
) -> np.ndarray:
    """S over a token stream: ``[B, T]`` to float64 ``[B, T, H * w]``."""
    levels = len(spec["codebook_sizes"])
    out = np.zeros((*input_ids.shape, spec["heads"] * weight.shape[1]))
    entries = table.tolist()
    for b, ids in enumerate(input_ids.tolist()):
        result = token_levels(ids, entries, levels, None if segments is None else segments[b].tolist())
        for t, level in enumerate(result):
            if level in spec["active_levels"]:
                codes = [entries[i][1] for i in ids[t - level + 1 : t + 1]] + [-1] * (levels - level)
                memory = prefix_memory(np.array([codes]), weight, spec)[0]
                out[b, t] = memory[spec["active_levels"].index(level)]
    return out
