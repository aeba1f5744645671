"""A step of the tables on several processes: bytes that leave a rank, and times, of every layout in one run.

    python -m bench distributed [--ranks 2] [--sids 2048] [--turns 21] [--out rows.jsonl]
    python -m bench distributed --report rows.jsonl

Each rank is a process of one thread over gloo. The layouts are replicate and shard, in float32 and with the gradient
sent in bfloat16, TorchRec row-wise where it is installed, touched rows gathered by every rank, a dense gradient under
DistributedDataParallel, and one process with the batch of all ranks. Their tables are held to those of one process
first. Give it as many cores as ranks that nothing else uses.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..report import markdown
from ..rows import Row, append_rows, by_workload, check_out, describe, latest, read_rows, short

if TYPE_CHECKING:
    from .layouts import Layout, Task

KEYS = (
    *("one-process", "replicate", "replicate-bfloat16", "shard", "shard-bfloat16", "torchrec", "gathered-rows"),
    "dense",
)
TRANSIENT = 4  # copies of the tables that a rank holds while a layout is made and checked


def add_arguments(option: Callable) -> None:
    option("--ranks", type=int, default=2, help="W, processes (default: %(default)s)")
    option("--sids", type=int, default=2048, help="of a rank's batch (default: %(default)s)")
    option("--codes", default="uniform", help="uniform, hot or zipf <exponent> (default: %(default)s)")
    option("--table-rows", type=int, default=200_000, help="T (default: %(default)s)")
    option("--turns", type=int, default=21, help="timed steps of each layout (default: %(default)s)")
    option("--layouts", nargs="+", metavar="layout", default=KEYS, help=f"of {', '.join(KEYS)} (default: all)")
    option("--out", type=Path, help="append a row for each figure to this file")
    option("--report", type=Path, metavar="FILE", help="measure nothing, and print the tables of a file of rows")
    option("--commit", help="name of the library's revision, where it is not a checkout's")


def run(options: argparse.Namespace) -> int:
    if options.report is not None:
        return _report(options)
    for name, least in (("ranks", 2), ("sids", 1), ("table_rows", 1), ("turns", 3)):
        value = getattr(options, name)
        if value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value} is below {least}")
    for name in options.layouts:
        if name not in KEYS:
            raise ValueError(f"--layouts {name}: give some of {', '.join(KEYS)}")
    if options.out is not None:
        check_out(options.out)
    from ..benchmarks.workloads import Workload
    from ..machine import run_record
    from .layouts import LAYOUTS, Task

    if options.codes == "histories":
        raise ValueError("--codes histories has codebooks of its own; give uniform, hot or zipf <exponent>")
    Workload(1, options.codes).batches("cpu")  # raises where the name is unknown
    task = Task(options.ranks, options.sids, options.codes, options.table_rows)
    layouts = [LAYOUTS[name] for name in KEYS if name in options.layouts]
    _check_room(task, layouts)
    record = run_record(options.commit)
    record["machine"]["threads"] = 1
    rows = measure(task, layouts, options.turns)
    if options.out is not None:
        append_rows(options.out, record, rows)
    rows = [{**record, **row} for row in rows]
    print("\n".join(map(json.dumps, rows)) if options.json else page(rows))
    return int(any(row.get("skipped", "").startswith("WRONG") for row in rows))


def measure(task: Task, layouts: Sequence[type[Layout]], turns: int) -> list[Row]:
    """Rows of all layouts, from processes that end before it returns; what one of them raises, it raises."""
    import torch.multiprocessing

    from .ranks import run_rank

    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run_rank, (folder, task, layouts, turns), task.ranks)
        return json.loads(Path(folder, "rows.json").read_text())


def _check_room(task: Task, layouts: Sequence[type[Layout]]) -> None:
    from ..machine import free_bytes

    copies = sum(layout.copies(task.ranks) for layout in layouts) + TRANSIENT * task.ranks
    needed, free = copies * task.workload.table_bytes / 1e9, free_bytes("cpu") / 1e9
    if needed > free:
        raise ValueError(
            f"the layouts take up to {needed:.3g} GB together, and {free:.3g} are free; give fewer --layouts, "
            "--table-rows or --ranks"
        )


def _report(options: argparse.Namespace) -> int:
    rows = latest(read_rows(options.report))
    rows = [row for row in rows if row["benchmark"] == "distributed"]
    if not rows:
        raise ValueError(f"--report {options.report} holds no rows of this benchmark; give a file that --out named")
    print("\n".join(map(json.dumps, rows)) if options.json else "\n".join(map(page, by_workload(rows))))
    return 0


def page(rows: list[Row]) -> str:
    """What was measured and where, and the table."""
    first = rows[0]
    machine = first["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores, one thread a rank, torch {first['versions']['torch']}"
    commit = re.sub("([0-9a-f]{12})[0-9a-f]{28}", r"\1", first["commit"])
    return f"{describe(first['workload'])}\n{where}, commit {commit}, {first['date'][:10]}\n\n{table(rows)}"


def table(rows: list[Row]) -> str:
    """A line a layout: bytes that leave a rank a SID of its own, and the step, of which the slowest rank counts."""
    figures = {(row["provider"], row["metric"]): row for row in rows if "metric" in row}
    names = list(dict.fromkeys(name for name, _ in figures))
    head = ["", "optimizer", "B a SID, counted", "by formula", "on loopback", "ms a step", "20 to 80 %", "x the first"]
    lines = []
    for name in names:
        sent, step, loopback = (figures.get((name, metric)) for metric in ("sent", "step", "loopback"))
        on_loopback = "" if loopback is None else f"{loopback['p50']:,.0f}"
        ratio = step["p50"] / figures[names[0], "step"]["p50"]
        times = [short(step["p50"]), f"{short(step['p20'])} to {short(step['p80'])}", f"{ratio:.2f}"]
        lines.append([name, step["rule"], f"{sent['p50']:,.0f}", f"{sent['formula']:,.0f}", on_loopback, *times])
    notes = [f"\n- {row['provider']}: {row['skipped']}" for row in rows if "skipped" in row]
    return (markdown(head, lines) if lines else "") + "".join(notes)
