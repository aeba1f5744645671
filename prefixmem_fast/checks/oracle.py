"""A third implementation, in Python integers and float64, that shares nothing with the others but the primes.

It reads only what `AddressSpec.to_dict()` writes out, so it also shows that the JSON alone determines every row.
`prefixmem verify` and the tests hold the reference and the kernels against it. It takes seconds where the others take
microseconds.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np


def window_sizes(spec: dict[str, Any]) -> list[int]:
    """Codebook sizes of what is read: an item, or with `history` one met before and then this one."""
    return spec["codebook_sizes"] * (2 if spec.get("history") else 1)


def row(codes: list[int], level: int, order: int, head: int, spec: dict[str, Any]) -> int:
    """Row of one (level, order, head) for one SID of Python integers; -1 where there is none."""
    sizes = window_sizes(spec)
    mode = spec["mode"]
    if order > level or order > spec["max_order"] or (mode == "full" and order != level):
        return -1
    if spec.get("history") and level < len(spec["codebook_sizes"]):
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
    levels, orders, heads = len(window_sizes(spec)), spec["max_order"], spec["heads"]
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


def token_windows(
    input_ids: list[int], entries: list[list[int]], spec: dict[str, Any], segments: list[int] | None
) -> list[tuple[int, list[int]]]:
    """Level of each token of one row in what is read, 0 for none, and the codes up to it, then -1."""
    L, history = len(spec["codebook_sizes"]), spec.get("history", 0)
    own = [entries[i] if 0 <= i < len(entries) else [0, -1] for i in input_ids]
    result = []
    for t, (level, _) in enumerate(own):
        new = 0 if history and level == L else level  # codes of this item; the last token begins the next one
        tokens = history * L + new
        start = t - tokens + 1
        whole = 1 <= level <= L and start >= 0
        whole = whole and [entry[0] for entry in own[start : t + 1]] == [1 + i % L for i in range(tokens)]
        whole = whole and (segments is None or len(set(segments[start : t + 1])) == 1)
        earlier = own[start : start + L] if history else []
        codes = [code for _, code in [*earlier, *own[t - new + 1 : t + 1]]] if whole else []
        result.append((len(codes), codes + [-1] * (len(window_sizes(spec)) - len(codes))))
    return result


def token_memory(
    input_ids: np.ndarray,
    table: np.ndarray,
    weight: np.ndarray,
    spec: dict[str, Any],
    segments: np.ndarray | None = None,
) -> np.ndarray:
    """S over a token stream: ``[B, T]`` to float64 ``[B, T, H * w]``."""
    out = np.zeros((*input_ids.shape, spec["heads"] * weight.shape[1]))
    entries = table.tolist()
    for b, ids in enumerate(input_ids.tolist()):
        windows = token_windows(ids, entries, spec, None if segments is None else segments[b].tolist())
        for t, (level, codes) in enumerate(windows):
            if level in spec["active_levels"]:
                memory = prefix_memory(np.array([codes]), weight, spec)[0]
                out[b, t] = memory[spec["active_levels"].index(level)]
    return out


def updated_row(
    rule: str, w: np.ndarray, g: np.ndarray, state: dict[str, Any], step: int, numbers: dict[str, Any]
) -> tuple[np.ndarray, dict[str, Any], np.ndarray]:
    """One row of a table after one step of its optimizer, in float64.

    Args:
        rule: a name of `operation.rules.RULES`.
        w, g: the row and the sum of its gradients, ``[w]``.
        state: of the row before; without "exp_avg" where none is kept.
        step: counts this step already.
        numbers: lr, weight_decay, and as the rule needs them eps and betas.

    Returns:
        the row, its state, and what the errors of rounding are in proportion to, ``[w]``.
    """
    lr = numbers["lr"]
    size = np.abs(w)
    w = w - lr * numbers["weight_decay"] * w
    if rule == "sgd":
        return w - lr * g, {}, size + np.abs(lr * g)
    if rule == "row_adagrad":
        total = state["sum"] + sum(x * x for x in g.tolist()) / len(g)
        move = lr * g / (np.sqrt(total) + numbers["eps"])
        return w - move, {"sum": total}, size + np.abs(move)
    beta1, beta2 = numbers["betas"]
    new = {}
    mean, largest = g, np.abs(g)
    if "exp_avg" in state:
        new["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
        mean = new["exp_avg"] / (1 - beta1**step)
        largest = (beta1 * np.abs(state["exp_avg"]) + (1 - beta1) * np.abs(g)) / (1 - beta1**step)
    squares = g * g if rule == "lazy_adam" else sum(x * x for x in g.tolist()) / len(g)
    new["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * squares
    divisor = np.sqrt(new["exp_avg_sq"] / (1 - beta2**step)) + numbers["eps"]
    return w - lr * mean / divisor, new, size + lr * largest / divisor


def random_bits(seed: int, step: int, row: int, width: int) -> list[int]:
    """What stochastic rounding adds to the columns of a row: 16 bits each."""
    word = 0xFFFFFFFF

    def mix(x: int) -> int:
        for shift, factor in ((16, 0x21F0AAAD), (15, 0xD35A2D97)):
            x = ((x ^ x >> shift) * factor) & word
        return x ^ x >> 15

    key = 0
    for part in (seed & word, seed >> 32, step & word, (row & word) + (row >> 32) * 0x9E3779B9 & word):
        key = mix(key ^ part)
    bits = []
    for pair in range(1, (width + 1) // 2 + 1):
        product = key * (pair * 0x9E3779B9 & word | 1) & word
        product ^= product >> 15
        bits += [(product * factor & word) >> 16 for factor in (0x21F0AAAD, 0xD35A2D97)]
    return bits[:width]


def stochastic_bfloat16(value: float, bits: int) -> float:
    """The bfloat16 below or above a float32, by 16 random bits."""
    (pattern,) = struct.unpack("<I", struct.pack("<f", value))
    return struct.unpack("<f", struct.pack("<I", (pattern + bits) >> 16 << 16))[0]
