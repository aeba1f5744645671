"""What counting alone achieves: the floors beside which any result of a model is shown.

Popularity ranks the items by their interactions. First-order Markov ranks what followed the last item by how often it
did, then everything else by popularity. The count table predicts the most frequent child of a SID's prefix.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np

from ..data import Examples, Histories


def item_counts(train: Histories, items: int) -> np.ndarray:
    """int64 ``[items]``: interactions of each item."""
    return np.bincount(np.concatenate(train.items), minlength=items)


def popularity_ranks(train: Histories, examples: Examples, items: int) -> np.ndarray:
    """int64 ``[N]``: items ranked above each target by their number of interactions."""
    return _ranks_of(item_counts(train, items))[examples.targets]


def markov_ranks(train: Histories, examples: Examples, items: int) -> np.ndarray:
    """int64 ``[N]``: items ranked above each target by how often they followed the last item, then by popularity."""
    follows: dict[int, Counter] = defaultdict(Counter)
    for history in train.items:
        for before, after in zip(history[:-1].tolist(), history[1:].tolist(), strict=True):
            follows[before][after] += 1
    popularity = _ranks_of(item_counts(train, items))
    ranked = {
        last: sorted(counted, key=lambda item: (-counted[item], popularity[item])) for last, counted in follows.items()
    }
    ranks = np.empty(len(examples), dtype=np.int64)
    for i, (history, target) in enumerate(zip(examples.histories, examples.targets.tolist(), strict=True)):
        first = ranked.get(int(history[-1]), [])
        if target in first:
            ranks[i] = first.index(target)
        else:
            ranks[i] = popularity[target] + sum(popularity[item] > popularity[target] for item in first)
    return ranks


def _ranks_of(score: np.ndarray) -> np.ndarray:
    ranks = np.empty(len(score), dtype=np.int64)
    ranks[np.lexsort((np.arange(len(score)), -score))] = np.arange(len(score))
    return ranks


def count_table_accuracy(train: Histories, examples: Examples, codes: np.ndarray) -> list[float]:
    """TF-L of the most frequent child of the true prefix, at each level; a prefix never trained on counts as wrong.

    Args:
        codes: int64 ``[items, L]``.
    """
    weights = item_counts(train, len(codes))
    accuracy = []
    for level in range(codes.shape[1]):
        children: dict[tuple, Counter] = defaultdict(Counter)
        for row, weight in zip(codes.tolist(), weights.tolist(), strict=True):
            if weight:
                children[tuple(row[:level])][row[level]] += weight
        best = {prefix: counted.most_common(1)[0][0] for prefix, counted in children.items()}
        targets = codes[examples.targets].tolist()
        accuracy.append(float(np.mean([best.get(tuple(row[:level])) == row[level] for row in targets])))
    return accuracy


def prefix_thirds(train: Histories, examples: Examples, codes: np.ndarray) -> np.ndarray:
    """Popularity of each target's prefix of all levels but the last: 0 rare, 1 medium, 2 popular, int64 ``[N]``.

    The thirds have equal numbers of examples, ordered by the interactions of their prefix; ties are not parted.
    """
    _, prefix = np.unique(codes[:, :-1], axis=0, return_inverse=True)
    counts = np.bincount(prefix.reshape(-1), weights=item_counts(train, len(codes)))
    own = counts[prefix.reshape(-1)[examples.targets]]
    return np.searchsorted(np.quantile(own, (1 / 3, 2 / 3)), own, side="left") if len(own) else own.astype(np.int64)
