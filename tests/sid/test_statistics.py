"""Counts, held against dictionaries in plain Python."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from prefixmem_fast import AddressSpec, prefix_rows
from prefixmem_fast.sid.statistics import (
    codebook_use,
    hot_prefixes,
    prefix_groups,
    shared_sids,
    table_bytes,
    table_use,
    transition_windows,
)

SIZES = (5, 4, 6)


@pytest.fixture
def codes():
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randint(size - 1, (40,), generator=generator) for size in SIZES], 1)


@pytest.fixture
def histories():
    random = np.random.default_rng(2)
    return [random.integers(40, size=size) for size in (1, 0, 2, 9, 30)]


def test_codebooks():
    codes = torch.tensor([[0, 1], [0, 1], [3, 1], [0, 1]])
    first, second = codebook_use(codes, (4, 2))
    assert (first["size"], first["used"], first["most_used"]) == (4, 2, 0.75)
    assert first["perplexity"] == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert second == {"level": 2, "size": 2, "used": 1, "perplexity": 1.0, "most_used": 1.0}


def test_prefixes(codes):
    found = list(prefix_groups(codes, SIZES))
    for length, (group, count) in enumerate(found, 1):
        prefixes = [tuple(row) for row in codes[:, :length].tolist()]
        assert count == len(set(prefixes))
        assert len(set(zip(prefixes, group.tolist(), strict=True))) == count == int(group.max()) + 1


def test_large_codebooks_stay_apart():
    codes = torch.tensor([[2**31 - 1, 5], [2**31 - 2, 5], [2**31 - 1, 4]])
    assert [count for _, count in prefix_groups(codes, (2**31, 2**31))] == [2, 3]


def test_items_that_share_a_sid():
    codes = torch.tensor([[0, 1], [2, 2], [0, 1], [2, 3], [2, 2], [2, 2]])
    assert shared_sids(codes) == {"distinct": 3, "items": 5, "largest": 3, "largest_row": 1}
    assert shared_sids(codes[:1]) == {"distinct": 1, "items": 0, "largest": 1, "largest_row": 0}


def held_against_python(found, windows, spec):
    rows = prefix_rows(windows, spec)
    orders = [n for n in range(1, spec.max_order + 1) if spec.rows_per_order[n - 1]]
    assert [order["order"] for order in found] == orders
    for order in found:
        n = order["order"]
        home = {tuple(w[:n]): tuple(r) for w, r in zip(windows.tolist(), rows[:, n - 1, n - 1].tolist(), strict=True)}
        assert order["prefixes"] == len(home)
        assert (order["exact"], order["table_rows"]) == (n in spec.exact_orders, spec.rows_per_order[n - 1])
        for head in range(spec.heads):
            count = Counter(row[head] for row in home.values())
            assert order["occupied"][head] == len(count)
            assert order["sharing"][head] == sum(c for c in count.values() if c > 1)
        count = Counter(home.values())
        assert order["sharing_all"] == sum(c for c in count.values() if c > 1)
    return found


@pytest.mark.parametrize(("rows", "orders"), [(20, 3), (7, 2), (2, 5)])
def test_rows_that_prefixes_share(codes, rows, orders):
    spec = AddressSpec(SIZES, max_order=orders, heads=2, table_rows=rows)
    found = held_against_python(table_use(codes, spec), codes, spec)
    if rows == 20:
        assert [order["exact"] for order in found] == [True, True, False]
        assert found[1]["sharing"] == [0, 0]
        assert min(found[2]["sharing"]) > 0
    if rows == 2:  # two rows a head make four pairs
        assert found[2]["sharing_all"] == found[2]["prefixes"]


def test_suffixes_are_no_prefixes(codes):
    with pytest.raises(ValueError, match="mode = 'suffix'"):
        table_use(codes, AddressSpec(SIZES, mode="suffix", table_rows=9))


def test_bytes_of_tables():
    spec = AddressSpec(SIZES, max_order=2, heads=2, table_rows=(5, 10))
    assert table_bytes(spec, 8) == {"rows": 30, "float32": 30 * 16, "with_row_adagrad": 30 * 20}
    with pytest.raises(ValueError, match="memory_dim = 9 is not a multiple of heads = 2"):
        table_bytes(spec, 9)


def test_bytes_are_those_of_an_encoder_and_its_optimizer():
    from prefixmem_fast import PrefixMemConfig, PrefixMemory, optim

    spec = AddressSpec(SIZES, max_order=2, heads=2, table_rows=10)
    memory = PrefixMemory(PrefixMemConfig(spec, memory_dim=8), grad="sparse")
    optimizer = optim.RowWiseAdagrad(memory.parameters(), lr=0.1)
    memory(torch.zeros(1, 3, dtype=torch.int64)).sum().backward()
    optimizer.step()
    state = [value for value in optimizer.state[memory.weight].values() if value.dim()]
    found = table_bytes(spec, 8)
    assert found["float32"] == memory.weight.numel() * 4
    assert found["with_row_adagrad"] == found["float32"] + sum(value.nbytes for value in state)


def test_hot_prefixes(codes, histories):
    found = hot_prefixes(codes, SIZES, histories)
    met = [row for history in histories for row in history.tolist()]
    for length, row in enumerate(found, 1):
        count = Counter(tuple(codes[item, :length].tolist()) for item in met)
        falling = sorted(count.values(), reverse=True)
        assert row["prefixes"] == len(count)
        for top in (1, 10, 100):
            assert row["top"][str(top)] == pytest.approx(sum(falling[:top]) / len(met))
        assert count[tuple(row["hottest"])] == falling[0]
        half = row["half"]
        assert sum(falling[: half - 1]) < len(met) / 2 <= sum(falling[:half])


@pytest.mark.parametrize("back", [1, 2, 5])
def test_windows_of_real_transitions(codes, histories, back):
    spec = AddressSpec.cross_item(SIZES, history=back, heads=2, table_rows=50)
    found = transition_windows(codes, spec, histories)
    expected = [
        codes[history[i - back]].tolist() + codes[history[i]].tolist()
        for history in histories
        for i in range(back, len(history))
    ]
    assert found.tolist() == expected
    used = held_against_python(table_use(found, spec), found, spec)
    assert [order["order"] for order in used] == [3, 4, 5]
    next_back = replace(spec, history=back + 1)
    both = [*expected, *transition_windows(codes, next_back, histories).tolist()]
    assert transition_windows(codes, spec, histories, lags=2).tolist() == both


def test_no_transition(codes):
    spec = AddressSpec.cross_item(SIZES, history=3, table_rows=50)
    assert transition_windows(codes, spec, [np.array([1, 2])]).shape == (0, 6)
