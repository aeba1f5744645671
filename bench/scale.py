"""What a catalogue costs in rows, bytes and devices; rates come from measured rows alone.

The formulas are those of prefixmem_fast/distributed/capacity.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefixmem_fast.distributed.capacity import CatalogueSize, size_text, where

from .report import markdown
from .rows import Row, hardware, latest, read_rows


def add_arguments(option: Callable) -> None:
    option("--items", type=float, default=1e9, help="of the catalogue (default: %(default)g)")
    option("--codes", type=int, default=2048, help="K, of each level (default: %(default)s)")
    sizes = [2e6, 5e6, 5e7, 2.5e8, 1e9]
    option("--table-rows", type=float, nargs="+", default=sizes, help="T, to compare")
    option("--rows", type=Path, nargs="*", default=[], help="files of rows whose steps are set beside it")


def run(options: argparse.Namespace) -> int:
    for name in ("items", "codes"):
        if not getattr(options, name) >= 1:
            raise ValueError(f"--{name} {getattr(options, name)} is below 1")
    if not all(size >= 1 for size in options.table_rows):
        raise ValueError(f"--table-rows {options.table_rows} holds a number below 1")
    catalogue = CatalogueSize(options.items, options.codes)
    measured = [row for path in options.rows for row in measured_steps(path)]
    if options.json:
        print(json.dumps(as_row(catalogue, options.table_rows)))
    else:
        print(tables(catalogue, options.table_rows, measured))
    return 0


def tables(catalogue: CatalogueSize, sizes: list[float], measured: list[Row]) -> str:
    """The page's tables, in Markdown."""
    counts = [[f"{n}", f"{p:,.0f}", f"{catalogue.codes**n:,}"] for n, p in enumerate(catalogue.prefixes(), 1)]
    lines = []
    rows = catalogue.exact_rows()
    size = catalogue.bytes(rows)
    lines.append(["a row each", f"{rows:,.0f}", size_text(size), "1", "0", "0", where(size)])
    for size in sizes:
        rows = catalogue.hashed_rows(size)
        in_a_head, in_all = catalogue.shared(size)
        total, load = catalogue.bytes(rows), catalogue.prefixes()[-1] / size
        cells = [f"{rows:,.0f}", size_text(total), f"{load:.3g}", f"{in_a_head:.1%}", f"{in_all:.2%}", where(total)]
        lines.append([f"T = {size:,.0f}", *cells])
    traffic = [
        ["forward, rows alone", f"{catalogue.read_bytes():,}"],
        ["forward, gradient and update", f"{catalogue.trained_bytes():,}"],
    ]
    text = [
        markdown(["order", "distinct prefixes", "possible"], counts),
        markdown(
            ["tables", "rows", "bytes", "prefixes a row", "shared in a head", "no row of its own", "fits into"], lines
        ),
        markdown(["bytes a SID", ""], traffic),
    ]
    if rates := [_rate(row) for row in measured]:
        text.append(
            markdown(
                ["measured", "workload", "ms a step", "20 to 80 %", "million SIDs a second", "GB/s of floor"], rates
            )
        )
    return "\n".join(text)


def as_row(catalogue: CatalogueSize, sizes: list[float]) -> dict[str, Any]:
    rows = {"exact": catalogue.exact_rows(), **{f"{size:.0f}": catalogue.hashed_rows(size) for size in sizes}}
    return {
        "items": catalogue.items,
        "prefixes": catalogue.prefixes(),
        "rows": rows,
        "bytes": {name: catalogue.bytes(count) for name, count in rows.items()},
        "read_bytes_a_sid": catalogue.read_bytes(),
        "trained_bytes_a_sid": catalogue.trained_bytes(),
    }


def measured_steps(path: Path) -> list[Row]:
    """The fused steps of a file of rows over 1,024 SIDs and more, by tables and batch."""
    rows = [
        row
        for row in latest(read_rows(path))
        if row.get("metric") == "step"
        and row["benchmark"].startswith("training")
        and row["provider"] == "prefixmem_fast, fused, row-wise Adagrad"
        and row["workload"]["codes"] == "uniform"
        and row["workload"]["sids"] >= 1024
    ]
    last = {tuple(row["workload"].values()): row for row in rows}  # of two benchmarks that both measured it
    return sorted(last.values(), key=lambda row: (row["workload"]["table_rows"], row["workload"]["sids"]))


def _rate(row: Row) -> list[str]:
    work: dict[str, Any] = row["workload"]
    seconds = row["p50"] / 1e3
    return [
        hardware(row),
        f"T = {work['table_rows']:,}, {work['sids']:,} SIDs, {work['dtype']}",
        f"{row['p50']:,.3g}",
        f"{row['p20']:,.3g} to {row['p80']:,.3g}",
        f"{work['sids'] / seconds / 1e6:.3g}",
        f"{row['floor']['every_read'] / seconds / 1e9:.3g}",
    ]
