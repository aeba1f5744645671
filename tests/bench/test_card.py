"""`bench gpu` on a device that is only said to be one: its file, its time, its tables, and no GPU at all."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import card, cli
from bench.rows import read_rows
from prefixmem_fast.checks import parity
from tests.bench.cases import SMALL_CACHE

GIB = 1 << 30


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A CPU in place of the GPU, and sizes for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(card, "device", lambda: card.Device("cpu", True, GIB))
    for name, value in {
        "ROWS": (2_000_000, 500),
        "SIDS": 31,
        "MORE_SIDS": (2,),
        "SHARE": 0.01,
        "BATCHES": 2,
        "LARGEST": 31,
    }.items():
        monkeypatch.setattr(card, name, value)
    monkeypatch.setattr(card, "file_name", lambda record: "a-card")
    with SMALL_CACHE:
        yield


def test_one_file_of_rows(small, tmp_path, capsys):
    assert cli.main(["gpu", "--minutes", "2"]) == 0
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("prefixmem-a-card-20")
    assert file.suffix == ".jsonl"
    record = json.loads(file.read_text().splitlines()[0])
    assert set(record) >= {"run", "machine", "versions", "commit", "date", "ceilings"}
    assert {"prefixmem_fast", "torch", "triton", "python"} <= set(record["versions"])
    rows = read_rows(file)
    names = list(dict.fromkeys(row["benchmark"] for row in rows))
    assert names == ["forward-sweep", "training-sweep", "tokens", "decoding", "parity"]
    first, *_, last = [row["workload"] for row in rows]
    assert first == {"codes": "uniform", "sids": 31, "table_rows": 500, "dtype": "bfloat16"}
    assert last["dtype"] == "float32"
    (found,) = [row for row in rows if row["benchmark"] == "parity"]
    assert (found["p50"], found["batches"], found["examples"]) == (0, 2, [])
    assert found["comparisons"] > 50
    text = capsys.readouterr().out
    assert "the paper's tables of 2,000,000 rows do not fit" in text
    assert "parity: 2 batches" in text
    assert "bench/results/community/" in text
    assert file.name in text
    assert len([line for line in text.splitlines() if line.startswith("| forward-sweep")]) == 4


def test_nothing_begins_after_its_minutes(small, tmp_path, capsys):
    assert cli.main(["gpu", "--minutes", "1e-9", "--out", str(tmp_path / "rows.jsonl")]) == 2
    assert not (tmp_path / "rows.jsonl").exists()
    said = capsys.readouterr().err
    assert said.count("left out, as the time is over") == 10
    assert cli.main(["gpu", "--minutes", "0"]) == 2


@pytest.mark.slow
def test_a_mismatch_is_told_and_is_no_success(small, tmp_path, capsys, monkeypatch):
    forward = parity.prefix_memory
    wrong = lambda *given, backend, **more: forward(*given, backend=backend, **more) * (1 + (backend == "cpu"))  # noqa: E731
    monkeypatch.setattr(parity, "prefix_memory", wrong)
    assert cli.main(["gpu", "--minutes", "2", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    (found,) = [row for row in rows if row["benchmark"] == "parity"]
    assert found["p50"] > 0
    assert any("cpu sums" in example for example in found["examples"])


@pytest.mark.slow
def test_a_kernel_that_does_not_compile_leaves_the_other_rows(small, tmp_path, capsys, monkeypatch):
    def broken(*given):
        raise RuntimeError("no such instruction")
        yield

    monkeypatch.setattr(card, "verify_shapes", broken)
    assert cli.main(["gpu", "--minutes", "2", "--out", "rows.jsonl"]) == 1
    (found,) = [row for row in read_rows(tmp_path / "rows.jsonl") if row["benchmark"] == "parity"]
    assert found["skipped"] == "FAILED: RuntimeError: no such instruction"


@pytest.mark.parametrize(
    ("free_gib", "rows"), [(139, 2_000_000), (22, 1_000_000), (14.5, 1_000_000), (7, 500_000), (1, 50_000), (0.5, None)]
)
def test_tables_leave_room_for_their_training(free_gib, rows):
    assert card._table_rows(int(free_gib * GIB)) == rows


@pytest.mark.slow
def test_a_card_without_bfloat16_measures_float16(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(card, "device", lambda: card.Device("cpu", False, GIB))
    assert cli.main(["gpu", "--minutes", "2", "--out", "rows.jsonl"]) == 0
    rows = read_rows(tmp_path / "rows.jsonl")
    assert {row["workload"].get("dtype") for row in rows} == {"float16", "float32", None}
    assert {row["workload"].get("shape") for row in rows} == {"float32", None}
    assert "this GPU has no bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_which_cards_have_bfloat16(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(card, "free_bytes", lambda kind: GIB)
    assert card.device() == card.Device("cuda", expected, GIB)


@pytest.mark.slow
def test_without_a_gpu_it_is_one_line():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    root = Path(__file__).parents[2]
    for module in ("bench", "prefixmem_fast.cli bench"):
        command = [sys.executable, "-m", *module.split(), "gpu"]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert "torch finds no GPU" in done.stderr
        assert done.stderr.count("\n") == 1


def test_the_shown_defaults_are_those_that_are_taken():
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    assert parser.parse_args(["gpu"]).minutes == 3
