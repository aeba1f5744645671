"""What a benchmark is, and how one is run.

A benchmark is a function that sets up one workload on one device and returns a `Case`: who takes part, one step of it,
what a right result is, and the fewest bytes that the step moves. Times, memory, launches and the check all use that one
set-up.

Contenders take turns, a step each, in one order and then in the other, so that what else the machine does falls on all
of them. Slow ones leave the turns once they have had their share of time. One whose result is wrong gets no time, and
one that is not installed or does not fit into memory is named with the reason.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import machine
from .measure import Clock, Mark, peak_bytes, quantiles, reset_peak, unmarked
from .rows import Row, describe
from .workloads import Floor

SPREAD = 0.2  # (p80 - p20) / p50 above which a row says so
MOST_TURNS = 100


@dataclass(frozen=True)
class Contender:
    """One line of the table.

    Attributes:
        make: gives the object that `Case.step` and `Case.check` take; None where it cannot run here.
        missing: why it cannot.
        needs: bytes that it takes beside its inputs.
    """

    name: str
    make: Callable[[], Any] | None
    missing: str | None = None
    needs: int = 0


@dataclass
class Case:
    """One workload, set up.

    Attributes:
        step: takes a made contender, the number of the turn, and `mark`, which ends a phase.
        check: why a made contender's result is wrong, or None; runs once, before the first step.
        floors: by phase or total, the fewest bytes.
        totals: metrics that are sums of phases.
        alone: work of one contender's step to be timed apart: name -> function without arguments.
        held: bytes that a contender holds between steps, for memory.
        steps: how many steps of the thing measured one turn takes.
        least_turns: how many each contender gets, whatever they take.
    """

    contenders: list[Contender]
    step: Callable[[Any, int, Mark], None]
    check: Callable[[Any], str | None]
    floors: dict[str, Floor] = field(default_factory=dict)
    totals: dict[str, tuple[str, ...]] = field(default_factory=dict)
    alone: Callable[[Any], dict[str, Callable[[], None]]] = lambda one: {}
    held: Callable[[Any], int] | None = None
    steps: int = 1
    least_turns: int = 3


LEARNING = {"step": ("forward", "backward", "update")}


def learning(batches: list[torch.Tensor]) -> Callable[[Any, int, Mark], None]:
    """`Case.step` of things with `loss(batch)` and `update()`; LEARNING is its total."""

    def step(one: Any, turn: int, mark: Mark) -> None:
        loss = one.loss(batches[turn % len(batches)])
        mark("forward")
        loss.backward()
        mark("backward")
        one.update()
        mark("update")

    return step


@dataclass(frozen=True)
class Benchmark:
    """A registered benchmark.

    Attributes:
        workloads: those of a device, by importance; of the first, memory and launches are counted too.
        quick: one tiny workload, to see that everything runs.
    """

    name: str
    summary: str
    set_up: Callable[..., Case]
    workloads: Callable[[str], list[dict[str, Any]]]
    quick: dict[str, Any]


BENCHMARKS: dict[str, Benchmark] = {}


def benchmark(workloads: Callable[[str], list[dict[str, Any]]], quick: dict[str, Any]) -> Callable:
    """Register a function ``(device, **workload) -> Case`` under its name, with its docstring as the summary."""

    def register(set_up: Callable[..., Case]) -> Callable[..., Case]:
        name, summary = set_up.__name__.replace("_", "-"), set_up.__doc__.strip().splitlines()[0]
        BENCHMARKS[name] = Benchmark(name, summary, set_up, workloads, quick)
        return set_up

    return register


def plan(names: list[str], device: str, quick: bool) -> list[tuple[Benchmark, dict[str, Any], int]]:
    """(benchmark, workload, `audit` of `run`): the first workload of each benchmark, then the second of each, ..."""
    chosen = [BENCHMARKS[name] for name in names]
    lists = [[one.quick] if quick else one.workloads(device) for one in chosen]
    turns = itertools.zip_longest(*lists)
    return [
        (one, workload, (1 if quick else 100) * (i == 0))
        for i, turn in enumerate(turns)
        for one, workload in zip(chosen, turn, strict=True)
        if workload is not None
    ]


def run(
    one: Benchmark, workload: dict[str, Any], clock: Clock, ceilings: dict[str, float], *, seconds: float = 1.0,
    audit: int = 0, state: machine.DeviceState | None = None,
) -> Iterator[Row]:  # fmt: skip
    """Rows of one workload.

    Args:
        ceilings: "copy_bytes_per_second" and "matrix_flops_per_second" of this run.
        seconds: a contender's share of time; each gets at least `Case.least_turns`.
        audit: for how many contenders memory and launches are counted too.
        state: of the GPU, read while it works.
    """
    base = {"benchmark": one.name, "workload": workload}
    try:
        case = one.set_up(clock.device, **workload)
    except ImportError as error:
        yield {**base, "provider": "every provider", "skipped": f"not installed: {error}; pip install '.[train]'"}
        return
    except torch.OutOfMemoryError as error:
        yield {**base, "provider": "every provider", "skipped": _out_of_memory(error)}
        return
    measured = []
    for row in _measure(case, clock, ceilings, seconds, audit, state, describe(workload)):
        if row.get("metric") and row["provider"] not in measured:
            measured.append(row["provider"])
        yield {**base, **row}
    held, case = case.held, None  # its memory goes back before that of others is measured
    gc.collect()
    if held and audit and clock.device == "cpu":
        names = measured[:audit]
        with ThreadPoolExecutor(2) as two:  # at a time: it is no time that is measured
            for name, peak in zip(names, two.map(partial(_memory_apart, one, workload), names), strict=True):
                yield {**base, "provider": name, **_COUNTED, **peak}


_COUNTED = {"repeats": 1, "remarks": [], "state": {}}


@dataclass
class _Made:
    """A contender that takes part: the phases of its timed steps, the seconds it has had, and how it failed."""

    name: str
    thing: Any
    check_seconds: float
    times: list[dict[str, float]] = field(default_factory=list)
    alone: dict[str, Callable[[], None]] = field(default_factory=dict)
    spent: float = 0.0
    failure: str | None = None


def _measure(
    case: Case, clock: Clock, ceilings: dict[str, float], seconds: float, audit: int,
    state: machine.DeviceState | None, title: str,
) -> Iterator[Row]:  # fmt: skip
    """Check, time and, on a GPU, count; rows without benchmark and workload."""
    made: list[_Made] = []
    for contender in case.contenders:
        found = _make(contender, case, clock.device)
        if isinstance(found, str):
            yield {"provider": contender.name, "skipped": found}
        else:
            made.append(found)
    if state:
        state.take()
    _take_turns(case, made, clock, seconds, title)
    found = state.take() if state else {}
    for i, one in enumerate(made):
        if one.failure:
            yield {"provider": one.name, "skipped": one.failure}
            continue
        for metric, values in _with_totals(one.times, case.totals).items():
            row = {"provider": one.name, "metric": metric, "unit": "ms", "repeats": len(values)}
            row |= {name: 1e3 * value / case.steps for name, value in quantiles(values).items()}
            if metric in case.floors:
                row["floor"] = _floor(case.floors[metric], row["p50"] / 1e3, ceilings["copy_bytes_per_second"])
            yield {**row, "remarks": _remarks(row, found), "state": found}
        if i < audit and clock.device == "cuda":
            try:
                counts = [_launches(case, one.thing), *([_memory_on_device(case, one.thing)] if case.held else [])]
            except Exception as error:
                yield {"provider": one.name, "skipped": f"counts: {_failure(error)}"}
                continue
            for count in counts:
                yield {"provider": one.name, **_COUNTED, **count}


def _make(contender: Contender, case: Case, device: str) -> _Made | str:
    """The contender, checked; or why it gets no time."""
    if contender.make is None:
        return contender.missing
    left = free_bytes(device)
    if contender.needs > left:
        wanted, left = contender.needs / 2**30, left / 2**30
        return f"left out: it takes {wanted:.1f} GiB, and {left:.1f} GiB are free beside the others"
    try:
        thing = contender.make()
        began = time.perf_counter()
        wrong = case.check(thing)
    except Exception as error:  # one's failure must not end the run
        return _failure(error)
    return f"WRONG: {wrong}; not timed" if wrong else _Made(contender.name, thing, time.perf_counter() - began)


def _failure(error: Exception) -> str:
    """Why a contender has no time; what may be a fault is shown whole on the way."""
    if isinstance(error, torch.OutOfMemoryError):
        return _out_of_memory(error)
    text = " ".join(str(error).split())[:200]
    if isinstance(error, NotImplementedError):  # such as a dtype that a library has no kernel for on this device
        return f"not implemented there: {text}"
    traceback.print_exception(error)
    return f"FAILED: {type(error).__name__}: {text}"


def _out_of_memory(error: Exception) -> str:
    return f"left out: {str(error).splitlines()[0]}"


def free_bytes(device: str) -> int:
    """Memory that another contender may take."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - (1 << 30)
    facts = Path("/proc/meminfo")
    for line in facts.read_text().splitlines() if facts.exists() else ():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024 - (2 << 30)
    return machine.memory() // 2


def _take_turns(case: Case, made: list[_Made], clock: Clock, seconds: float, title: str) -> None:
    """A step each in turns, until each has had its share of time."""
    progress = tqdm(total=MOST_TURNS, desc=title, leave=False, disable=None)
    for turn in range(-1, MOST_TURNS):
        waiting = [
            one for one in (made if turn % 2 == 0 else made[::-1])
            if not one.failure and (one.spent < seconds or len(one.times) < case.least_turns)
        ]  # fmt: skip
        if not waiting:
            break
        for one in waiting:
            # The check was a first warm-up; turn -1 is another, for those whose steps are short.
            if turn >= 0 or one.check_seconds < 2:
                _take_turn(case, one, turn, clock)
        progress.update(turn >= 0)
    progress.close()


def _take_turn(case: Case, one: _Made, turn: int, clock: Clock) -> None:
    began = time.perf_counter()
    try:
        if turn == 0:
            one.alone = case.alone(one.thing)
        phases = clock.time(lambda mark: case.step(one.thing, turn, mark), (one.name, ""))
        for part, work in one.alone.items():
            timed = clock.time(lambda mark: (work(), mark("alone")), (one.name, part))  # noqa: B023
            phases[f"{part} alone"] = timed["alone"]
    except Exception as error:
        one.failure, one.thing, one.alone = _failure(error), None, {}
        gc.collect()
        return
    if turn >= 0:
        one.times.append(phases)
        one.spent += time.perf_counter() - began


def _with_totals(times: list[dict[str, float]], totals: dict[str, tuple[str, ...]]) -> dict[str, list[float]]:
    found = {phase: [one[phase] for one in times] for phase in times[0]}
    for metric, phases in totals.items():
        found[metric] = [sum(one.get(phase, 0.0) for phase in phases) for one in times]
    return found


def _floor(floor: Floor, seconds: float, bandwidth: float) -> dict[str, float]:
    percent = [100 * size / bandwidth / seconds for size in floor]
    return {
        "distinct_bytes": floor.distinct, "algorithmic_bytes": floor.algorithmic,
        "percent_distinct": round(percent[0], 2), "percent_algorithmic": round(percent[1], 2),
    }  # fmt: skip


def _remarks(row: Row, state: dict[str, Any]) -> list[str]:
    remarks = [f"clocks were held down by {machine.SLOWED[reason]}" for reason in state.get("slowed_by", ())]
    if state.get("problem"):
        remarks.append(state["problem"])
    spread = (row["p80"] - row["p20"]) / row["p50"] if row["p50"] else 0.0
    if spread > SPREAD:
        remarks.append(f"times spread by {spread:.0%} of the median, above {SPREAD:.0%}")
    return remarks


def _same(value: float) -> dict[str, float]:
    return dict.fromkeys(("p50", "p20", "p80"), value)


def _launches(case: Case, thing: Any) -> Row:
    """Kernels that one step launches, copies and fills not counted."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        case.step(thing, 0, unmarked)
        torch.cuda.synchronize()
    kernels = [
        event for event in found.events()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]  # fmt: skip
    count = sum(not event.name.startswith(("Memcpy", "Memset")) for event in kernels) / case.steps
    return {"metric": "launches", "unit": "launches", **_same(count)}


def _memory_on_device(case: Case, thing: Any) -> Row:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.step(thing, 0, unmarked)
    torch.cuda.synchronize()
    held = case.held(thing)
    return _memory_row(held + torch.cuda.max_memory_allocated() - before, held)


def _memory_apart(one: Benchmark, workload: dict[str, Any], name: str) -> Row:
    """On a CPU: in a process of its own, over what libraries and inputs took."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.benchmarks"])  # imported once, then forked
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_memory_here, one.name, workload, name, torch.get_num_threads()).result()


def _memory_here(name: str, workload: dict[str, Any], contender: str, threads: int) -> Row:
    from . import benchmarks  # noqa: F401  registers them in the new process

    torch.set_num_threads(threads)
    one = BENCHMARKS[name]
    for given in (one.quick, workload):  # a tiny one loads every library before memory is counted
        case = one.set_up("cpu", **given)
        make = next(c.make for c in case.contenders if c.name == contender)
        gc.collect()
        before = reset_peak()
        thing = make()
        for turn in range(2):  # the second has the optimizer's state from its beginning
            case.step(thing, turn, unmarked)
    return _memory_row(peak_bytes() - before, case.held(thing))


def _memory_row(peak: int, held: int) -> Row:
    return {"metric": "peak memory", "unit": "MiB", **_same(round(peak / 2**20, 1)), "held_mib": round(held / 2**20, 1)}
