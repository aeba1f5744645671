"""Figures and limits in docs/benchmarks.md are those that are stored or in force."""

import json
from pathlib import Path

from prefixmem_fast.checks.cases import BATCH_SIZES

ROOT = Path(__file__).parents[2]
PAGE = " ".join((ROOT / "docs" / "benchmarks.md").read_text().split())


def ratios(begins, suffix=False):
    rows = map(json.loads, (ROOT / "bench" / "results" / "traffic.jsonl").read_text().splitlines())
    found = [row["ratio"] for row in rows if row["kernel"].startswith(begins) and ("suffix" in row["kernel"]) == suffix]
    return f"{min(found):.2f}", f"{max(found):.2f}"


def test_the_counts_of_bytes_are_those_that_are_stored():
    least, most = ratios("fused update")
    (in_suffix_mode,) = set(ratios("fused update", suffix=True))
    (_, forward), (_, tokens) = ratios("forward, "), ratios("forward over tokens")
    assert (
        f"forward at most {forward} of its floor, over tokens at most {tokens}, "
        f"a decoding step {ratios('decoding step')[1]}, the fused update without its sorts {least} to {most}, "
        f"in suffix mode {in_suffix_mode} "
    ) in PAGE


def test_what_the_gpu_suite_needs_and_how_large_its_batches_are():
    (needs,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("GPU_NEEDS")]
    assert needs.split(" := ")[1].split(", ") == ["torch", "triton", "pytest", "hypothesis", "tqdm", "numpy"]
    assert "where that python also has triton, pytest, hypothesis, tqdm and numpy" in PAGE
    assert "ends within nine minutes" in PAGE
    assert f"1 to {max(BATCH_SIZES):,} SIDs on a GPU and to 1,000 elsewhere" in PAGE
