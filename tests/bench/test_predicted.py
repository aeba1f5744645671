"""Measured times beside predicted ones, on a CPU in place of a GPU."""

import json

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
