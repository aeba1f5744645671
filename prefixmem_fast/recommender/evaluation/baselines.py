"""What counting alone achieves: the floors beside which any result of a model is shown.

Popularity ranks the items by their interactions. Transition counts rank what followed the items of a history by how
often it did, then everything else by popularity:

    markov     what directly followed the last item: first-order Markov
    decayed    what directly followed any item of the history, weighted by 1/2 for each item since
    lagged     the same of what came within three items, weighted by 1/2 for each between, and half of it backwards

The count table predicts the most frequent child of a SID's prefix.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from ..data import Examples, Histories


def item_counts(train: Histories, items: int) -> np.ndarray:
    """int64 ``[items]``: interactions of each item."""
    return np.bincount(np.concatenate(train.items), minlength=items)


def popularity_ranks(train: Histories, examples: Examples, items: int) -> np.ndarray:
    """int64 ``[N]``: items ranked above each target by their number of interactions."""
    return _ranks_of(item_counts(train, items))[examples.targets]


@dataclass(frozen=True)
class Transitions:
    """How transitions are counted.

    Attributes:
        lags: what came within so many items counts as following.
        lag_weight: of a transition, for each item between.
        backwards: weight of a transition from the later item to the earlier one.
        age_weight: of an item of the history, for each item since; 0 takes the last item alone.
    """

    lags: int = 1
    lag_weight: float = 1.0
    backwards: float = 0.0
    age_weight: float = 0.0


COUNTS = {
    "markov": Transitions(),
    "decayed": Transitions(age_weight=0.5),
    "lagged": Transitions(lags=3, lag_weight=0.5, backwards=0.5, age_weight=0.5),
}


def transition_ranks(
    train: Histories, examples: Examples, items: int, counts: Transitions, max_items: int = 20
) -> np.ndarray:
    """int64 ``[N]``: items ranked above each target by transition counts, then by popularity.

    Args:
        max_items: of a history that count.
    """
    weights: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for history in train.items:
        for lag in range(1, counts.lags + 1):
            weight = counts.lag_weight ** (lag - 1)
            for before, after in zip(history[:-lag].tolist(), history[lag:].tolist(), strict=True):
                weights[before][after] += weight
                if counts.backwards:
                    weights[after][before] += counts.backwards * weight
    rows = {item: (np.array(list(w)), np.array(list(w.values()))) for item, w in weights.items()}
    ranks, popularity = np.empty(len(examples), dtype=np.int64), _ranks_of(item_counts(train, items))
    score = np.zeros(items)
    for i, (history, target) in enumerate(zip(examples.histories, examples.targets.tolist(), strict=True)):
        touched = []
        for age, item in enumerate(history[::-1][: max_items if counts.age_weight else 1].tolist()):
            if item in rows:
                after, weight = rows[item]
                score[after] += weight * counts.age_weight**age
                touched.append(after)
        own, rank = score[target], popularity[target]
        scored = np.unique(np.concatenate(touched)) if touched else np.empty(0, dtype=np.int64)
        theirs, before = score[scored], popularity[scored] < popularity[target]
        above = (theirs > own) | ((theirs == own) & before)
        # Items without a count stand behind the target if it has one, else they are ranked by popularity.
        ranks[i] = above.sum() if own > 0 else rank + above.sum() - before.sum()
        score[scored] = 0
    return ranks


def seen_transitions(train: Histories, examples: Examples) -> np.ndarray:
    """bool ``[N]``: whether each target directly followed the last item of its history somewhere in training.

    What a model finds of these it may have memorised; the others it has to generalise to (arXiv 2603.19809).
    """
    pairs = {pair for items in train.items for pair in zip(items[:-1].tolist(), items[1:].tolist(), strict=True)}
    found = [(int(h[-1]), t) in pairs for h, t in zip(examples.histories, examples.targets.tolist(), strict=True)]
    return np.array(found, dtype=bool)


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
