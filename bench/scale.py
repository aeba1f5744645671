"""What a catalogue costs in rows, bytes and devices, by formulas; rates come from measured rows alone.

    prefixes of order n    P_n = K^n (1 - exp(-I / K^n))             I items of uniform codes; at most min(K^n, I)
    rows, one each         R   = H * sum_n P_n                       n up to min(N, deepest active level)
    rows of hashed tables  R   = H * sum_n T                         T rows a table
    bytes                  R * (w * b + s)                           w columns of b bytes, s bytes of optimizer state
    prefixes a row         P / T                                     of the last order
    shared in a head       1 - exp(-P / T)                           prefixes whose row there is another's too
    no row of its own      the same to the power of H                heads hash independently
    traffic of a SID       N * H * w * b read, twice that and state to train, A * H * w * b of S and of its gradient

Real codes are not uniform: fewer prefixes are live than this says.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .report import markdown
from .rows import Row, hardware, latest, read_rows

GPU_BYTES = {"80 GB": 80e9, "141 GB": 141e9}
HOST_BYTES, HOST_GPUS = 2e12, 8  # memory of a large host, and its GPUs
ROOM = 0.7  # share of a GPU's memory that tables may take beside a language model


@dataclass(frozen=True)
class Catalogue:
    """A catalogue and the encoder over it, at the paper's widths unless said otherwise."""

    items: float
    codes: int = 2048
    orders: int = 4
    heads: int = 4
    width: int = 64
    row_bytes: int = 2 * 64  # bfloat16
    state_bytes: int = 4  # row-wise Adagrad
    active: int = 2

    def prefixes(self) -> list[float]:
        """Distinct prefixes of each order."""
        return [-(self.codes**n) * math.expm1(-self.items / self.codes**n) for n in range(1, self.orders + 1)]

    def exact_rows(self) -> float:
        return self.heads * sum(self.prefixes())

    def hashed_rows(self, table_rows: float) -> int:
        """An order whose prefixes all fit takes a row each (`addressing="auto"`)."""
        from prefixmem_fast import AddressSpec

        return AddressSpec((self.codes,) * self.orders, self.orders, self.heads, int(table_rows)).total_rows

    def bytes(self, rows: float) -> float:
        return rows * (self.row_bytes + self.state_bytes)

    def shared(self, table_rows: float) -> tuple[float, float]:
        """Share of the prefixes of the last order whose row in one head is another's too, and so in every head."""
        in_a_head = -math.expm1(-self.prefixes()[-1] / table_rows)
        return in_a_head, in_a_head**self.heads

    def read_bytes(self) -> int:
        return self.orders * self.heads * self.row_bytes

    def trained_bytes(self) -> int:
        """Rows and state in and out, S and its gradient."""
        rows = self.orders * self.heads * 2 * (self.row_bytes + self.state_bytes)
        return self.read_bytes() + rows + 2 * self.active * self.heads * self.row_bytes


def where(size: float) -> str:
    """The smallest place that holds so many bytes."""
    for name, room in GPU_BYTES.items():
        if size <= ROOM * room:
            return f"one GPU of {name}"
    for name, room in GPU_BYTES.items():
        if size <= ROOM * room * HOST_GPUS:
            return f"{HOST_GPUS} GPUs of {name}, rows divided"
    if size <= 0.8 * HOST_BYTES:
        return "the memory of one host of 2 TB"
    return f"{math.ceil(size / (0.8 * HOST_BYTES))} hosts of 2 TB"


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
    catalogue = Catalogue(options.items, options.codes)
    measured = [row for path in options.rows for row in measured_steps(path)]
    if options.json:
        print(json.dumps(as_row(catalogue, options.table_rows)))
    else:
        print(tables(catalogue, options.table_rows, measured))
    return 0


def tables(catalogue: Catalogue, sizes: list[float], measured: list[Row]) -> str:
    """The page's tables, in Markdown."""
    counts = [[f"{n}", f"{p:,.0f}", f"{catalogue.codes**n:,}"] for n, p in enumerate(catalogue.prefixes(), 1)]
    lines = []
    rows = catalogue.exact_rows()
    size = catalogue.bytes(rows)
    lines.append(["a row each", f"{rows:,.0f}", _size(size), "1", "0", "0", where(size)])
    for size in sizes:
        rows = catalogue.hashed_rows(size)
        in_a_head, in_all = catalogue.shared(size)
        total, load = catalogue.bytes(rows), catalogue.prefixes()[-1] / size
        cells = [f"{rows:,.0f}", _size(total), f"{load:.3g}", f"{in_a_head:.1%}", f"{in_all:.2%}", where(total)]
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


def as_row(catalogue: Catalogue, sizes: list[float]) -> dict[str, Any]:
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


def _size(size: float) -> str:
    for unit, bytes_each in (("TB", 1e12), ("GB", 1e9)):
        if size >= bytes_each:
            return f"{size / bytes_each:.3g} {unit}"
    return f"{size / 1e6:.3g} MB"
