"""The numbered stream, of sequences that tell which they are: their kind, their number, and a random number."""

import itertools

import numpy as np
import pytest
import torch

from prefixmem_fast.data import Histories, Sequences, SequenceStream, Tokens


class Told:
    """`count` sequences; as long as `lengths` says, at least three tokens."""

    def __init__(self, kind, count, lengths=None, parts=False):
        self.kind, self.count, self.lengths, self.parts = kind, count, lengths, parts
        self.made = 0

    def __len__(self):
        return self.count

    def make(self, index, random):
        self.made += 1
        more = 0 if self.lengths is None else self.lengths[index % len(self.lengths)]
        ids = [self.kind, index, int(random.integers(2**40)), *[9] * more]
        return ([7, *ids], [8, *ids[:2]]) if self.parts else ([], ids)


LENGTHS = [int(n) for n in np.random.default_rng(0).integers(0, 60, size=97)]


def stream(length=100, sizes=(5, 7), weights=(3.0, 1.0), lengths=None, parts=False, **options):
    kinds = {
        str(kind): (Told(kind, size, lengths, parts), weight)
        for kind, (size, weight) in enumerate(zip(sizes, weights, strict=True))
    }
    return SequenceStream(kinds, length, **options)


def ids(rows):
    return [row["input_ids"].tolist() for row in rows]


def test_a_row_is_the_same_in_any_order_and_in_a_fresh_stream():
    length = 9000  # of three blocks
    forward = ids(stream(length))
    assert len(forward) == length
    backward = stream(length)
    for row in [*range(length - 1, 0, -451), 0, 4095, 4096, 8191, 8192, 17]:
        assert backward[row]["input_ids"].tolist() == forward[row]
    for row in (8999, 4096, 5000, 0):
        assert stream(length)[row]["input_ids"].tolist() == forward[row]
    assert ids(stream(20)) == forward[:20]  # the length only says where it ends


@pytest.mark.parametrize("options", [{"batch": 4}, {"batch": 3, "pack": 2}, {"pack": 3}])
def test_so_it_is_with_pools_and_packs(options):
    forward = ids(stream(300, lengths=LENGTHS, **options))
    fresh = stream(300, lengths=LENGTHS, **options)
    for row in (299, 3, 150, 0, 64, 63, 47, 48, 298):
        assert fresh[row]["input_ids"].tolist() == forward[row]
        assert stream(300, lengths=LENGTHS, **options)[row]["input_ids"].tolist() == forward[row]


def test_where_it_ends():
    made = stream(10)
    assert len(made) == 10
    assert len(list(made)) == 10
    for row in (10, -1, 4096):
        with pytest.raises(IndexError):
            made[row]


def test_every_sequence_once_a_turn():
    found = ids(stream(9000, sizes=(5, 700, 1), weights=(1, 1, 1)))
    orders = []
    for kind, size in ((0, 5), (1, 700), (2, 1)):
        visits = [index for k, index, _ in found if k == kind]
        assert len(visits) > 2 * size
        turns = [visits[i : i + size] for i in range(0, len(visits) - size + 1, size)]
        assert all(sorted(turn) == list(range(size)) for turn in turns)
        rest = visits[len(turns) * size :]
        assert len(set(rest)) == len(rest)
        orders.append({tuple(turn) for turn in turns})
    assert len(orders[0]) > 60  # of 120: each turn has its own order
    assert len(orders[1]) > 3
    same = stream(4000, sizes=(50, 50), weights=(1, 1))
    first = [[index for k, index, _ in ids(same) if k == kind][:50] for kind in (0, 1)]
    assert first[0] != first[1]  # and each kind


def test_each_visit_has_its_own_random_numbers():
    found = ids(stream(2000))
    assert len({number for _, _, number in found}) == 2000


@pytest.mark.parametrize("weights", [(3.0, 1.0), (0.2, 0.2), (1.0, 9.0), (5, 2, 1)])
def test_the_mixture(weights):
    count = 8000
    found = ids(stream(count, sizes=(5,) * len(weights), weights=weights))
    for kind, weight in enumerate(weights):
        share = weight / sum(weights)
        times = sum(k == kind for k, _, _ in found)
        assert abs(times - count * share) < 4 * (count * share * (1 - share)) ** 0.5
    blocks = [[k for k, _, _ in found[i : i + 100]] for i in range(0, count, 100)]
    assert len({tuple(block) for block in blocks}) == len(blocks)
    assert [k for k, _, _ in found[:3904]] != [k for k, _, _ in found[4096:]]  # blocks differ


def test_one_kind_alone():
    assert {k for k, _, _ in ids(stream(50, sizes=(4,), weights=(0.3,)))} == {0}


def test_seeds_differ():
    one, two = ids(stream(400, seed=0)), ids(stream(400, seed=1))
    assert one == ids(stream(400, seed=0))
    assert [k for k, _, _ in one] != [k for k, _, _ in two]
    assert not {number for _, _, number in one} & {number for _, _, number in two}
    orders = [[i for k, i, _ in found if k == 1][:7] for found in (ids(stream(400, seed=s)) for s in range(6))]
    assert len({tuple(order) for order in orders}) > 3
    pools = [[len(row) for row in ids(stream(256, lengths=LENGTHS, batch=16, seed=s))] for s in (0, 1)]
    longest = [[max(pool[i : i + 16]) for i in range(0, 256, 16)] for pool in pools]
    assert np.argsort(longest[0]).tolist() != np.argsort(longest[1]).tolist()


def padding(rows, batch):
    batches = [[len(row) for row in rows[i : i + batch]] for i in range(0, len(rows), batch)]
    return sum(max(lengths) * len(lengths) - sum(lengths) for lengths in batches)


@pytest.mark.parametrize("pack", [1, 2])
def test_pools_hold_the_rows_that_they_would_hold_unsorted(pack):
    batch, pools = 4, 6
    plain = ids(stream(64 * pools, (97, 50), lengths=LENGTHS, pack=pack))
    pooled = ids(stream(64 * pools, (97, 50), lengths=LENGTHS, pack=pack, batch=batch))
    ascending = 0
    for start in range(0, 64 * pools, 64):
        before, after = plain[start : start + 64], pooled[start : start + 64]
        assert sorted(before) == sorted(after)
        lengths = [sorted(map(len, after[i : i + batch])) for i in range(0, 64, batch)]
        rising = sorted(lengths, key=lambda one: (one[0], one[-1]))
        assert [n for one in rising for n in one] == sorted(map(len, before))
        ascending += lengths == sorted(lengths)
    assert ascending == 0  # batches stand in random order
    orders = [tuple(np.argsort([len(row) for row in pooled[start : start + 64 : batch]])) for start in (0, 64, 128)]
    assert len(set(orders)) == 3  # of each pool its own
    assert padding(pooled, batch) < 0.3 * padding(plain, batch)


def test_rows_of_a_pool_are_made_once():
    made = stream(128, sizes=(97,), weights=(1,), lengths=LENGTHS, batch=4)
    list(made)
    assert made.sequences[0].made == 128


def test_parts_are_sorted_by_both():
    made = stream(192, lengths=LENGTHS, parts=True, batch=4)
    rows = list(made)
    assert all(set(row) == {"input_ids", "labels"} for row in rows)
    assert all(row["input_ids"][0] == 7 and row["labels"][0] == 8 for row in rows)
    assert all(row["input_ids"][1:3].tolist() == row["labels"][1:].tolist() for row in rows)
    plain = list(stream(192, lengths=LENGTHS, parts=True))
    assert padding(ids(rows), 4) < 0.3 * padding(ids(plain), 4)
    assert rows[0]["input_ids"].dtype == rows[0]["labels"].dtype == torch.int64


def test_packs_are_neighbours():
    alone = ids(stream(90, lengths=LENGTHS))
    for number, row in enumerate(stream(30, lengths=LENGTHS, pack=3)):
        own = alone[3 * number : 3 * number + 3]
        assert row["input_ids"].tolist() == list(itertools.chain(*own))
        assert row["position_ids"].tolist() == [i for one in own for i in range(len(one))]
        assert row["input_ids"].dtype == row["position_ids"].dtype == torch.int64


def test_of_real_sequences():
    """Three users, one of whom has a long history; each is there once in three rows."""
    tokens = Tokens(np.arange(20).reshape(10, 2) + 10, 1, 2, 0)
    items = [np.array([0, 1]), np.array([2]), np.arange(3, 10)]
    kinds = {"histories": (Sequences("histories", tokens, Histories(list("abc"), items), 3), 1.0)}
    rows = ids(SequenceStream(kinds, 300))
    assert rows == ids(SequenceStream(kinds, 300))
    for start in range(0, 300, 3):
        short, *others = sorted(rows[start : start + 3], key=len)
        assert short == [1, 14, 15]
        assert others[0] == [1, 10, 11, 12, 13]
        assert others[1][1] in (16, 18, 20, 22, 24)
        assert others[1] == [1, *range(others[1][1], others[1][1] + 6)]
    assert {max(row) for row in rows if len(row) == 7} == {21, 23, 25, 27, 29}
