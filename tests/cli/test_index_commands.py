"""`prefixmem index` and `prefixmem inspect`, from files to files."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from prefixmem_fast import Catalogue
from prefixmem_fast.cli import main
from tests.helpers.runs import write_files


@pytest.fixture
def embeddings(tmp_path):
    random = np.random.default_rng(0)
    rows = random.normal(size=(200, 5)).astype(np.float32)
    rows[190:] = rows[:10]  # share their SIDs
    np.save(tmp_path / "items.npy", rows)
    return tmp_path / "items.npy"


def run_json(capsys, *arguments):
    code = main([*map(str, arguments), "--json"])
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    return json.loads(captured.out)


def told(capsys, *arguments):
    code = main([*map(str, arguments)])
    captured = capsys.readouterr()
    assert (code, captured.out, captured.err.count("\n")) == (2, "", 1), captured
    return captured.err


def make(capsys, embeddings, *arguments):
    out = embeddings.parent / "index.json"
    return run_json(
        capsys, "index", "--embeddings", embeddings, "--out", out, "--levels", 2, "--codes", 16, *arguments
    ), Catalogue.load(out)


@pytest.mark.parametrize("collisions", ["keep", "last-level", "extra-level"])
def test_index(capsys, embeddings, collisions):
    codes = ("--codes", 64) if collisions == "last-level" else ()
    report, catalogue = make(capsys, embeddings, "--collisions", collisions, *codes)
    assert catalogue.items == tuple(map(str, range(200)))
    assert len(report["codebook_sizes"]) == catalogue.codes.shape[1] == 2 + (collisions == "extra-level")
    assert report["distinct_sids"] == len(catalogue.codes.unique(dim=0))
    assert report["shared_before"] >= 20
    assert (report["shared_after"] == 0) == (collisions != "keep")
    assert (report["moved"] > 0) == (collisions == "last-level")
    assert [level["used"] for level in report["levels"]] == [len(code.unique()) for code in catalogue.codes.T]
    assert 0 < report["levels"][1]["error"] < report["levels"][0]["error"] < 1
    assert len([level for level in report["levels"] if "error" in level]) == 2
    assert sorted(file.name for file in embeddings.parent.iterdir()) == ["index.json", "items.npy"]


def test_index_in_words(capsys, embeddings):
    out = embeddings.parent / "new" / "index.json"
    arguments = ["index", "--embeddings", embeddings, "--out", out, "--levels", 2, "--codes", 16]
    assert main([*map(str, arguments), "--collisions", "extra-level"]) == 0
    text = capsys.readouterr().out
    assert "16 of 16" in text
    assert "200 items; " in text
    assert "0 do after --collisions extra-level" in text
    catalogue = Catalogue.load(out)
    assert text.endswith(f"--codebook-sizes 16,16,{catalogue.codebook_sizes[2]}\n")
    assert main([*map(str, arguments), "--token-format", "[{level}:{code}]"]) == 0
    assert capsys.readouterr().out.endswith(" --codebook-sizes 16,16 --token-format '[{level}:{code}]'\n")


def test_names_tokens_and_seeds(capsys, embeddings):
    names = [f"B00{row:03}" for row in range(200)]
    (embeddings.parent / "names.json").write_text(json.dumps(names))
    (embeddings.parent / "names.txt").write_text("\n".join(names) + "\n")
    (embeddings.parent / "numbers.json").write_text(json.dumps(list(range(1000, 1200))))
    _, first = make(capsys, embeddings, "--items", embeddings.parent / "names.json", "--seed", 3)
    _, again = make(capsys, embeddings, "--items", embeddings.parent / "names.txt", "--seed", 3)
    _, other = make(capsys, embeddings, "--items", embeddings.parent / "numbers.json", "--seed", 4)
    assert first.items == again.items == tuple(names)
    assert other.items[-1] == "1199"
    assert torch.equal(first.codes, again.codes)
    assert not torch.equal(first.codes, other.codes)
    path = embeddings.parent / "index.json"
    arguments = ["index", "--embeddings", embeddings, "--out", path, "--levels", 2, "--codes", 16, "--seed", 3]
    run_json(capsys, *arguments, "--token-format", "<|sid_{number}|>")
    assert torch.equal(Catalogue.load(path, codebook_sizes=(16, 16)).codes, first.codes)
    assert "<|sid_16|>" in path.read_text()


def test_an_index_trains(capsys, embeddings):
    """As the last line says: the codebook sizes are those of the quantiser, used or not."""
    report, catalogue = make(capsys, embeddings)
    sizes = report["codebook_sizes"]
    assert Catalogue.load(report["out"], codebook_sizes=sizes).codes.tolist() == catalogue.codes.tolist()


WRONG = [
    (["--codes", "100"], "codes = 100; give a power of two"),
    (["--codes", "256"], "200 items are too few for 256 codes a level; give codes = 128 or less"),
    (["--levels", "0"], "levels = 0 is not positive"),
    (["--levels", "27"], "has no letter for level 27"),
    (["--levels", "26", "--collisions", "extra-level"], "has no letter for level 27"),
    (["--token-format", "<{code}>"], "token_format = '<{code}>' has the fields"),
    (
        ["--token-format", "<{level}{code}>", "--levels", "11"],
        "writes level 1, code 15 as <115>, which reads as level and code (11, 5)",
    ),
    (["--seed", "-1"], "seed = -1 is outside"),
    (["--collisions", "last-level", "--levels", "1"], "200 items have the codes [] before the last level"),
    (["--out", "{folder}/a.txt"], "ends in .txt; give a name that ends in .json"),
    (["--out", ""], "ends in no suffix"),
    (["--out", "{folder}/items.npy/a.json"], "is no folder"),
    (["--embeddings", "{folder}/none.npy"], "none.npy is not there"),
    (["--embeddings", "{folder}/whole.npy"], "whole.npy: it holds int64; floating numbers"),
    (["--embeddings", "{folder}/nan.npy"], "nan.npy: row 1 holds a number that is not finite"),
    (["--embeddings", "{folder}/flat.npy"], "flat.npy: it has shape (3,)"),
    (["--items", "{folder}/few.json"], "few.json: it has 2 names, and the embeddings have 200 rows"),
    (["--items", "{folder}/twice.txt"], "twice.txt: item 'a' is there twice"),
    (["--items", "{folder}/dict.json"], "dict.json: it holds a dict; a list of names was expected"),
    (["--items", "{folder}/true.json"], "true.json: name 1 is True; a text or a whole number was expected"),
    (["--items", "{folder}/items.npy"], "ends in .npy; .json or .txt was expected"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=range(len(WRONG)))
def test_bad_input_of_index(capsys, embeddings, arguments, message):
    folder = embeddings.parent
    np.save(folder / "whole.npy", np.ones((3, 2), np.int64))
    np.save(folder / "nan.npy", np.array([[1.0], [np.nan]]))
    np.save(folder / "flat.npy", np.ones(3))
    (folder / "few.json").write_text('["a", "b"]')
    (folder / "twice.txt").write_text("a\n" * 200)
    (folder / "dict.json").write_text("{}")
    (folder / "true.json").write_text('["a", true]')
    before = sorted(folder.iterdir())
    defaults = ["--embeddings", embeddings, "--out", folder / "index.json", "--codes", "16"]
    line = told(capsys, "index", *defaults, *(argument.replace("{folder}", str(folder)) for argument in arguments))
    assert message in line
    assert sorted(folder.iterdir()) == before


def test_index_without_faiss(capsys, embeddings, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    line = told(capsys, "index", "--embeddings", embeddings, "--out", embeddings.parent / "index.json")
    assert line == "prefixmem index: quantising needs faiss: pip install 'prefixmem_fast[index]'\n"


def test_an_index_of_a_failed_write_is_left(capsys, embeddings, monkeypatch):
    out = embeddings.parent / "index.json"
    out.write_text("before")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    told(capsys, "index", "--embeddings", embeddings, "--out", out, "--codes", "16", "--levels", "1")
    assert out.read_text() == "before"
    assert sorted(file.name for file in embeddings.parent.iterdir()) == ["index.json", "items.npy"]


def test_inspect(capsys, tmp_path):
    data = write_files(tmp_path)
    report = run_json(
        capsys,
        *("inspect", data["items"], "--table-rows", 40, "--heads", 2, "--max-order", 3, "--memory-dim", 8),
        *("--interactions", *data["interactions"], "--history", 2),
    )
    catalogue = Catalogue.load(data["items"])
    assert (report["items"], report["codebook_sizes"]) == (60, [6, 6, 6])
    assert report["prefixes"] == [len(catalogue.codes[:, :length].unique(dim=0)) for length in (1, 2, 3)]
    assert report["shared_sids"] == {"distinct": 60, "items": 0, "largest": 1, "largest_item": None}
    assert [(order["exact"], order["table_rows"]) for order in report["orders"]] == [(True, 6), (True, 36), (False, 40)]
    assert report["memory"] == {"rows": 164, "float32": 164 * 16, "with_row_adagrad": 164 * 20}
    histories = json.loads((tmp_path / "interactions.json").read_text())
    assert report["interactions"] == sum(map(len, histories.values()))
    assert report["hot"][0]["top"]["10"] == 1.0
    across = report["cross_item"]
    pairs = [pair for items in histories.values() for back in (1, 2) for pair in zip(items, items[back:], strict=False)]
    assert (across["history"], across["transitions"]) == (2, len(pairs))
    assert [order["order"] for order in across["orders"]] == [3, 4, 5]
    # L + 0 reads the item before alone; no two of these items share their SID.
    assert across["orders"][0]["prefixes"] == len({first for first, _ in pairs})
    code = {item: int(row[0]) for item, row in zip(catalogue.items, catalogue.codes, strict=True)}
    assert across["orders"][1]["prefixes"] == len({(first, code[second]) for first, second in pairs})


def test_inspect_in_words_and_as_a_picture(capsys, tmp_path):
    data = write_files(tmp_path)
    arguments = ["inspect", data["items"], "--table-rows", "40", "--interactions", *data["interactions"]]
    for picture in (tmp_path / "pictures" / "a.png", tmp_path / "pictures" / "a.svg"):
        assert main([*arguments, "--history", "1", "--picture", str(picture)]) == 0
        text = capsys.readouterr().out
        for words in ("60 items of 3 codes", "60 distinct SIDs; 0 items share theirs", "exact", "L + 0", "top 100"):
            assert words in text
        assert f"drawn in {picture}" in text
    assert (tmp_path / "pictures" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "pictures" / "a.svg").read_text()


def test_inspect_of_items_that_share_a_sid(capsys, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"p": [0, 1], "q": [2, 2], "r": [2, 2]}))
    assert main(["inspect", str(tmp_path / "a.json"), "--codebook-sizes", "4,4", "--table-rows", "9"]) == 0
    text = capsys.readouterr().out
    assert "2 of 4" in text
    assert "2 distinct SIDs; 2 items share theirs, 2 of them that of item q" in text


def test_inspect_of_a_square(capsys, tmp_path):
    np.save(tmp_path / "a.npy", np.array([[0, 1], [2, 3]]))
    assert "either side may count the items" in told(capsys, "inspect", tmp_path / "a.npy")
    report = run_json(capsys, "inspect", tmp_path / "a.npy", "--layout", "levels-first")
    assert report["codebook_sizes"] == [2, 4]


def test_histories_too_short_for_cross_item_orders(capsys, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"p": [0, 1], "q": [2, 2]}))
    (tmp_path / "h.json").write_text(json.dumps({"u": ["p"], "v": ["q"]}))
    arguments = ["inspect", tmp_path / "a.json", "--interactions", tmp_path / "h.json", "--history", "2"]
    assert run_json(capsys, *arguments)["cross_item"]["transitions"] == 0
    assert main([*map(str, arguments), "--picture", str(tmp_path / "a.png")]) == 0
    assert "0 pairs of items" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--history", "1"], "--history needs --interactions"),
        (["--history", "-1"], "--history = -1; give 1"),
        (["--table-rows", "0"], "table_rows = 0 holds a value below 1"),
        (["--heads", "3", "--memory-dim", "8"], "memory_dim = 8 is not a multiple of heads = 3"),
        (["--codebook-sizes", "6,6"], "codebook_sizes has 2 levels"),
        (["--codebook-sizes", "many"], "--codebook-sizes = 'many'; give whole numbers"),
        (["--picture", "{folder}/a.txt"], "ends in none of "),
        (["--interactions", "{folder}/items.index.json"], "is not in the index"),
        (["--interactions", "{folder}/empty.json", "--history", "1"], "--interactions holds no interaction"),
        (["--layout", "items-first"], "layout = 'items-first' is of an array"),
    ],
)
def test_bad_input_of_inspect(capsys, tmp_path, arguments, message):
    data = write_files(tmp_path)
    (tmp_path / "empty.json").write_text('{"u": []}')
    assert message in told(
        capsys, "inspect", data["items"], *(argument.replace("{folder}", str(tmp_path)) for argument in arguments)
    )


def test_a_picture_without_matplotlib(capsys, tmp_path, monkeypatch):
    data = write_files(tmp_path)
    found = "prefixmem_fast.cli.inspect.find_spec"
    monkeypatch.setattr(found, lambda name: None)
    line = told(capsys, "inspect", data["items"], "--picture", tmp_path / "a.png")
    assert line == "prefixmem inspect: plots need matplotlib: pip install 'prefixmem_fast[train]'\n"


def test_progress_goes_to_standard_error(embeddings):
    """And faiss warns of nothing, though it has fewer items for each code than it likes."""
    command = [sys.executable, "-m", "prefixmem_fast.cli", "index", "--embeddings", str(embeddings), "--codes", "64"]
    done = subprocess.run(
        [*command, "--out", str(embeddings.parent / "a.json"), "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["items"] == 200
