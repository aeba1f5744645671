"""The C++ kernels of the CPU beside the same rows read by bare loops, the path of PyTorch operators, and peers."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prefixmem_fast import prefix_rows

from ..ceiling import loop_over
from ..registry import Case, Mark, benchmark, unmarked
from .providers import CPU_READERS, CPU_TRAINERS, Ours, Provider
from .tables import QUICK, Grid, _reading, _training
from .workloads import Workload

BUSY = "beside a busy process"
WARM = "warm caches"  # a step right after others like it
COLD = "cold caches"  # as after the rest of a model


def workloads(device: str) -> Grid:
    if device != "cpu":
        return []
    every = os.cpu_count() or 1
    middle = {"codes": "uniform", "sids": 16_384, "table_rows": 200_000, "dtype": "float32", "threads": every}
    changes: Grid = [
        {},
        {"sids": 1024},
        {"sids": 64},
        {"sids": 1},
        {"sids": 65_536},
        {"conditions": BUSY},
        {"threads": 1},
        {"sids": 1024, "threads": 1},
        {"dtype": "bfloat16"},
        {"codes": "zipf 1.05"},
        {"codes": "histories"},
        {"table_rows": 20_000},
        {"table_rows": 2_000_000, "dtype": "bfloat16"},
        {"sids": 16},
        {"sids": 1024, "dtype": "bfloat16"},
        {"sids": 65_536, "dtype": "bfloat16"},
        {"sids": 64, "threads": 1},
        {"sids": 65_536, "threads": 1},
        {"sids": 1024, "conditions": BUSY},
        {"sids": 1, "conditions": WARM},
        {"sids": 64, "conditions": WARM},
        {"sids": 1024, "conditions": WARM},
    ]
    changes = [change for change in changes if every > 1 or "threads" not in change]
    return [{**middle, "conditions": COLD, **change} for change in changes]


_QUICK = {**QUICK, "threads": 1, "conditions": COLD}


@benchmark(workloads, _QUICK)
def cpu_forward(device: str, threads: int, conditions: str, **given: Any) -> Case:
    """S of a batch on the CPU, by any number of threads."""
    workload = Workload(**given)
    with _threads(threads):
        case = _reading(workload, device, CPU_READERS)
    return _conditions(case, workload, threads, conditions, ("read",))


@benchmark(workloads, _QUICK)
def cpu_training(device: str, threads: int, conditions: str, **given: Any) -> Case:
    """A step of the tables on the CPU, forward, gradient and update."""
    workload = Workload(**given)
    with _threads(threads):
        case = _training(workload, device, CPU_TRAINERS)
    return _conditions(case, workload, threads, conditions, ("read", "written"))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _conditions(case: Case, workload: Workload, threads: int, conditions: str, loops: tuple[str, ...]) -> Case:
    """The case by so many threads and in such conditions, with the bare loops of the first contender."""
    if conditions not in (COLD, BUSY, WARM):
        raise ValueError(f"conditions = {conditions!r}; allowed are {COLD}, {BUSY} and {WARM}")
    inner, check = case.step, case.check

    def step(provider: Provider, turn: int, mark: Mark) -> None:
        with _threads(threads):
            if conditions == WARM:
                for _ in range(10):
                    inner(provider, turn, unmarked)
                mark("warm-up")
            inner(provider, turn, mark)

    def checked(provider: Provider) -> str | None:
        with _threads(threads):
            return check(provider)

    def alone(provider: Provider) -> dict[str, Callable[[], None]]:
        if type(provider) not in (CPU_READERS[0], CPU_TRAINERS[0]):
            return {}
        with _threads(threads):
            return bare_loops(provider, workload, loops)

    case = replace(case, step=step, check=checked, alone=alone)
    if conditions == BUSY:
        process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        weakref.finalize(case, process.kill)
    return case


def bare_loops(provider: Ours, workload: Workload, names: tuple[str, ...]) -> dict[str, Callable[[], None]]:
    """Loops over the rows that the first batch reads, once a SID, and over those that a step writes, each once."""
    spec, weight, codes = workload.spec, provider.weight.detach(), workload.batches("cpu")[0]
    read = prefix_rows(codes, spec)[:, spec.active_levels[-1] - 1].flatten()
    read = read[read >= 0].contiguous()
    rows = {"read": read, "written": _once(read)}
    return {f"rows {name}": loop_over(weight, rows[name], name == "written") for name in names}


def _once(rows: Tensor) -> Tensor:
    """The distinct rows in the order in which they first come."""
    _, place = rows.unique(return_inverse=True)
    first = torch.full((int(place.max()) + 1,), len(rows)).scatter_reduce(0, place, torch.arange(len(rows)), "amin")
    return rows[first.sort().values].contiguous()
