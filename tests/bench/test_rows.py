"""Files of rows: where they may go, and what is never appended to."""

import json
import os

import pytest

from bench import card
from bench.cli import main
from bench.rows import append_rows, check_out, read_rows

RECORD = {"run": "1", "machine": {}}
ROW = {"benchmark": "a", "workload": {}, "provider": "b"}


def refused(capsys, arguments, *words):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    for word in ("--out", "give a new file", *words):
        assert word in error


@pytest.mark.parametrize("command", [["gpu"], ["predicted", "report.json"], ["host"], ["run", "forward", "--quick"]])
def test_it_is_refused_before_anything_is_measured(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(card, "device", lambda: pytest.fail("a GPU is looked for"))
    refused(capsys, [*command, "--out", ""], "is empty, or the folder")
    (tmp_path / "text").write_text("dear diary\n")
    refused(capsys, [*command, "--out", "text"], "--out text is no file of rows", "line 1")
    assert (tmp_path / "text").read_text() == "dear diary\n"


def test_what_is_no_file_of_rows_or_cannot_be_one(tmp_path):
    for name, content in {
        "text": b"dear diary",
        "binary": b"\xff\x00",
        "other": b"[1]\n",
        "deep": b"[" * 100_000,
    }.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for name, words in {
        "": "is a folder",
        "text": "nothing is appended to it",
        "binary": "nothing is appended to it",
        "other": "nothing is appended to it",
        "deep": "nothing is appended to it",
        "pipe": "is a pipe or a device",
        "circle": "is no file's name",
        "x" * 5000: "is no file's name",
        "null\0": "is no file's name",
        "text/rows": "is a file and no folder",
    }.items():
        with pytest.raises(ValueError, match=words) as raised:
            check_out(tmp_path / name)
        assert "--out" in str(raised.value)
        assert "give a new file" in str(raised.value)
    with pytest.raises(ValueError, match="cannot be written"):
        check_out(tmp_path.__class__("/proc/rows"))


def test_new_files_empty_ones_and_rows_are_taken_and_nothing_is_made(tmp_path):
    check_out(tmp_path / "deep" / "er" / "rows.jsonl")
    check_out(tmp_path.__class__(os.devnull))
    assert not list(tmp_path.iterdir())
    out = tmp_path / "rows.jsonl"
    out.touch()
    check_out(out)
    append_rows(out, RECORD, [ROW])
    check_out(out)
    assert len(read_rows(out)) == 1


def test_a_link_to_what_is_yet_to_be_made(tmp_path):
    out = tmp_path / "link"
    out.symlink_to(tmp_path / "deep" / "rows.jsonl")
    check_out(out)
    append_rows(out, RECORD, [ROW])
    assert len(read_rows(tmp_path / "deep" / "rows.jsonl")) == 1


def test_rows_begin_on_a_line_of_their_own(tmp_path):
    out = tmp_path / "rows.jsonl"
    append_rows(out, RECORD, [ROW])
    out.write_text(out.read_text().rstrip("\n"))
    append_rows(out, RECORD, [ROW])
    assert len(read_rows(out)) == 2
    assert json.loads(out.read_text().splitlines()[0]) == RECORD


def test_minutes_and_a_gpu_that_is_not_there_are_told_by_its_name(capsys, monkeypatch):
    from prefixmem_fast.cli import main as prefixmem

    monkeypatch.setattr(card, "device", lambda: None)
    for value in ("nan", "-1", "0"):
        assert prefixmem(["bench", "gpu", "--minutes", value]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"prefixmem bench gpu: --minutes {float(value)} is not a number above 0; give one")
    assert prefixmem(["bench", "gpu"]) == 2
    assert capsys.readouterr().err.startswith("prefixmem bench gpu: torch finds no GPU")
