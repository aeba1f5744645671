import json
import os

import numpy as np
import pytest
import torch

from prefixmem_fast import Catalogue

INDEX = {"7": ["<a_1>", "<b_2>"], "x": ["<a_0>", "<b_2>"], "9": ["<a_1>", "<b_2>"]}
CODES = [[1, 2], [0, 2], [1, 2]]


def test_index_files(tmp_path):
    (tmp_path / "index.json").write_text(json.dumps(INDEX))
    np.save(tmp_path / "index.npy", np.array(CODES, dtype=np.int16))
    torch.save(torch.tensor(CODES), tmp_path / "index.pt")
    named = Catalogue.load(tmp_path / "index.json")
    assert named.items == ("7", "x", "9")
    assert named.codes.tolist() == CODES
    assert named.codebook_sizes == (2, 3)
    assert repr(named) == "Catalogue(items=3, codebook_sizes=(2, 3), distinct_sids=2)"
    for name in ("index.npy", "index.pt"):
        found = Catalogue.load(tmp_path / name, codebook_sizes=(4, 4))
        assert found.items == ("0", "1", "2")
        assert torch.equal(found.codes, named.codes)
        assert found.codebook_sizes == (4, 4)


@pytest.mark.parametrize(
    ("index", "options", "message"),
    [
        ({"7": ["<a_1>", "<b_2>"], "8": ["<a_1>"]}, {}, "item '8' has 1 levels and item '7' has 2"),
        ({"7": ["<a_1>", "<a_2>"]}, {}, "item '7', level 2: token '<a_2>' is one of level 1"),
        ({"7": ["<a_1>", "<c_2>"]}, {}, "item '7', level 2: token '<c_2>' is one of level 3"),
        ({"7": ["<a_1>", "red"]}, {}, "item '7', level 2: token 'red' is not of the form"),
        ({"7": ["<a_1>", 4]}, {}, "item '7', level 2: 4 is not a token"),
        ({"7": 5}, {}, "item '7' has 5; give a list"),
        ({"7": "a_1"}, {}, "item '7': 'a_1' is no Semantic ID; a list of tokens, or <a_1><b_2>..., was expected"),
        ({"7": "<a_1> and <b_2>"}, {}, "item '7': '<a_1> and <b_2>' is no Semantic ID"),
        ({"7": ["<a_1>", "<b_9>"]}, {"codebook_sizes": (4, 4)}, r"item '7' has code 9 at level 2; allowed are 0\.\.3"),
        ({"7": ["<a_1>", "<b_9>"]}, {"codebook_sizes": (4,)}, "codebook_sizes has 1 levels and codes has 2"),
        ({"7": ["red", "blue"]}, {}, "none of the 2 tokens is a Semantic ID token"),
        ({}, {}, "the index is empty; give"),
    ],
)
def test_errors_name_item_level_and_token(index, options, message, tmp_path):
    with pytest.raises((TypeError, ValueError), match=message):
        Catalogue.from_tokens(index, **options)
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        Catalogue.load(tmp_path / "index.json", **options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"7": ["<a_1>"', "index .*a.json: "),
        ("a.json", b'{"7": ["<a_1>"], "7": ["<a_2>"]}', "item '7' is there twice"),
        ("a.npy", b"\x93NUMPY", "index .*a.npy: "),
        ("a.pt", b"junk", "index .*a.pt: "),
        ("a.csv", b"1,2", r"ends in \.csv; \.json, \.npy, \.pt or \.parquet was expected"),
    ],
)
def test_damaged_files(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Catalogue.load(tmp_path / name)


@pytest.mark.parametrize(
    ("items", "codes", "message"),
    [
        (["a"], torch.tensor([[0.5]]), "codes is torch.float32"),
        (["a"], torch.tensor([1]), r"codes is torch.int64 \(1,\)"),
        (["a", "b"], torch.tensor([[1]]), "2 items and 1 rows of codes"),
        (["a", "a"], torch.tensor([[1], [2]]), "item 'a' is there twice"),
        (["a"], torch.tensor([[-1]]), "item 'a' has code -1 at level 1"),
        ([], torch.empty(0, 3, dtype=torch.int64), "give at least one item"),
    ],
)
def test_arrays(items, codes, message):
    with pytest.raises(ValueError, match=message):
        Catalogue(items, codes)


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"index .* is not there"):
        Catalogue.load(tmp_path / "none.json")


@pytest.mark.parametrize("suffix", ["json", "npy", "pt"])
def test_a_pipe_and_a_folder_are_not_opened(suffix, tmp_path):
    os.mkfifo(tmp_path / f"pipe.{suffix}")
    with pytest.raises(ValueError, match="is a pipe or a device"):
        Catalogue.load(tmp_path / f"pipe.{suffix}")
    (tmp_path / f"folder.{suffix}").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        Catalogue.load(tmp_path / f"folder.{suffix}")


@pytest.mark.parametrize("name", ["long" * 5000 + ".json"])
def test_what_is_no_file_name(name, tmp_path):
    with pytest.raises(ValueError, match=r"index .*; give a \.json, \.npy, \.pt or \.parquet file") as error:
        Catalogue.load(tmp_path / name)
    assert len(str(error.value)) < 1000


def test_capitals_in_a_suffix(tmp_path):
    (tmp_path / "INDEX.JSON").write_text(json.dumps(INDEX))
    assert Catalogue.load(tmp_path / "INDEX.JSON").items == ("7", "x", "9")


@pytest.mark.parametrize(
    "index", [{"7": ["<a_1>", "long" * 12_500]}, {"long" * 12_500: ["<a_1>", 7]}, {"7": {"a": "long" * 12_500}}]
)
def test_an_error_is_no_page(index, tmp_path):
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="index") as error:
        Catalogue.load(tmp_path / "index.json")
    assert len(str(error.value)) < 1000
    assert "\n" not in str(error.value)


def test_files_that_promise_more_than_they_hold(tmp_path):
    """Rows of stride 0, and a header that speaks of 8 TB, are refused before they are unrolled."""
    torch.save(torch.zeros(1, dtype=torch.int64).expand(10**12, 3), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: its tensor has shape \(1000000000000, 3\), and the file only"):
        Catalogue.load(tmp_path / "a.pt")
    torch.save(torch.zeros(3, 3, dtype=torch.int64).to_sparse(), tmp_path / "b.pt")
    with pytest.raises(ValueError, match="it holds no dense tensor"):
        Catalogue.load(tmp_path / "b.pt")
    for shape, kind in (
        ((10**12, 1), "<i8"),
        ((10**12, 0), "<i8"),
        ((2**62,), "|V0"),
        ((-1,), "|V0"),
        ((10**12, 1), "<f8"),
    ):
        with (tmp_path / "c.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
            file.write(bytes(8))
        with pytest.raises(ValueError, match=r"index .*c\.npy"):
            Catalogue.load(tmp_path / "c.npy")
