"""Index files as other packages write them."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from prefixmem_fast import Catalogue
from prefixmem_fast.recommender.data import load_interactions

CODES = [[3, 0, 5], [1, 2, 4], [3, 2, 0], [1, 1, 1], [0, 2, 5]]


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_one_string_an_item(tmp_path):
    index = {f"i{row}": "".join(f"<{'abc'[l]}_{code}>" for l, code in enumerate(sid)) for row, sid in enumerate(CODES)}
    (tmp_path / "id2sid.json").write_text(json.dumps(index))
    found = Catalogue.load(tmp_path / "id2sid.json")
    assert found.items == ("i0", "i1", "i2", "i3", "i4")
    assert found.codes.tolist() == CODES


def test_codes_by_item(tmp_path):
    (tmp_path / "id2sid.json").write_text(json.dumps({f"i{row}": sid for row, sid in enumerate(CODES)}))
    found = Catalogue.load(tmp_path / "id2sid.json", codebook_sizes=(8, 8, 8))
    assert (found.items[4], found.codes.tolist(), found.codebook_sizes) == ("i4", CODES, (8, 8, 8))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"a": [1, 2], "b": [1]}, "item 'b' has 1 levels and item 'a' has 2"),
        ({"a": [1, 2], "b": [1, "<b_2>"]}, "item 'b', level 2: '<b_2>' is no code"),
        ({"a": [1, 2], "b": "<a_1><b_2>"}, "item 'b' has '<a_1><b_2>'; a list of codes"),
        ({"a": [1, True]}, "item 'a', level 2: True is no code"),
        ({"a": [1, -1]}, "item 'a', level 2: -1 is no code"),
        ({"a": [1, 2**63]}, "item 'a', level 2: 9223372036854775808 is no code"),
    ],
)
def test_codes_that_are_none(tmp_path, index, message):
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        Catalogue.load(tmp_path / "index.json")


@pytest.mark.parametrize("suffix", ["pt", "npy"])
def test_the_longer_side_counts_the_items(tmp_path, suffix):
    """GRID and sid_gr have levels first, and a transposed tensor in a file has strides of its own."""
    for name, array in (("items", torch.tensor(CODES)), ("levels", torch.tensor(CODES).T)):
        path = tmp_path / f"{name}.{suffix}"
        torch.save(array, path) if suffix == "pt" else np.save(path, array.numpy())
        found = Catalogue.load(path)
        assert found.items == ("0", "1", "2", "3", "4")
        assert found.codes.tolist() == CODES


def test_a_layout_that_is_said(tmp_path):
    square = torch.tensor(CODES[:3])
    torch.save(square, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="its shape is 3 x 3, and either side may count the items; say layout = 'item"):
        Catalogue.load(tmp_path / "a.pt")
    assert torch.equal(Catalogue.load(tmp_path / "a.pt", layout="items-first").codes, square)
    assert torch.equal(Catalogue.load(tmp_path / "a.pt", layout="levels-first").codes, square.T)
    torch.save(square[:2], tmp_path / "b.pt")  # two items of three levels
    assert len(Catalogue.load(tmp_path / "b.pt", layout="items-first")) == 2
    assert len(Catalogue.load(tmp_path / "b.pt")) == 3
    with pytest.raises(ValueError, match="layout = 'wide' is unknown; allowed are 'items-first', 'levels-first'"):
        Catalogue.load(tmp_path / "a.pt", layout="wide")
    (tmp_path / "a.json").write_text(json.dumps({"a": [1]}))
    with pytest.raises(ValueError, match="layout = 'items-first' is of an array"):
        Catalogue.load(tmp_path / "a.json", layout="items-first")


def test_whole_numbers_that_are_floating(tmp_path):
    """As GRID has them before it numbers items that share a SID."""
    torch.save(torch.tensor(CODES).float(), tmp_path / "a.pt")
    found = Catalogue.load(tmp_path / "a.pt")
    assert found.codes.dtype == torch.int64
    assert found.codes.tolist() == CODES
    for wrong in (0.5, float("nan"), float("inf")):
        torch.save(torch.tensor([[wrong, 1.0], [2.0, 3.0], [2.0, 3.0]]), tmp_path / "b.pt")
        with pytest.raises(ValueError, match=r"b\.pt: it holds torch.float32 that are no whole numbers"):
            Catalogue.load(tmp_path / "b.pt")


@pytest.mark.parametrize(
    ("sid", "kind"),
    [
        (CODES, pyarrow.list_(pyarrow.int64())),
        (CODES, pyarrow.list_(pyarrow.int32(), 3)),
        ([[f"<s_{'abc'[l]}_{code}>" for l, code in enumerate(row)] for row in CODES], None),
        (["<|sid_begin|><s_a_{}><s_b_{}><s_c_{}><|sid_end|>".format(*row) for row in CODES], None),
        (
            [["<|sid_begin|>", *(f"<s_{'abc'[l]}_{c}>" for l, c in enumerate(row)), "<|sid_end|>"] for row in CODES],
            None,
        ),
    ],
    ids=["lists", "lists of one size", "tokens", "a string", "tokens between two others"],
)
def test_parquet_of_items_and_sids(tmp_path, sid, kind):
    """OpenOneRec's pid and sid, whose tokens stand between two others in its prompts."""
    pids = [10**15 + i for i in range(5)]
    path = write_parquet(tmp_path / "pid2sid.parquet", pid=pids, sid=pyarrow.array(sid, kind), other=pids)
    found = Catalogue.load(path)
    assert found.items == tuple(map(str, pids))
    assert found.codes.tolist() == CODES


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"pid": [1, 2], "sid": [[1, 2], [1]]}, r"row 1: sid = \[1\]; as many codes as in row 0"),
        ({"pid": [1, 2], "sid": [[1, 2], None]}, "row 1: sid = None"),
        ({"pid": [1, 2], "sid": [[1, 2], [1, None]]}, r"row 1: sid = \[1, None\]"),
        ({"pid": [1, 1], "sid": [[1, 2], [1, 2]]}, "item '1' is there twice"),
        ({"pid": [1, 1], "sid": ["<a_1>", "<a_2>"]}, "item '1' is there twice"),
        ({"pid": [1, None], "sid": [[1], [2]]}, "row 1: item (None|nan) is neither a name nor a whole number"),
        ({"pid": [1.5, 2], "sid": [[1], [2]]}, r"row 0: item 1\.5 is neither"),
        ({"pid": [1], "sid": [[-1]]}, "item '1' has code -1 at level 1"),
        ({"pid": [1], "sid": [[0.5]]}, r"item '1', level 1: 0\.5 is not a token"),
        ({"pid": [1]}, "no column for the Semantic IDs; one of sid, sids"),
        ({"sid": [[1]]}, "no column for the items; one of item_id"),
        ({"pid": pyarrow.array([], pyarrow.int64()), "sid": pyarrow.array([], pyarrow.string())}, "it has no row"),
    ],
)
def test_parquet_that_is_no_index(tmp_path, columns, message):
    path = write_parquet(tmp_path / "a.parquet", **columns)
    with pytest.raises(ValueError, match=f"index .*a.parquet: {message}"):
        Catalogue.load(path)


def test_a_damaged_parquet_file(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", pid=[1], sid=[[1]])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.parquet: it is no Parquet file that can be read"):
        Catalogue.load(path)


def test_histories_of_sid_gr(tmp_path):
    """Rows of user_id and a list of item ids, which count the columns of the mapping."""
    torch.save(torch.tensor(CODES).T.contiguous(), tmp_path / "item-sid-mapping.pt")
    catalogue = Catalogue.load(tmp_path / "item-sid-mapping.pt")
    columns = {"user_id": [7, 8], "sequence_length": [3, 2]}
    for name in ("sequence_data", "item_ids"):
        path = write_parquet(tmp_path / "22363.parquet", **columns, **{name: [[4, 0, 2], [1, 1]]})
        histories = load_interactions(path, catalogue)
        assert histories.users == ["7", "8"]
        assert [items.tolist() for items in histories.items] == [[4, 0, 2], [1, 1]]
