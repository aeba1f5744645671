from collections import Counter
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixmem_fast.recommender.data import Examples, Histories
from prefixmem_fast.recommender.evaluation.baselines import (
    COUNTS,
    count_table_accuracy,
    item_counts,
    popularity_ranks,
    prefix_thirds,
    seen_transitions,
    transition_ranks,
)

MARKOV = COUNTS["markov"]


@st.composite
def worlds(draw):
    """Number of items, histories to train on, examples, and codes of three levels with shared SIDs."""
    items = draw(st.integers(1, 7))
    item = st.integers(0, items - 1)
    train = draw(st.lists(st.lists(item, max_size=8), min_size=1, max_size=6))
    held = draw(st.lists(st.tuples(st.lists(item, min_size=1, max_size=4), item), min_size=1, max_size=8))
    codes = draw(st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=items, max_size=items))
    return items, histories(train), examples(held), np.array(codes, dtype=np.int64)


def histories(lists):
    return Histories([f"user {i}" for i in range(len(lists))], [np.array(one, dtype=np.int64) for one in lists])


def examples(pairs):
    users = [f"user {i}" for i in range(len(pairs))]
    return Examples(users, [np.array(h) for h, _ in pairs], np.array([t for _, t in pairs], dtype=np.int64))


def met(train):
    return Counter(item for history in train.items for item in history.tolist())


@given(worlds())
def test_popularity(world):
    items, train, chosen, _ = world
    counts = met(train)
    assert item_counts(train, items).tolist() == [counts[item] for item in range(items)]
    order = sorted(range(items), key=lambda item: (-counts[item], item))
    assert popularity_ranks(train, chosen, items).tolist() == [order.index(t) for t in chosen.targets]


@given(worlds())
def test_markov(world):
    items, train, chosen, _ = world
    counts = met(train)
    found = transition_ranks(train, chosen, items, MARKOV)
    for history, target, rank in zip(chosen.histories, chosen.targets, found, strict=True):
        followed = Counter(
            after for own in train.items for before, after in pairwise(own.tolist()) if before == history[-1]
        )
        order = sorted(range(items), key=lambda item: (-followed[item], -counts[item], item))
        assert rank == order.index(target)


def counted(train, history, items, counts):
    """The score of every item, by loops over all pairs."""
    score = [0.0] * items
    for age, item in enumerate(history[::-1] if counts.age_weight else history[-1:]):
        for own in train.items:
            for (i, before), (j, after) in product(enumerate(own.tolist()), repeat=2):
                if 0 < j - i <= counts.lags:
                    weight = counts.age_weight**age * counts.lag_weight ** (j - i - 1)
                    score[after] += weight * (before == item)
                    score[before] += weight * (after == item) * counts.backwards
    return score


@given(worlds(), st.sampled_from(sorted(COUNTS)))
def test_transition_counts(world, name):
    items, train, chosen, _ = world
    counts = met(train)
    found = transition_ranks(train, chosen, items, COUNTS[name])
    for history, target, rank in zip(chosen.histories, chosen.targets, found, strict=True):
        score = counted(train, history.tolist(), items, COUNTS[name])
        order = sorted(range(items), key=lambda item: (-score[item], -counts[item], item))
        assert rank == order.index(target)


def test_only_the_last_items_of_a_history_count():
    train, chosen = histories([[0, 1], [2, 3]]), examples([([0, 2, 4], 1)])
    assert transition_ranks(train, chosen, 5, COUNTS["decayed"]).tolist() == [1]
    # Without item 0 nothing leads to item 1, and it is ranked by popularity behind item 3, which follows item 2.
    assert transition_ranks(train, chosen, 5, COUNTS["decayed"], max_items=2).tolist() == [2]


@given(worlds())
def test_seen_transitions(world):
    _, train, chosen, _ = world
    pairs = {pair for own in train.items for pair in pairwise(own.tolist())}
    expected = [(h[-1], t) in pairs for h, t in zip(chosen.histories, chosen.targets, strict=True)]
    assert seen_transitions(train, chosen).tolist() == expected


@given(worlds())
def test_count_table(world):
    _, train, chosen, codes = world
    met_sids = [tuple(codes[item].tolist()) for history in train.items for item in history]
    rows = [tuple(row) for row in codes.tolist()]
    expected = []
    for level in range(3):
        right = 0
        for target in chosen.targets:
            sid = rows[target]
            children = Counter(one[level] for one in met_sids if one[:level] == sid[:level])
            if children:  # of equal ones, that of the first item of the catalogue that was met
                most = max(children.values())
                right += sid[level] == next(
                    row[level]
                    for row in rows
                    if row[:level] == sid[:level] and row in met_sids and children[row[level]] == most
                )
        expected.append(right / len(chosen))
    assert count_table_accuracy(train, chosen, codes) == pytest.approx(expected)


@given(worlds())
def test_prefix_thirds(world):
    _, train, chosen, codes = world
    popular = Counter(tuple(codes[item, :-1].tolist()) for history in train.items for item in history)
    own = [popular[tuple(codes[target, :-1].tolist())] for target in chosen.targets]
    found = prefix_thirds(train, chosen, codes)
    assert found.dtype == np.int64
    limits = [np.quantile(own, share) for share in (1 / 3, 2 / 3)]
    assert found.tolist() == [sum(count > limit for limit in limits) for count in own]
    for count in set(own):
        assert len({third for third, other in zip(found.tolist(), own, strict=True) if other == count}) == 1


@pytest.mark.parametrize("count", range(1, 13))
def test_thirds_have_equal_numbers_where_no_two_are_tied(count):
    codes = np.arange(count)[:, None] * [1, 0]
    random = np.random.default_rng(count)
    times = random.permutation(count) + 1  # of each item
    train = histories([np.repeat(np.arange(count), times).tolist()])
    found = prefix_thirds(train, examples([([0], item) for item in range(count)]), codes)
    sizes = [int((found == third).sum()) for third in range(3)]
    assert max(sizes) - min(sizes) <= 1
    assert found[times.argsort()].tolist() == sorted(found.tolist())


def test_thirds_by_hand():
    codes = np.array([[0, 0], [0, 1], [1, 0], [2, 0], [3, 0]])
    train = histories([[0, 1, 1], [2, 2], [3]])  # prefixes met 3, 2, 1 and 0 times
    found = prefix_thirds(train, examples([([0], 0), ([0], 1), ([0], 2), ([0], 2), ([0], 3), ([0], 4)]), codes)
    assert found.tolist() == [2, 2, 1, 1, 0, 0]
    assert prefix_thirds(train, examples([]), codes).tolist() == []
    assert prefix_thirds(train, examples([([0], 2), ([0], 4)]), codes[:, 1:]).tolist() == [0, 0], "one level: no prefix"


def test_markov_by_hand():
    train = histories([[0, 1, 0, 1], [0, 2], [3, 3, 3, 3, 3]])
    # After 0: 1 twice, 2 once. Then by popularity: 3 five times, 0 three times, 4 never.
    chosen = examples([([9, 0], target) for target in (1, 2, 3, 0, 4)])
    assert transition_ranks(train, chosen, 5, MARKOV).tolist() == [0, 1, 2, 3, 4]
    # Nothing ever followed 2, nor 4: popularity alone.
    assert transition_ranks(train, examples([([2], 0), ([4], 4)]), 5, MARKOV).tolist() == [1, 4]


def test_count_table_by_hand():
    codes = np.array([[0, 0], [0, 1], [1, 0], [2, 2]])
    train = histories([[0, 1, 1], [2]])  # item 3 is never met
    chosen = examples([([0], 0), ([0], 1), ([0], 2), ([0], 3)])
    assert count_table_accuracy(train, chosen, codes) == [0.5, 0.5]
