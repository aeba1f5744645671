"""The formulas of the scale page, against small catalogues that are drawn."""

import json

import pytest
import torch

from bench import scale
from bench.cli import main
from bench.rows import append_rows
from prefixmem_fast import AddressSpec, prefix_rows


def test_prefixes_are_those_of_a_drawn_catalogue():
    codes = torch.randint(0, 16, (5000, 4))
    drawn = [len(codes[:, :n].unique(dim=0)) for n in range(1, 5)]
    assert scale.CatalogueSize(5000, codes=16).prefixes() == pytest.approx(drawn, rel=0.02)


def test_rows_of_tables_are_those_of_the_address_spec():
    for table_rows in (300, 5000):
        spec = AddressSpec((16,) * 5, 4, 4, table_rows)
        assert scale.CatalogueSize(5000, codes=16).hashed_rows(table_rows) == spec.total_rows


def test_shared_rows_are_those_of_a_drawn_catalogue():
    spec = AddressSpec((256,) * 4, 4, 2, 4001, addressing="hash")
    codes = torch.randint(0, 256, (3000, 4)).unique(dim=0)
    rows = prefix_rows(codes, spec)[:, 3, 3]  # order 4, [M, H]
    shared = torch.stack([torch.bincount(row)[row] > 1 for row in rows.T], 1).float()
    in_a_head, in_all = scale.CatalogueSize(len(codes), codes=256, heads=2).shared(4001)
    assert float(shared.mean()) == pytest.approx(in_a_head, rel=0.05)
    assert float(shared.prod(1).mean()) == pytest.approx(in_all, rel=0.1)


def test_bytes_of_the_papers_shape():
    """16 rows of 128 bytes; gradient and update: rows and state in and out, S and dS."""
    paper = scale.CatalogueSize(1e9)
    assert paper.read_bytes() == 2048
    assert paper.trained_bytes() == 2048 + 2 * 16 * 132 + 2 * 1024
    assert paper.bytes(1e6) == 132e6


@pytest.mark.parametrize(
    ("size", "place"),
    [
        (50e9, "one GPU of 80 GB"),
        (90e9, "one GPU of 141 GB"),
        (400e9, "8 GPUs of 80 GB, rows divided"),
        (7e11, "8 GPUs of 141 GB, rows divided"),
        (1.5e12, "the memory of one host of 2 TB"),
        (4e12, "3 hosts of 2 TB"),
    ],
)
def test_where_tables_fit(size, place):
    assert scale.where(size) == place


def test_the_command(capsys, tmp_path):
    assert main(["scale", "--items", "1e6", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["items"] == 1e6
    assert row["bytes"]["exact"] == pytest.approx(132 * row["rows"]["exact"])
    measured = {
        "benchmark": "training",
        "provider": "prefixmem_fast, fused, row-wise Adagrad",
        "metric": "step",
        "p50": 100.0,
        "p20": 90.0,
        "p80": 120.0,
        "workload": {"codes": "uniform", "sids": 2000, "table_rows": 500, "dtype": "float32"},
        "floor": {"distinct": 5e8, "every_read": 1e9},
    }
    path = tmp_path / "rows.jsonl"
    append_rows(path, {"run": "1", "machine": {"gpus": [], "cpu": "a CPU", "threads": 2}}, [measured])
    assert main(["scale", "--rows", str(path)]) == 0
    text = capsys.readouterr().out
    assert "| 1e+09" not in text
    assert "| a CPU, 2 threads | T = 500, 2,000 SIDs, float32 |" in text
    assert "0.02 |" in text
