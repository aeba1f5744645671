"""What each process does: make a layout, hold it to one process, count its bytes; then all layouts take turns.

The layouts of a turn step in an order drawn anew, the same on every rank, so that what else the machine does, and what
the layout before left in the caches, falls on all alike. A step begins on all ranks together and lasts until the last
one has ended.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..benchmarks.workloads import BATCHES
from ..rows import Row
from ..run import quantiles
from .counting import SentBytes, loopback_bytes
from .layouts import Batches, Layout, Task, expected_tables

STEPS = 2  # that are held to one process
TIMEOUT = timedelta(minutes=10)


def run_rank(rank: int, folder: str, task: Task, layouts: Sequence[type[Layout]], turns: int) -> None:
    """One process; the first one writes the rows to rows.json in the folder."""
    torch.set_num_threads(1)
    if loopback_bytes() is not None:  # elsewhere it has another name
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=task.ranks, timeout=TIMEOUT)
    for name in ("torchrec", "torch.fx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what TorchRec calls
        rows = _rows(rank, task, layouts, turns)
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def _rows(rank: int, task: Task, layouts: Sequence[type[Layout]], turns: int) -> list[Row]:
    batches = Batches.of_all(task)
    own, mean = batches.of_rank(task, rank), batches.mean(task)
    rows, made = [], []
    expected, rule = None, None
    for layout in layouts:
        if reason := layout.missing():
            rows.append({"provider": layout.name, "skipped": reason})
            continue
        if layout.trains_as != rule:
            del expected  # one at a time
            expected, rule = expected_tables(task, mean, layout.trains_as, STEPS), layout.trains_as
        subject = layout(task)
        entry = _Entry(subject, rank == 0 or not layout.alone, mean if layout.alone else own)
        sent = _of_all(entry.train_and_count())
        off = max(
            _of_all(subject.off_by(expected) if entry.takes_part else 0.0), key=lambda off: (math.isnan(off), off)
        )
        if off <= layout.tolerance_of(task.ranks):
            made.append(entry)
            formula = layout.formula(task, batches)
            rows.append({**_named(subject), **_row("sent", "B a SID", [max(sent) / task.sids]), "formula": formula})
        else:
            wrong = f"WRONG: after {STEPS} steps its tables are off from those of one process by up to {off:.3g}"
            rows.append({"provider": layout.name, "skipped": wrong})
    del expected
    _take_turns(made, turns)
    for entry in made:
        rows.append({**_named(entry.subject), **_row("step", "ms", entry.longest())})
        if entry.loopback:
            a_sid = [count / task.ranks / task.sids for count in entry.loopback]
            rows.append({**_named(entry.subject), **_row("loopback", "B a SID", a_sid)})
    return [{"benchmark": "distributed", "workload": task.named(), **row} for row in rows]


@dataclass
class _Entry:
    """A layout, whether this rank takes part in its steps, and with which batches.

    Attributes:
        times: milliseconds of this rank's steps.
        loopback: bytes that all ranks sent in each step.
    """

    subject: Layout
    takes_part: bool
    batches: Batches
    times: list[float] = field(default_factory=list)
    loopback: list[int] = field(default_factory=list)

    def step(self, turn: int) -> None:
        if self.takes_part:
            self.subject.step(self.batches.codes[turn % BATCHES], self.batches.dS)

    def train_and_count(self) -> float:
        """The steps that are held to one process; bytes of the last one, since first steps set things up."""
        for turn in range(STEPS):
            with SentBytes() as sent:
                self.step(turn)
        return sent.total

    def longest(self) -> list[float]:
        """Milliseconds of each step on the rank that took longest."""
        return [max(times) for times in zip(*_of_all(self.times), strict=True)]


def _take_turns(entries: list[_Entry], turns: int) -> None:
    order = list(entries)
    for turn in range(turns):
        random.Random(turn).shuffle(order)
        for entry in order:
            dist.barrier()
            before = loopback_bytes()
            dist.barrier()
            began = time.perf_counter()
            entry.step(turn)
            entry.times.append((time.perf_counter() - began) * 1e3)
            dist.barrier()
            if before is not None:
                entry.loopback.append(loopback_bytes() - before)


def _of_all(value: Any) -> list[Any]:
    found = [value] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _named(subject: Layout) -> Row:
    return {"provider": subject.name, "rule": subject.rule}


def _row(metric: str, unit: str, values: list[float]) -> Row:
    return {"metric": metric, "unit": unit, "repeats": len(values), **quantiles(values)}
