"""Measured times beside predicted ones, on a CPU in place of a GPU."""

import json
import os

import pytest

from bench import cli, predicted
from bench.clocks import HostClock
from prefixmem_fast.checks.prediction import OPERATIONS
from tests.bench.cases import SMALL_CACHE


def predictions():
    return [
        {"operation": operation, "card": card, "sids": sids, "microseconds": 10.0, "floor_bytes": 1000, "parts": []}
        for operation in reversed(OPERATIONS)
        for sids in (64, 16)
        for card in ("H100", "H200")
    ]


@SMALL_CACHE
def test_every_prediction_gets_its_measurement(monkeypatch):
    monkeypatch.setattr(predicted, "TURNS", 5)
    rows = list(predicted.compared(predictions(), HostClock(), "NVIDIA H200", rows=500))
    assert [tuple(row["workload"].values()) for row in rows] == [
        (operation, sids) for operation in OPERATIONS for sids in (16, 64)
    ]
    for row in rows:
        assert row["p50"] > 0
        assert row["predicted_ms"] == {"H100": 0.01, "H200": 0.01}
        assert row["of_predicted"] == pytest.approx(row["p50"] / 0.01, abs=1e-3)
    lines = predicted.as_table(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert "predicted for H200" in lines[0]
    (row, *_) = predicted.compared(predictions()[:2], HostClock(), "another card", rows=500)
    assert "of_predicted" not in row


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"predictions": predictions()}))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["predicted", str(report), "--out", str(tmp_path / "rows.jsonl")]) == 2
    assert "torch finds none" in capsys.readouterr().err


def test_a_report_without_predictions_is_bad_input(tmp_path, capsys):
    report = tmp_path / "report.json"
    report.write_text("{}")
    assert cli.main(["predicted", str(report), "--out", str(tmp_path / "rows.jsonl")]) == 2
    assert "holds no predictions" in capsys.readouterr().err


def changed(**values):
    return json.dumps({"predictions": [*predictions(), {**predictions()[0], **values}]}).encode()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not JSON"),
        (b"\xff\x00\x01", "is not JSON"),
        (changed()[:-9], "is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1]", "holds no predictions"),
        (b'[{"a": 1}]', "holds no predictions"),
        (b'{"predictions": []}', "holds no predictions"),
        (b'{"predictions": 5}', "predictions is 5 and no list"),
        (b'{"predictions": [1]}', "prediction 1: 1 is no object"),
        (b'{"predictions": [{"a": 1}]}', "prediction 1: operation is missing"),
        (changed(operation="backward"), "prediction 13: operation is 'backward', and not one of forward"),
        (changed(operation=[]), "operation is []"),
        (changed(card=None), "card is None"),
        (changed(sids=True), "sids is True"),
        (changed(sids=1 << 40), "and not a whole number from 1 to 16,777,216"),
        (changed(microseconds="10"), "microseconds is '10'"),
        (changed(microseconds=0).replace(b'"microseconds": 0,', b'"microseconds": 1e999,'), "microseconds is inf"),
        (changed(microseconds=10**400), "microseconds is 1000"),
        (changed(floor_bytes=-1), "floor_bytes is -1"),
    ],
)
def test_another_file_is_told_before_a_gpu_is_touched(content, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: pytest.fail("a GPU is looked for"))
    (tmp_path / "report.json").write_bytes(content)
    assert_told(tmp_path / "report.json", words, tmp_path, capsys)


def test_what_is_no_regular_file_is_told(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    assert_told(tmp_path / "nothing", "is not there", tmp_path, capsys)
    assert_told(tmp_path / "pipe", "is a folder, a pipe or a device", tmp_path, capsys)
    assert_told(tmp_path / "folder", "is a folder, a pipe or a device", tmp_path, capsys)


def assert_told(report, words, tmp_path, capsys):
    assert cli.main(["predicted", str(report), "--out", str(tmp_path / "rows.jsonl")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert str(report) in error
    assert "give a report as `prefixmem verify --compile" in error
    assert error.count("\n") == 1
