from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixmem_fast.recommender.data import Examples, Histories
from prefixmem_fast.recommender.evaluation.baselines import (
    count_table_accuracy,
    item_counts,
    markov_ranks,
    popularity_ranks,
    prefix_thirds,
)


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
    found = markov_ranks(train, chosen, items)
    for history, target, rank in zip(chosen.histories, chosen.targets, found, strict=True):
        followed = Counter(
            after for own in train.items for before, after in pairwise(own.tolist()) if before == history[-1]
        )
        order = sorted(range(items), key=lambda item: (-followed[item], -counts[item], item))
        assert rank == order.index(target)


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
    assert markov_ranks(train, chosen, 5).tolist() == [0, 1, 2, 3, 4]
    # Nothing ever followed 2, nor 4: popularity alone.
    assert markov_ranks(train, examples([([2], 0), ([4], 4)]), 5).tolist() == [1, 4]


def test_count_table_by_hand():
    codes = np.array([[0, 0], [0, 1], [1, 0], [2, 2]])
    train = histories([[0, 1, 1], [2]])  # item 3 is never met
    chosen = examples([([0], 0), ([0], 1), ([0], 2), ([0], 3)])
    assert count_table_accuracy(train, chosen, codes) == [0.5, 0.5]
