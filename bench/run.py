"""How a benchmark is run: its contenders are checked, timed in turns, and their memory and launches counted.

Contenders take turns, a step each, in one order and then in the other, so that what else the machine does falls on all
of them. Slow ones leave the turns once they have had their share of time. One whose result is wrong gets no time, and
one that is not installed or does not fit into memory is named with the reason.
"""

from __future__ import annotations

import gc
import itertools
import math
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from . import benchmarks  # noqa: F401  registers them, also in the processes that measure memory
from .clocks import Clock
from .machine import free_bytes, peak_bytes, reset_peak
from .registry import BENCHMARKS, Benchmark, Case, Contender, unmarked
from .rows import OURS, Row, describe

MOST_TURNS = 100
OVER = "the seconds of --seconds are over"


Planned = tuple[Benchmark, dict[str, Any], int]  # with the workload and `counted` of `run`


def plan(names: list[str], device: str, quick: bool) -> list[Planned]:
    """The first workload of each benchmark, then the second of each, ..."""
    chosen = [BENCHMARKS[name] for name in names]
    rounds = itertools.zip_longest(*([b.quick] if quick else b.workloads(device) for b in chosen))
    return [
        (benchmark, workload, (1 if quick else 100) * (i == 0))
        for i, workloads in enumerate(rounds)
        for benchmark, workload in zip(chosen, workloads, strict=True)
        if workload is not None
    ]


def run(
    benchmark: Benchmark,
    workload: dict[str, Any],
    clock: Clock,
    seconds: float,
    counted: int = 0,
    until: float | None = None,
    ours: bool = False,
) -> Iterator[Row]:
    """Rows of one workload.

    Args:
        seconds: a contender's share of time; each gets at least `Case.least_turns`.
        counted: for how many contenders memory and launches are counted too.
        until: moment of `time.monotonic` after which nothing new begins; a contender that has had a turn keeps it.
        ours: this package's contenders alone.
    """
    base = {"benchmark": benchmark.name, "workload": workload}
    try:
        case = benchmark.set_up(clock.device, **workload)
    except (ImportError, torch.OutOfMemoryError) as error:
        reason = f"not installed: {error}; pip install '.[train]'"
        if isinstance(error, torch.OutOfMemoryError):
            reason = _failure(error)
        yield {**base, "provider": "every provider", "skipped": reason}
        return
    if ours:
        case.contenders = [contender for contender in case.contenders if contender.name.startswith(OURS)]
    measured = []
    for row in _measure(case, clock, seconds, counted, describe(workload), until):
        if "metric" in row and row["provider"] not in measured:
            measured.append(row["provider"])
        yield {**base, **row}
    has_state, case = case.state_bytes is not None, None  # its memory goes back before that of others is measured
    gc.collect()
    if has_state and clock.device == "cpu":
        took = 5.0  # the next one's memory takes about as long as the last one's
        for name in measured[:counted]:
            began = time.monotonic()
            if _left(until) < took:
                yield {**base, "provider": name, "skipped": f"memory not measured: {OVER}"}
                continue
            yield {**base, "provider": name, **_memory_apart(benchmark.name, workload, name)}
            took = time.monotonic() - began


def _left(until: float | None) -> float:
    """Seconds until a moment."""
    return math.inf if until is None else until - time.monotonic()


@dataclass
class _Entry:
    """A contender that takes part: the phases of its timed steps, the seconds it has had, and how it failed."""

    name: str
    subject: Any
    check_seconds: float
    times: list[dict[str, float]] = field(default_factory=list)
    alone: dict[str, Callable[[], None]] = field(default_factory=dict)
    spent: float = 0.0
    failure: str | None = None


def _measure(case: Case, clock: Clock, seconds: float, counted: int, title: str, until: float | None) -> Iterator[Row]:
    """Check, time and, on a GPU, count; rows without benchmark and workload."""
    entries: list[_Entry] = []
    for contender in case.contenders:
        entry = _no_time(contender, _left(until)) or _enter(contender, case, clock.device)
        if isinstance(entry, str):
            yield {"provider": contender.name, "skipped": entry}
        else:
            entries.append(entry)
    clock.state()  # what came before is not this workload's
    _take_turns(case, entries, clock, seconds, title, until)
    state = clock.state()
    for i, entry in enumerate(entries):
        if entry.failure:
            yield {"provider": entry.name, "skipped": entry.failure}
            continue
        for row in _time_rows(case, entry.times, state):
            yield {"provider": entry.name, **row}
        if i < counted and clock.device == "cuda":
            try:
                for row in _counts_on_device(case, entry.subject):
                    yield {"provider": entry.name, **row}
            except Exception as error:
                yield {"provider": entry.name, "skipped": f"counts: {_failure(error)}"}


def _no_time(contender: Contender, left: float) -> str | None:
    """Why there is no time to begin with a contender."""
    if left <= 0:
        return f"left out: {OVER}"
    if contender.make is not None and contender.warm_up > left:
        return f"left out: it compiles for about {contender.warm_up:.0f} seconds, and --seconds leaves {left:.0f}"
    return None


def _enter(contender: Contender, case: Case, device: str) -> _Entry | str:
    """The contender, checked; or why it gets no time."""
    if contender.make is None:
        return contender.missing
    if contender.needs > (free := free_bytes(device)):
        wanted, free = contender.needs / 2**30, free / 2**30
        return f"left out: it takes {wanted:.1f} GiB, and {free:.1f} GiB are free beside the others"
    try:
        subject = contender.make()
        began = time.perf_counter()
        wrong = case.check(subject)
    except Exception as error:  # one's failure must not end the run
        return _failure(error)
    return f"WRONG: {wrong}; not timed" if wrong else _Entry(contender.name, subject, time.perf_counter() - began)


def _failure(error: Exception) -> str:
    """Why a contender has no time; what may be a fault is shown whole on the way."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"left out: {str(error).splitlines()[0][:200]}"
    text = " ".join(str(error).split())[:200]
    if isinstance(error, NotImplementedError):  # such as a dtype that a library has no kernel for on this device
        return f"not implemented there: {text}"
    traceback.print_exception(error)
    return f"FAILED: {type(error).__name__}: {text}"


def _take_turns(
    case: Case, entries: list[_Entry], clock: Clock, seconds: float, title: str, until: float | None
) -> None:
    """A step each in turns, until each has had its share of time, or there is none left."""
    for turn in tqdm(range(-1, MOST_TURNS), desc=title, leave=False, disable=None):
        waiting = [
            entry
            for entry in entries[:: 1 if turn % 2 == 0 else -1]
            if not entry.failure and (entry.spent < seconds or len(entry.times) < case.least_turns)
        ]
        if not waiting:
            break
        for entry in waiting:
            if _left(until) <= 0:
                break
            # The check was a first warm-up; turn -1 is another, for those whose steps are short.
            if turn >= 0 or entry.check_seconds < 2:
                _take_turn(case, entry, turn, clock)
        if _left(until) <= 0:
            break
    for entry in entries:
        if not entry.times and not entry.failure:
            entry.failure = f"left out: {OVER}"


def _take_turn(case: Case, entry: _Entry, turn: int, clock: Clock) -> None:
    began = time.perf_counter()
    try:
        if turn == 0:
            entry.alone = case.alone(entry.subject)
        phases = clock.time(lambda mark: case.step(entry.subject, turn, mark), (entry.name, ""))
        for name, work in entry.alone.items():
            timed = clock.time(lambda mark: (work(), mark("alone")), (entry.name, name))  # noqa: B023
            phases[f"{name} alone"] = timed["alone"]
    except Exception as error:
        entry.failure, entry.subject, entry.alone = _failure(error), None, {}
        gc.collect()
        return
    if turn >= 0:
        entry.times.append(phases)
        entry.spent += time.perf_counter() - began


def _time_rows(case: Case, times: list[dict[str, float]], state: dict[str, Any]) -> Iterator[Row]:
    values = {phase: [phases[phase] for phases in times] for phase in times[0]}
    for metric, parts in case.totals.items():
        values[metric] = [sum(phases.get(phase, 0.0) for phase in parts) for phases in times]
    for metric, seconds in values.items():
        row = {"metric": metric, "unit": "ms", "repeats": len(seconds)}
        row |= {name: 1e3 * value / case.steps for name, value in quantiles(seconds).items()}
        if metric in case.floors:
            row["floor"] = case.floors[metric]._asdict()
        yield {**row, "state": state} if state else row


def quantiles(values: list[float]) -> dict[str, float]:
    """Median, 20 % and 80 % quantile, within the range of the values."""
    if len(values) == 1:
        return dict.fromkeys(("p50", "p20", "p80"), values[0])
    low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    return {"p50": statistics.median(values), "p20": low, "p80": high}


def _count_row(metric: str, unit: str, value: float, **more: Any) -> Row:
    return {"metric": metric, "unit": unit, "repeats": 1, **dict.fromkeys(("p50", "p20", "p80"), value), **more}


def _counts_on_device(case: Case, subject: Any) -> Iterator[Row]:
    """Kernels that one step launches, copies and fills not counted; and its memory."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        case.step(subject, 0, unmarked)
        torch.cuda.synchronize()
    kernels = [
        event.name
        for event in recorded.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    launches = sum(not name.startswith(("Memcpy", "Memset")) for name in kernels)
    yield _count_row("launches", "launches", launches / case.steps)
    if case.state_bytes:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case.step(subject, 0, unmarked)
        torch.cuda.synchronize()
        state = case.state_bytes(subject)
        yield _memory_row(state + torch.cuda.max_memory_allocated() - before, state)


def _memory_apart(name: str, workload: dict[str, Any], contender: str) -> Row:
    """On a CPU: in a process of its own, over what libraries and inputs took."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once, then forked
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_memory_here, name, workload, contender, torch.get_num_threads()).result()


def _memory_here(name: str, workload: dict[str, Any], contender: str, threads: int) -> Row:
    torch.set_num_threads(threads)
    for given in (BENCHMARKS[name].quick, workload):  # a tiny one loads every library before memory is counted
        case = BENCHMARKS[name].set_up("cpu", **given)
        make = next(c.make for c in case.contenders if c.name == contender)
        gc.collect()
        before = reset_peak()
        subject = make()
        for turn in range(2):  # the second has the optimizer's state from its beginning
            case.step(subject, turn, unmarked)
    return _memory_row(peak_bytes() - before, case.state_bytes(subject))


def _memory_row(peak: int, state: int) -> Row:
    return _count_row("peak memory", "MiB", round(peak / 2**20, 1), state_mib=round(state / 2**20, 1))
