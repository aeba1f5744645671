import os

import numpy as np
import pytest
import torch

from prefixmem_fast.sid.quantiser import load_embeddings, quantise


def embeddings_of(items=400, dim=6, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(size=(items, dim)).astype(np.float32)


def left(embeddings, found, levels):
    """What is left of embeddings after the centroids of the first levels."""
    total = embeddings.astype(np.float64)
    for level in range(levels):
        total = total - found.centroids[level].numpy()[found.codes[:, level].numpy()]
    return total


def test_codes_are_the_nearest_centroids_of_what_is_left():
    embeddings = embeddings_of()
    found = quantise(embeddings, 3, 16)
    assert found.codebook_sizes == (16,) * 3
    assert found.centroids.shape == (3, 16, 6)
    assert found.codes.dtype == torch.int64
    for level in range(3):
        distance = ((left(embeddings, found, level)[:, None] - found.centroids[level].numpy()) ** 2).sum(-1)
        taken = np.take_along_axis(distance, found.codes[:, level : level + 1].numpy(), 1)[:, 0]
        np.testing.assert_allclose(taken, distance.min(1), atol=1e-4)


@pytest.mark.parametrize("collisions", ["keep", "last-level", "extra-level"])
def test_errors_are_of_the_codes_that_come_out(collisions):
    embeddings = embeddings_of()
    found = quantise(embeddings, 2, 16 if collisions != "last-level" else 64, collisions=collisions)
    spread = ((embeddings - embeddings.mean(0)) ** 2).sum(1).mean()
    expected = [(left(embeddings, found, level) ** 2).sum(1).mean() / spread for level in (1, 2)]
    np.testing.assert_allclose(found.errors, expected, rtol=1e-4)
    assert found.errors[1] < found.errors[0] < 0.9


def test_embeddings_far_from_zero():
    """Errors are shares of the spread about the mean, not of the length of the embeddings."""
    near, far = (quantise(embeddings_of() + shift, 1, 16).errors[0] for shift in (0, 50))
    assert near == pytest.approx(far, rel=0.05)


def test_a_seed_says_the_codes():
    first, again, other = (quantise(embeddings_of(), 2, 16, seed=seed).codes for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_more_codes_than_a_byte_counts_and_progress():
    told = []
    found = quantise(embeddings_of(1100, 3), 2, 512, progress=told.append)
    assert found.codes.max() > 255
    assert told == [1, 2]


def groups(codes):
    return torch.unique(codes, dim=0, return_counts=True)[1]


def test_an_extra_level_numbers_items_that_share_a_sid():
    embeddings = embeddings_of()
    embeddings[300:] = embeddings[:100]
    kept = quantise(embeddings, 2, 16)
    found = quantise(embeddings, 2, 16, collisions="extra-level")
    assert torch.equal(found.codes[:, :2], kept.codes)
    seen: dict = {}
    for sid, number in zip(kept.codes.tolist(), found.codes[:, 2].tolist(), strict=True):
        assert number == seen.get(tuple(sid), 0)
        seen[tuple(sid)] = number + 1
    assert found.codebook_sizes == (16, 16, max(seen.values()))
    sizes = groups(kept.codes)
    assert kept.shared_before == kept.shared_after == found.shared_before == int(sizes[sizes > 1].sum())
    assert (found.shared_after, found.moved) == (0, 0)


def test_the_last_level_moves_items_to_the_nearest_free_code():
    embeddings = embeddings_of(300, 4)
    embeddings[250:] = embeddings[:50] + 1e-3
    kept = quantise(embeddings, 2, 64)
    found = quantise(embeddings, 2, 64, collisions="last-level")
    assert kept.shared_after == found.shared_before > 100
    assert found.shared_after == 0
    assert len(groups(found.codes)) == 300
    assert torch.equal(found.codes[:, :1], kept.codes[:, :1])
    moved = (found.codes != kept.codes).any(1)
    assert found.moved == int(moved.sum()) == 300 - len(groups(kept.codes))
    residual, centroids = left(embeddings, kept, 1), kept.centroids[1].numpy()
    distance = ((residual[:, None] - centroids) ** 2).sum(-1)
    for sid in torch.unique(kept.codes, dim=0):  # the nearest of those that shared a SID has kept it
        rows = (kept.codes == sid).all(1).nonzero()[:, 0]
        (keeper,) = rows[~moved[rows]].tolist()
        assert distance[keeper, sid[1]] <= distance[rows, sid[1]].min() + 1e-5
    for prefix in torch.unique(kept.codes[:, 0]):
        rows = (kept.codes[:, 0] == prefix).nonzero()[:, 0].tolist()
        taken = set(kept.codes[rows, 1].tolist())
        for row in rows:
            if moved[row]:  # those before it have taken theirs
                free = [code for code in range(64) if code not in taken]
                assert int(found.codes[row, 1]) == free[int(distance[row, free].argmin())]
                taken.add(int(found.codes[row, 1]))


def test_a_last_level_without_a_free_code():
    embeddings = np.repeat(embeddings_of(8), 10, 0)
    with pytest.raises(ValueError, match=r"collisions = 'last-level': \d+ items have the codes \[\d\] before the last"):
        quantise(embeddings, 2, 8, collisions="last-level")
    with pytest.raises(ValueError, match=r"80 items have the codes \[\] before the last level, which has 8 codes"):
        quantise(embeddings, 1, 8, collisions="last-level")


def test_items_that_are_all_the_same():
    found = quantise(np.ones((20, 4), np.float32), 2, 8)
    assert found.errors == (0.0, 0.0)
    assert found.shared_after == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": 0}, "levels = 0 is not positive"),
        ({"levels": 65}, "levels = 65; give 64 or less"),
        ({"codes": 100}, "codes = 100; give a power of two of"),
        ({"codes": 1}, "codes = 1; give a power of two of"),
        ({"codes": 1 << 17}, "codes = 131072; give a power of two of"),
        ({"codes": 64}, "50 items are too few for 64 codes a level; give codes = 32 or less"),
        ({"collisions": "drop"}, "collisions = 'drop' is unknown; allowed are 'keep', 'last-level', 'extra-level'"),
        ({"seed": -1}, "seed = -1 is outside"),
        ({"embeddings": np.ones(4, np.float32)}, "embeddings are float32"),
        ({"embeddings": np.ones((4, 4))}, "embeddings are float64"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantise(**{"embeddings": embeddings_of(50), "codes": 16, **arguments})


def test_without_faiss(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ValueError, match=r"needs faiss: pip install 'prefixmem_fast\[index\]'"):
        quantise(embeddings_of(), 2, 16)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_embeddings_in_files(tmp_path, kind):
    expected = torch.from_numpy(embeddings_of(5)).to(kind)
    torch.save(expected.T.contiguous().T, tmp_path / "a.pt")
    assert np.array_equal(load_embeddings(tmp_path / "a.pt"), expected.float().numpy())
    if kind != torch.bfloat16:
        np.save(tmp_path / "a.npy", expected.numpy())
        found = load_embeddings(tmp_path / "a.npy")
        assert (found.dtype, np.array_equal(found, expected.float().numpy())) == (np.float32, True)


WRONG = [
    (torch.zeros(3, 2, dtype=torch.int64), "holds .*int64; floating numbers"),
    (torch.zeros(3), r"has shape \(3,\)"),
    (torch.zeros(3, 2, 2), r"has shape \(3, 2, 2\)"),
    (torch.tensor([[0.0], [float("nan")], [0.0]]), "row 1 holds a number that is not finite in float32; 1 rows do"),
    (torch.tensor([[1e300], [float("inf")]], dtype=torch.float64), "row 0 holds a number that is not finite"),
]


@pytest.mark.parametrize("suffix", ["npy", "pt"])
@pytest.mark.parametrize(("value", "message"), WRONG, ids=range(len(WRONG)))
def test_files_that_hold_no_embeddings(tmp_path, suffix, value, message):
    path = tmp_path / f"a.{suffix}"
    torch.save(value, path) if suffix == "pt" else np.save(path, value.numpy())
    with pytest.raises(ValueError, match=f"embeddings .*a.{suffix}: it {message}|embeddings .*a.{suffix}: {message}"):
        load_embeddings(path)


def test_hostile_files(tmp_path):
    torch.save({"a": torch.ones(2, 2)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: it holds a dict; floating numbers \[items, d\] were expected"):
        load_embeddings(tmp_path / "a.pt")
    torch.save(torch.zeros(1).expand(10**10, 3), tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b\.pt: its tensor has shape \(10000000000, 3\), and the file only"):
        load_embeddings(tmp_path / "b.pt")
    with (tmp_path / "c.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**10, 3)})
    with pytest.raises(ValueError, match=r"c\.npy: its header says \(10000000000, 3\) numbers"):
        load_embeddings(tmp_path / "c.npy")
    os.mkfifo(tmp_path / "d.npy")
    with pytest.raises(ValueError, match="is a pipe or a device"):
        load_embeddings(tmp_path / "d.npy")
    (tmp_path / "e.pt").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"embeddings .*e\.pt: "):
        load_embeddings(tmp_path / "e.pt")
