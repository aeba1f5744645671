"""Embeddings of items to Semantic IDs: residual quantisation by faiss, and what becomes of items that share a SID.

Level l replaces what the levels before have left of an embedding by the nearest of K centroids, which k-means has found
over all items; the number of the centroid is the code c_l. Every level takes the nearest centroid (a beam of 1), so the
codes of a prefix do not depend on the levels after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks
from .._choices import COLLISIONS
from .._inputs import clipped, input_file, shown
from .arrays import read_npy, read_pt

_MOST_CODES = 1 << 16
_MOST_LEVELS = 64
_AT_ONCE = 1 << 16  # items whose codes are looked up in one call


@dataclass
class Quantised:
    """Semantic IDs, and how well they stand for the embeddings.

    Attributes:
        codes: int64 ``[items, L]``, or ``[items, L + 1]`` with ``collisions="extra-level"``.
        codebook_sizes: K at each quantised level; at an extra level the size of the largest group.
        centroids: float32 ``[L, K, d]``.
        errors: for each quantised level the squared distance that is left between embeddings and the sums of their
            centroids, as a share of that from their mean; 1 is no better than the mean, 0 is exact.
        shared_before, shared_after: items that share their SID with another one, before and after `collisions`.
        moved: items whose last code was changed.
    """

    codes: Tensor
    codebook_sizes: tuple[int, ...]
    centroids: Tensor
    errors: tuple[float, ...]
    shared_before: int
    shared_after: int
    moved: int


def check_faiss() -> None:
    """Raises ValueError where faiss is not installed."""
    try:
        import faiss  # noqa: F401
    except ImportError:
        raise ValueError("quantising needs faiss: pip install 'prefixmem_fast[index]'") from None


def load_embeddings(path: str | Path) -> np.ndarray:
    """Item embeddings, float32 ``[items, d]``, from floating numbers of that shape in .npy or .pt.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or a number that is not finite in float32.
    """
    path = input_file("embeddings", path, (".npy", ".pt"))
    expected = "floating numbers [items, d]"
    try:
        found = read_npy(path, "f", expected) if path.suffix.lower() == ".npy" else read_pt(path, expected)
        if not isinstance(found, Tensor):
            raise ValueError(f"it holds a {type(found).__name__}; {expected} were expected")
        if not found.is_floating_point():
            raise ValueError(f"it holds {found.dtype}; {expected} were expected")
        if found.dim() != 2:
            raise ValueError(f"it has shape {tuple(found.shape)}; {expected} were expected")
        embeddings = found.detach().to(torch.float32).contiguous()
        wrong = (~torch.isfinite(embeddings)).any(1).nonzero()
        if len(wrong):
            raise ValueError(f"row {int(wrong[0])} holds a number that is not finite in float32; {len(wrong)} rows do")
    except Exception as error:  # damaged files fail in as many ways as there are readers
        raise ValueError(f"embeddings {path}: {clipped(error)}") from error
    return embeddings.numpy()


def quantise(
    embeddings: np.ndarray,
    levels: int = 4,
    codes: int = 256,
    *,
    collisions: str = "keep",
    seed: int = 0,
    progress: Callable[[int], Any] = lambda level: None,
) -> Quantised:
    """Semantic IDs of items by residual quantisation.

    Args:
        embeddings: float32 ``[items, d]``, finite.
        levels: L, 1..64.
        codes: K, codes of each level: a power of two, 2..65536, and no more than there are items.
        collisions: what becomes of items that share a SID. ``"keep"``: they share it. ``"extra-level"``: one more code
            counts them from 0, in the order of their rows. ``"last-level"``: of the items that share a SID the nearest
            to its last centroid keeps it; the others take, in the order of their rows, the nearest centroid of the
            last level that no item with the same codes before it has.
        seed: of k-means.
        progress: is told each level that is done, from 1.

    Raises:
        TypeError, ValueError: an argument is not as stated, faiss is not installed, or ``"last-level"`` finds more
            items with the same codes before the last than the last level has codes.
    """
    levels, codes = _checks.positive("levels", levels), _checks.positive("codes", codes)
    if levels > _MOST_LEVELS:
        raise ValueError(f"levels = {levels}; give {_MOST_LEVELS} or less")
    if codes & (codes - 1) or not 2 <= codes <= _MOST_CODES:
        raise ValueError(f"codes = {codes}; give a power of two of 2..{_MOST_CODES}, such as 256")
    _checks.choice("collisions", collisions, COLLISIONS)
    seed = _checks.integer("seed", seed)
    if not 0 <= seed < 1 << 31:
        raise ValueError(f"seed = {seed} is outside 0..2^31 - 1")
    if embeddings.ndim != 2 or embeddings.dtype != np.float32:
        raise ValueError(f"embeddings are {embeddings.dtype} {embeddings.shape}; give float32 [items, d]")
    if len(embeddings) < codes:
        raise ValueError(
            f"{len(embeddings)} items are too few for {codes} codes a level; give codes = "
            f"{1 << max(len(embeddings).bit_length() - 1, 1)} or less, or more items"
        )
    check_faiss()

    residual = embeddings.copy()
    found, centroids, errors, spread = [], [], [], _spread(embeddings)
    for level in range(1, levels + 1):
        level_codes, level_centroids = _one_level(residual, codes, seed)
        if level < levels:  # the last one's centroids are subtracted when its codes are final
            residual -= level_centroids[level_codes]
            errors.append(_error(residual, spread))
        found.append(level_codes)
        centroids.append(level_centroids)
        progress(level)
    sids = np.stack(found, 1)
    group, size = _groups(sids)
    before, moved, sizes = int((size[group] > 1).sum()), 0, (codes,) * levels
    if collisions == "last-level":
        moved = _move(sids, residual, centroids[-1])
    residual -= centroids[-1][sids[:, -1]]
    errors.append(_error(residual, spread))
    if collisions == "extra-level":
        sids = np.concatenate([sids, _numbered(group)[:, None]], 1)
        sizes = (*sizes, int(size.max()))
    group, size = _groups(sids)
    after = int((size[group] > 1).sum())
    return Quantised(
        torch.from_numpy(sids), sizes, torch.from_numpy(np.stack(centroids)), tuple(errors), before, after, moved
    )


def _one_level(residual: np.ndarray, codes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes int64 ``[items]`` and centroids float32 ``[K, d]`` of one level."""
    import faiss

    bits = codes.bit_length() - 1
    quantizer = faiss.ResidualQuantizer(residual.shape[1], 1, bits)
    quantizer.train_type = faiss.ResidualQuantizer.Train_default | faiss.ResidualQuantizer.Skip_codebook_tables
    quantizer.max_beam_size = 1
    quantizer.cp.seed = seed
    quantizer.cp.min_points_per_centroid = 1  # fewer than 39 would be a warning on standard error
    quantizer.train(residual)
    found = []
    for start in range(0, len(residual), _AT_ONCE):
        packed = quantizer.compute_codes(residual[start : start + _AT_ONCE])
        found.append(faiss.unpack_bitstrings(packed, 1, bits)[:, 0].astype(np.int64))
    return np.concatenate(found), faiss.vector_to_array(quantizer.codebooks).reshape(codes, -1)


def _spread(embeddings: np.ndarray) -> float:
    """The mean squared distance of the embeddings from their mean."""
    mean = embeddings.mean(0, dtype=np.float64).astype(np.float32)
    return _mean_square(embeddings - mean)


def _error(residual: np.ndarray, spread: float) -> float:
    return _mean_square(residual) / spread if spread else 0.0


def _mean_square(rows: np.ndarray) -> float:
    return float(np.einsum("nd,nd->n", rows, rows).mean(dtype=np.float64))


def _groups(sids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each item the group of those with the same codes, and the size of each group."""
    _, group, size = np.unique(sids, axis=0, return_inverse=True, return_counts=True)
    return group.reshape(-1), size


def _numbered(group: np.ndarray) -> np.ndarray:
    """The place of each item in its group, by row."""
    order = np.argsort(group, kind="stable")
    first = np.searchsorted(group[order], group[order])
    place = np.empty(len(group), np.int64)
    place[order] = np.arange(len(group)) - first
    return place


def _move(sids: np.ndarray, residual: np.ndarray, centroids: np.ndarray) -> int:
    """Change last codes, in place, until no two items share a SID; returns how many were changed.

    Args:
        residual: what is left of the embeddings before the last level.
    """
    prefixes, count = _groups(sids[:, :-1]) if sids.shape[1] > 1 else (np.zeros(len(sids), np.int64), [len(sids)])
    worst = int(np.argmax(count))
    if count[worst] > len(centroids):
        shared = sids[np.flatnonzero(prefixes == worst)[0], :-1].tolist()
        raise ValueError(
            f"collisions = 'last-level': {count[worst]} items have the codes {shown(shared)} before the last level, "
            f"which has {len(centroids)} codes; give more codes or levels, or collisions = 'extra-level'"
        )
    group, size = _groups(sids)
    crowded = np.unique(prefixes[size[group] > 1])
    order = np.argsort(prefixes, kind="stable")
    starts = np.searchsorted(prefixes[order], crowded)
    length, moved = (centroids * centroids).sum(1), 0
    for start, prefix in zip(starts, crowded, strict=True):
        rows = order[start : start + count[prefix]]
        # Squared distances without the length of the residual, which is the same for all centroids of an item.
        distance = length - 2 * residual[rows] @ centroids.T
        codes = sids[rows, -1]
        own = distance[np.arange(len(rows)), codes] + (residual[rows] ** 2).sum(1)
        keeper = {int(codes[i]): i for i in np.argsort(own, kind="stable")[::-1]}  # the nearest is written last
        distance[:, list(keeper)] = np.inf
        for i in range(len(rows)):
            if keeper[int(codes[i])] != i:
                code = int(distance[i].argmin())
                distance[:, code] = np.inf
                sids[rows[i], -1] = code
                moved += 1
    return moved
