"""A few minutes on whatever GPU is there: what a stranger runs, and one file of rows to send in.

Copies, forward, a step of the tables, a token stream and a decoding step, each checked before it is timed, beside the
peers that are installed; then parity of every operation, and more sizes with what is left of the time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prefixmem_fast.checks.parity import verify_shapes

from .clocks import Clock, DeviceClock, HostClock
from .machine import copy_bandwidth, file_name, free_bytes, run_record
from .registry import BENCHMARKS
from .report import markdown
from .rows import (
    OURS,
    Row,
    append_rows,
    by_workload,
    check_out,
    describe,
    floor_percent,
    hardware,
    main_metric,
    short,
)
from .run import run as run_workload

ROWS = (2_000_000, 1_000_000, 500_000, 200_000, 50_000)  # a table; the paper's first
COPIES = 6  # of the tables that training takes at once, with its state
SIDS, MORE_SIDS = 65_536, (4096, 262_144, 256)
SHARE = 0.5  # seconds a provider and workload
PARITY, BATCHES, LARGEST = 0.4, 24, 16_384  # share of the time that is left then, most batches, their most SIDs
SEND = (
    "Send it in by a pull request that adds it to bench/results/community/, or attach it to an issue. It holds "
    "times and how the GPU ran, the names of GPU and CPU, memory, cores, threads, driver, versions, date and commit, "
    "and up to 200 characters of each error; have a look whether those name a folder of yours."
)


class Device(NamedTuple):
    kind: str
    bfloat16: bool
    free_bytes: int


def device() -> Device | None:
    """The GPU, or None; bfloat16 is what its matrix units know, not what is emulated."""
    if not torch.cuda.is_available():
        return None
    bfloat16 = torch.version.hip is not None or torch.cuda.get_device_capability() >= (8, 0)
    return Device("cuda", bfloat16, free_bytes("cuda"))


def run(options: argparse.Namespace) -> int:
    began = time.monotonic()
    if not options.minutes > 0:
        raise ValueError(f"--minutes {options.minutes} is not a number above 0; give one, such as 3")
    if options.out is not None:
        check_out(options.out)
    found = device()
    if found is None:
        raise ValueError("torch finds no GPU; prefixmem bench run measures a CPU")
    dtype, table_rows = ("bfloat16" if found.bfloat16 else "float16"), _table_rows(found.free_bytes)
    if table_rows is None:
        raise ValueError(f"{found.free_bytes / 2**30:.1f} GiB of the GPU's memory are free, too few for any table")
    record = run_record()
    out = options.out or Path(f"prefixmem-{file_name(record)}-{datetime.date.today():%Y%m%d}.jsonl")
    check_out(out)
    record["ceilings"] = {"copy_bytes_per_second": copy_bandwidth(found.kind)}
    print(f"{hardware(record)}: copies move {record['ceilings']['copy_bytes_per_second'] / 1e9:.4g} GB/s", flush=True)
    if not found.bfloat16:
        print("this GPU has no bfloat16: tables are float16 and float32")
    if table_rows < ROWS[0]:
        print(f"the paper's tables of {ROWS[0]:,} rows do not fit beside their training: these have {table_rows:,}")
    clock = DeviceClock() if found.kind == "cuda" else HostClock()
    until, rows = began + 60 * options.minutes, []
    for row in _rows(found, clock, table_rows, dtype, until):
        append_rows(out, record, [row])
        rows.append({**record, **row})
    if not rows:
        raise ValueError(f"--minutes {options.minutes:g} were over before anything was measured")
    if options.json:
        print(json.dumps({"file": str(out), "rows": rows}))
    else:
        print(f"\n{as_table(rows)}")
        for row in rows:
            if row["benchmark"] == "parity":
                told = "{batches} batches, {comparisons} comparisons, {p50} mismatches"
                print(f"parity: {row.get('skipped') or told.format(**row)}")
        print(f"\nRows are in {out}. {SEND}")
    return 1 if any(_failed(row) for row in rows) else 0


def _table_rows(free: int) -> int | None:
    """The most rows a table that leave room for training in half precision."""
    from .benchmarks.workloads import HEADS, ORDERS, WIDTH

    return next((rows for rows in ROWS if COPIES * rows * ORDERS * HEADS * WIDTH * 2 <= free), None)


def _rows(found: Device, clock: Clock, table_rows: int, dtype: str, until: float) -> Iterator[Row]:
    """By importance; nothing begins after `until`."""
    shape = {"codes": "uniform", "sids": SIDS, "table_rows": table_rows, "dtype": dtype}
    first = [("forward-sweep", shape), ("training-sweep", shape), ("tokens", shape)]
    first += [("decoding", {"sequences": 64, "table_rows": table_rows, "dtype": dtype})]
    more = [(name, {**shape, "sids": sids}) for sids in MORE_SIDS for name in ("forward-sweep", "training-sweep")]
    more += [(name, {**shape, "codes": "hot"}) for name in ("forward-sweep", "training-sweep")]
    more += [(name, {**shape, "dtype": "float32"}) for name in ("forward-sweep", "training-sweep")]
    yield from _measured(first, clock, until)
    yield from _parity(found, until)
    yield from _measured(more, clock, until)


def _measured(todo: list[tuple[str, dict[str, Any]]], clock: Clock, until: float) -> Iterator[Row]:
    for name, workload in todo:
        if time.monotonic() > until:
            print(f"left out, as the time is over: {name}, {describe(workload)}", file=sys.stderr)
            continue
        print(f"{name}: {describe(workload)}", file=sys.stderr, flush=True)
        for row in run_workload(BENCHMARKS[name], workload, clock, SHARE, 0, until):
            if "--seconds" not in row.get("skipped", ""):  # no fact of the machine, to be kept
                yield row


def _parity(found: Device, until: float) -> Iterator[Row]:
    """One row: how many results of a fixed shape are not within the bound that their summands give."""
    left = until - time.monotonic()
    if left <= 0:
        return
    name, end = "paper" if found.bfloat16 else "float32", time.monotonic() + PARITY * left
    print(f"parity: {name}", file=sys.stderr, flush=True)
    backend = "triton" if found.kind == "cuda" else "cpu"
    base = {"benchmark": "parity", "workload": {"shape": name}, "provider": OURS}
    try:
        for report in verify_shapes((backend,), (name,), 0, found.kind, BATCHES, LARGEST):  # noqa: B007
            if time.monotonic() > end:
                break
    except Exception as error:  # such as a kernel that does not compile there: the other rows are worth sending
        yield {**base, "skipped": f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        return
    count = len(report.mismatches)
    row = {
        **base,
        "metric": "mismatches",
        "unit": "mismatches",
        "repeats": 1,
        **dict.fromkeys(("p50", "p20", "p80"), count),
    }
    yield {**row, "batches": report.batches, "comparisons": report.comparisons, "examples": report.mismatches[:5]}


def _failed(row: Row) -> bool:
    return row.get("skipped", "").startswith(("WRONG", "FAILED")) or (
        row["benchmark"] == "parity" and row.get("p50", 1) > 0
    )


def as_table(rows: list[Row]) -> str:
    """A line a workload: this package's first contender, its share of a copy, and the fastest of the others."""
    lines = []
    for group in by_workload(row for row in rows if row["benchmark"] != "parity"):
        timed = [row for row in group if row.get("metric") == main_metric(group)]
        ours = next((row for row in timed if row["provider"].startswith(OURS)), None)
        title = f"{group[0]['benchmark']}: {describe(group[0]['workload'])}"
        if ours is None:
            lines.append(
                [title, next((row["skipped"] for row in group if "skipped" in row), "not measured"), "", "", ""]
            )
            continue
        others = sorted((row for row in timed if not row["provider"].startswith(OURS)), key=lambda row: row["p50"])
        share = f"{floor_percent(ours)[0]:.3g}" if "floor" in ours else ""
        best = [short(others[0]["p50"]), others[0]["provider"]] if others else ["", ""]
        lines.append([title, short(ours["p50"]), share, *best])
    return markdown(["", "ms", "% of a copy", "best other, ms", "which"], lines)
