"""The numbered stream, of sequences that tell which they are: their kind, their number, and a random number."""

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
import torch

from prefixmem_fast.recommender.data import Histories, Sequences, SequenceStream, Tokens


class Told:
    """`count` sequences of three tokens, and as many more as `lengths` says."""

    def __init__(self, kind, count, lengths=None, encoder_decoder=False):
        self.kind, self.count, self.lengths, self.encoder_decoder = kind, count, lengths, encoder_decoder
        self.made = 0

    def __len__(self):
        return self.count

    def make(self, index, random):
        self.made += 1
        more = 0 if self.lengths is None else self.lengths[index % len(self.lengths)]
        ids = [self.kind, index, int(random.integers(2**40)), *[9] * more]
        return ([7, *ids], [8, *ids]) if self.encoder_decoder else ([], ids)


LENGTHS = [int(n) for n in np.random.default_rng(0).integers(0, 60, size=97)]
POOL = 16  # batches that are drawn together


def stream(length=160, sizes=(5, 7), weights=(3.0, 1.0), lengths=None, encoder_decoder=False, **options):
    kinds = {
        str(kind): (Told(kind, size, lengths, encoder_decoder), weight)
        for kind, (size, weight) in enumerate(zip(sizes, weights, strict=True))
    }
    return SequenceStream(kinds, length, **options)


def ids(batches, key="input_ids"):
    """Token ids, by batch and row."""
    return [[row[key].tolist() for row in batch] for batch in batches]


def flat(batches):
    return [row for batch in batches for row in batch]


@pytest.mark.parametrize("options", [{}, {"batch_size": 4, "lengths": LENGTHS}, {"batch_size": 3, "pack": 2}])
def test_a_batch_is_the_same_in_any_order_and_in_a_fresh_stream(options):
    length = 9000 // (options.get("batch_size", 1) * options.get("pack", 1))  # of three blocks
    forward = ids(stream(length, **options))
    assert len(forward) == length
    backward = stream(length, **options)
    for number in [*range(length - 1, 0, -451), 0, 15, 16, 17, length // 2, length - 1]:
        assert ids([backward[number]]) == forward[number : number + 1]
    for number in (length - 1, length // 2, 16, 0):
        assert ids([stream(length, **options)[number]]) == forward[number : number + 1]
    assert ids(stream(20, **options)) == forward[:20]  # the length only says where it ends


def test_a_pickled_stream_goes_on():
    made = stream(40, batch_size=3, seed=5, pack=2)
    first = ids(made)
    assert ids(pickle.loads(pickle.dumps(made))) == first


def test_where_it_ends():
    made = stream(10)
    assert len(made) == 10
    assert len(list(made)) == 10
    for number in (10, -1, 4096):
        with pytest.raises(IndexError):
            made[number]


def test_every_sequence_once_a_turn():
    """After any number of pools, no sequence was there twice more often than another of its kind."""
    sizes = (5, 700, 1)
    batches = ids(stream(9600, sizes=sizes, weights=(1, 1, 1)))
    counts = [Counter() for _ in sizes]
    for start in range(0, len(batches), POOL):
        for kind, index, _ in flat(batches[start : start + POOL]):
            counts[kind][index] += 1
        for kind, size in enumerate(sizes):
            times = [counts[kind][index] for index in range(size)]
            assert sum(times) == counts[kind].total()
            assert max(times) - min(times) <= 1
    assert min(counts[1].values()) >= 4  # it has been round several times


def test_each_turn_and_each_kind_has_its_own_order():
    """Of a kind with as many sequences as four pools have rows, the pools of each turn hold others together."""
    alone = ids(stream(64 * 4, sizes=(64,), weights=(1,)))
    pools = [frozenset(index for _, index, _ in flat(alone[start : start + POOL])) for start in range(0, 256, POOL)]
    assert all(len(pool) == POOL for pool in pools)
    assert all(frozenset().union(*pools[i : i + 4]) == frozenset(range(64)) for i in range(0, 16, 4))
    assert len(set(pools)) == 16
    both = ids(stream(128, sizes=(2000, 2000), weights=(1, 1)))
    first, second = ({index for k, index, _ in flat(both) if k == kind} for kind in (0, 1))
    assert len(first & second) < 30  # of about 64 each


def test_each_visit_has_its_own_random_numbers():
    found = flat(ids(stream(2000)))
    assert len({number for _, _, number in found}) == 2000


@pytest.mark.parametrize("weights", [(3.0, 1.0), (0.2, 0.2), (1.0, 9.0), (5, 2, 1)])
def test_the_mixture(weights):
    count = 8192
    kinds = [k for k, _, _ in flat(ids(stream(count, sizes=(5,) * len(weights), weights=weights)))]
    for kind, weight in enumerate(weights):
        share = weight / sum(weights)
        assert abs(kinds.count(kind) - count * share) < 4 * (count * share * (1 - share)) ** 0.5
    pools = [kinds[start : start + POOL].count(0) for start in range(0, count, POOL)]
    assert pools[:256] != pools[256:]  # 4096 numbers are drawn together, and the next otherwise


def test_one_kind_alone():
    assert {k for k, _, _ in flat(ids(stream(50, sizes=(4,), weights=(0.3,))))} == {0}


def test_seeds_differ():
    one, two = (flat(ids(stream(400, seed=seed))) for seed in (0, 1))
    assert one == flat(ids(stream(400, seed=0)))
    counts = [[[k for k, _, _ in rows[i : i + POOL]].count(0) for i in range(0, 400, POOL)] for rows in (one, two)]
    assert counts[0] != counts[1]  # the mixture
    assert not {number for _, _, number in one} & {number for _, _, number in two}  # the random numbers
    firsts = [{i for _, i, _ in flat(ids(stream(POOL, (2000,), (1,), seed=seed)))} for seed in (0, 1)]
    assert len(firsts[0] & firsts[1]) < 4  # the order of sequences
    whole = [ids(stream(POOL, (128,), (1,), lengths=range(128), batch_size=8, seed=seed)) for seed in (0, 1)]
    orders = [[min(map(len, batch)) for batch in batches] for batches in whole]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]  # the order of batches


def padding(batches):
    lengths = [[len(row) for row in batch] for batch in batches]
    return sum(max(own) * len(own) - sum(own) for own in lengths)


@pytest.mark.parametrize("pack", [1, 2])
def test_batches_of_like_length_and_of_as_many_tokens(pack):
    size, pools = 8, 6
    made = ids(stream(POOL * pools, (97, 50), lengths=LENGTHS, pack=pack, batch_size=size))
    orders = []
    for start in range(0, POOL * pools, POOL):
        batches = made[start : start + POOL]
        assert len(flat(batches)) == POOL * size
        assert all(batches)
        lengths = [sorted(map(len, batch)) for batch in batches]
        rising = sorted(lengths, key=lambda own: (own[0], own[-1]))
        assert [n for own in rising for n in own] == sorted(map(len, flat(batches)))  # runs of the sorted rows
        tokens = [sum(own) for own in lengths]
        assert max(abs(n - np.mean(tokens)) for n in tokens) <= max(map(max, lengths))
        orders.append(tuple(np.argsort([own[0] for own in lengths])))
    assert tuple(range(POOL)) not in orders  # in random order
    assert len(set(orders)) == pools  # of each pool its own
    assert len({len(batch) for batch in made}) > 3
    rows = [row for start in range(0, len(made), POOL) for row in sorted(flat(made[start : start + POOL]))]
    assert padding(made) < 0.3 * padding([rows[i : i + size] for i in range(0, len(rows), size)])


def test_pools_hold_their_own_numbers():
    """Which rows are drawn does not depend on how they are batched."""
    alone, batched = ids(stream(384, lengths=LENGTHS)), ids(stream(96, lengths=LENGTHS, batch_size=4))
    for start in range(0, 96, POOL):
        assert sorted(flat(alone[4 * start : 4 * (start + POOL)])) == sorted(flat(batched[start : start + POOL]))


def test_rows_of_equal_length_make_batches_of_equal_size():
    assert {len(batch) for batch in stream(64, batch_size=8)} == {8}
    assert {len(batch) for batch in stream(64, lengths=LENGTHS)} == {1}


@pytest.mark.parametrize("lengths", [[0] * 30 + [4000], [0, 4000], [4000] * 30 + [0]])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_no_batch_is_empty(lengths, size):
    made = ids(stream(64, (31,), (1,), lengths=lengths, batch_size=size))
    assert all(made)
    assert all(len(flat(made[i : i + POOL])) == POOL * size for i in range(0, 64, POOL))


def test_rows_are_made_once():
    made = stream(32, sizes=(97,), weights=(1,), lengths=LENGTHS, batch_size=4)
    list(made)
    assert made.sequences[0].made == 128


def test_parts_are_sorted_by_both():
    made = list(stream(48, lengths=LENGTHS, encoder_decoder=True, batch_size=6))
    for row in flat(made):
        assert set(row) == {"input_ids", "labels"}
        assert row["input_ids"][0] == 7
        assert row["labels"][0] == 8
        assert row["input_ids"][1:].tolist() == row["labels"][1:].tolist()
        assert row["input_ids"].dtype == row["labels"].dtype == torch.int64

    class Uneven(Told):
        def make(self, index, random):
            return [1] * (1 + index % 3), [2] * (1 + index)

    mixed = list(SequenceStream({"": (Uneven(0, 90, encoder_decoder=True), 1.0)}, POOL, batch_size=6))
    totals = [sorted(len(row["input_ids"]) + len(row["labels"]) for row in batch) for batch in mixed]
    rising = sorted(totals, key=lambda own: (own[0], own[-1]))
    assert [n for own in rising for n in own] == sorted(flat(totals))


def test_packs_are_neighbours():
    """Sequences that follow each other in number, of which a pool of single rows holds 16."""
    alone = ids(stream(96, lengths=LENGTHS))
    packed = list(stream(32, lengths=LENGTHS, pack=3))
    for start in (0, POOL):
        rows = flat(packed[start : start + POOL])
        found = []
        for row in rows:
            places = row["position_ids"].tolist()
            starts = [i for i, place in enumerate(places) if place == 0]
            assert len(starts) == 3
            own = [row["input_ids"][a:b].tolist() for a, b in itertools.pairwise([*starts, len(places)])]
            assert places == [i for one in own for i in range(len(one))]
            assert row["input_ids"].dtype == row["position_ids"].dtype == torch.int64
            found += own
        assert sorted(found) == sorted(flat(alone[3 * start : 3 * (start + POOL)]))


def test_of_real_sequences():
    """Four users, one of whom has a long history; each is there once in four rows, so four times a pool."""
    tokens = Tokens(np.arange(22).reshape(11, 2) + 10, 1, 2, 0)
    items = [np.array([0, 1]), np.array([2]), np.arange(3, 10), np.array([10])]
    kinds = {"histories": (Sequences("histories", tokens, Histories(list("abcd"), items), 3), 1.0)}
    batches = ids(SequenceStream(kinds, 320))
    assert batches == ids(SequenceStream(kinds, 320))
    for start in range(0, 320, POOL):
        rows = flat(batches[start : start + POOL])
        windows = [row for row in rows if len(row) == 7]
        rest = Counter(tuple(row) for row in rows if len(row) < 7)
        assert rest == {(1, 10, 11, 12, 13): 4, (1, 14, 15): 4, (1, 30, 31): 4}
        assert all(row == [1, *range(row[1], row[1] + 6)] for row in windows)
    assert {row[1] for row in flat(batches) if len(row) == 7} == {16, 18, 20, 22, 24}
