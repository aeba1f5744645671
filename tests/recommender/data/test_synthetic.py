import itertools

import numpy as np
import pytest
import torch

from prefixmem_fast.recommender.data import leave_two_out, synthetic
from prefixmem_fast.recommender.data.synthetic import CODES, LEVELS, residual_codes


@pytest.fixture(scope="module")
def made():
    return synthetic(400, 300, seed=3)


def test_the_seed_tells_everything(made):
    again, other = synthetic(400, 300, seed=3), synthetic(400, 300, seed=4)
    assert torch.equal(made.catalogue.codes, again.catalogue.codes)
    assert made.text == again.text
    assert all(map(np.array_equal, made.histories.items, again.histories.items))
    assert not torch.equal(made.catalogue.codes, other.catalogue.codes)
    assert made.text != other.text
    assert not all(map(np.array_equal, made.histories.items, other.histories.items))


def test_catalogue(made):
    assert LEVELS == 5
    assert made.catalogue.items == tuple(f"item-{i}" for i in range(400))
    assert made.catalogue.codebook_sizes == (CODES,) * 5
    assert made.catalogue.codes.shape == (400, 5)
    for level in made.catalogue.codes.T:
        assert level.min() >= 0
        assert level.max() < CODES
        assert len(level.unique()) > CODES // 2
    assert len(made.catalogue.codes.unique(dim=0)) > 300


def test_texts_say_what_the_first_codes_say(made):
    """Items of one colour and thing are near each other, so they share codes more often than others do."""
    assert len(made.text) == 400
    assert all(len(text.split()) == 3 for text in made.text)
    named = [text.rsplit(" ", 1)[0] for text in made.text]
    first = made.catalogue.codes[:, 0].tolist()
    pairs = [(a, b) for a, b in itertools.combinations(range(400), 2) if named[a] == named[b]]
    together = np.mean([first[a] == first[b] for a, b in pairs])
    assert together > 3 * np.mean([first[a] == first[b] for a, b in itertools.combinations(range(400), 2)])


@pytest.mark.parametrize("items", [64, 400])
def test_histories(items):
    made = synthetic(items, 200, seed=0)
    assert made.histories.users == [f"user-{i}" for i in range(200)]
    assert made.histories.times is None
    for own in made.histories.items:
        assert own.dtype == np.int64
        assert len(np.unique(own)) == len(own)
        assert own.min() >= 0
        assert own.max() < items
    assert len(leave_two_out(made.histories).test) == 200


@pytest.mark.parametrize("items", [64, 400])
def test_no_history_is_long(items):
    lengths = [len(own) for own in synthetic(items, 200, seed=0).histories.items]
    assert max(lengths) == 20
    assert len(set(lengths)) > 10


@pytest.mark.parametrize(("items", "seed"), [(64, 0), (64, 1), (400, 0)])
def test_no_history_is_short(items, seed):
    assert min(len(own) for own in synthetic(items, 200, seed).histories.items) >= 5


@pytest.mark.parametrize("seed", [3, 4])
def test_popularity_falls_like_zipf(seed):
    """Both the tastes and what is chosen by them follow it; without one of them, the bounds do not hold."""
    made = synthetic(400, 600, seed)
    by_name = np.bincount(np.concatenate(made.histories.items), minlength=400)
    counts = np.sort(by_name)[::-1]
    assert counts[:40].sum() > 0.3 * counts.sum()  # 0.16 were all items as popular
    assert counts[200:].sum() < 0.25 * counts.sum()  # and 0.36
    slope = np.polyfit(np.log(np.arange(1, 101)), np.log(counts[:100]), 1)[0]
    assert -1 < slope < -0.43
    assert abs(np.corrcoef(np.arange(400), by_name)[0, 1]) < 0.2  # name and popularity have nothing in common


def test_users_have_tastes(made):
    """Two items of one user share their thing more often than items of two users."""
    thing = [text.split()[1] for text in made.text]
    own = [thing[a] == thing[b] for items in made.histories.items for a, b in itertools.combinations(items, 2)]
    pairs = zip(made.histories.items, made.histories.items[1:], strict=False)
    others = [thing[a] == thing[b] for left, right in pairs for a, b in itertools.product(left, right)]
    assert np.mean(own) > 2 * np.mean(others)


class _Chooses:
    """Stands for a generator: the centres start at these rows."""

    def __init__(self, *rows):
        self.rows = iter(rows)

    def choice(self, count, size, replace):
        assert not replace
        found = np.array(next(self.rows))
        assert len(found) == size
        assert found.max() < count
        return found


def test_residual_codes_by_hand():
    """Around -100 and 100, and there 10 below or above: the second level starts from what the first left."""
    vectors = np.array([[-110.0, 0], [-90, 0], [90, 0], [110, 0], [112, 0]])
    codes = residual_codes(vectors, 2, 2, _Chooses([3, 0], [0, 1]))
    # First centres -100 and 104; what is left: -10, 10, -14, 6, 8, the second centres from -10 and 10.
    assert codes.tolist() == [[1, 0], [1, 1], [0, 0], [0, 1], [0, 1]]
    assert codes.dtype == np.int64
    assert residual_codes(vectors, 2, 2, _Chooses([0, 3], [1, 0])).tolist() == [[0, 1], [0, 0], [1, 1], [1, 0], [1, 0]]


@pytest.mark.parametrize("seed", range(5))
def test_residual_codes_are_the_digits_of_what_they_are_given(seed):
    digits = np.array(list(itertools.product((0, 1), repeat=4)))
    vectors = ((2 * digits - 1) * [1000, 100, 10, 1]).sum(1, keepdims=True) * np.array([[1.0, -0.5]])
    before = vectors.copy()
    codes = residual_codes(vectors, 4, 2, np.random.default_rng(seed))
    assert np.array_equal(vectors, before)
    for code, digit in zip(codes.T, digits.T, strict=True):
        assert np.array_equal(code, digit) or np.array_equal(code, 1 - digit)


def test_residual_codes_name_the_nearest_centre():
    """Centres are the means of their items once nothing moves any more."""
    random = np.random.default_rng(0)
    middles = random.normal(size=(6, 3)) * 20
    vectors = middles[random.integers(6, size=200)] + random.normal(size=(200, 3)) * 0.1
    residual = vectors
    codes = residual_codes(vectors, 2, 6, random)
    centres = np.stack([residual[codes[:, 0] == c].mean(0) for c in np.unique(codes[:, 0])])
    assert len(centres) > 3
    distances = np.linalg.norm(residual[:, None] - centres[None], axis=2)
    assert np.array_equal(np.unique(codes[:, 0])[distances.argmin(1)], codes[:, 0])


def test_residual_codes_are_of_the_last_centres():
    """Where eight rounds do not come to rest, the codes still name the nearest of the centres that they left."""
    vectors = np.arange(60.0)[:, None] ** 1.5
    centres = vectors[[0, 1, 2]].copy()
    for _ in range(8):
        nearest = np.abs(vectors - centres[:, 0]).argmin(1)
        centres = np.stack([vectors[nearest == c].mean(0) for c in range(3)])
    last = np.abs(vectors - centres[:, 0]).argmin(1)
    assert not np.array_equal(last, nearest)
    assert np.array_equal(residual_codes(vectors, 1, 3, _Chooses([0, 1, 2]))[:, 0], last)


@pytest.mark.parametrize(("items", "users"), [(63, 10), (64, 0), (0, 5)])
def test_too_few(items, users):
    with pytest.raises(ValueError, match=f"items = {items}, users = {users}; give 64 items or more and 1 user or more"):
        synthetic(items, users)
