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
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import machine
from .measure import Clock, HostClock, Mark, peak_bytes, quantiles, reset_peak
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
    made: list[tuple[Contender, Any]] = []
    for contender in case.contenders:
        reason, thing = _make(contender, case, clock.device)
        if reason:
            yield {**base, "provider": contender.name, "skipped": reason}
        else:
            made.append((contender, thing))
    if state:
        state.take()
    times, failed = _take_turns(case, made, clock, seconds, describe(workload))
    found = state.take() if state else {}
    for i, (contender, thing) in enumerate(made):
        if contender.name in failed:
            yield {**base, "provider": contender.name, "skipped": failed[contender.name]}
            continue
        for metric, values in _with_totals(times[contender.name], case.totals).items():
            row = {**base, "provider": contender.name, "metric": metric, "unit": "ms", "repeats": len(values)}
            row |= {name: 1e3 * value / case.steps for name, value in quantiles(values).items()}
            if metric in case.floors:
                row["floor"] = _floor(case.floors[metric], row["p50"] / 1e3, ceilings["copy_bytes_per_second"])
            yield {**row, "remarks": _remarks(row, found), "state": found}
        if i < audit and clock.device == "cuda":
            counted = {**base, "provider": contender.name, "repeats": 1, "remarks": [], "state": {}}
            yield {**counted, "metric": "launches", "unit": "launches", **_same(_launches(case, thing))}
            if case.held:
                yield {**counted, **_memory_on_device(case, thing)}
    if audit and clock.device == "cpu" and case.held:
        names = [contender.name for contender, _ in made if contender.name not in failed][:audit]
        made = case = None  # their memory goes back before others are measured
        gc.collect()
        for name in names:
            yield {
                **base,
                "provider": name,
                "repeats": 1,
                "remarks": [],
                "state": {},
                **_memory_apart(one, workload, name),
            }


def _make(contender: Contender, case: Case, device: str) -> tuple[str | None, Any]:
    """(why it gets no time, None) or (None, the thing made)."""
    if contender.make is None:
        return contender.missing, None
    left = free_bytes(device)
    if contender.needs > left:
        wanted, left = contender.needs / 2**30, left / 2**30
        return f"left out: it takes {wanted:.1f} GiB, and {left:.1f} GiB are free beside the others", None
    try:
        thing = contender.make()
        wrong = case.check(thing)
    except torch.OutOfMemoryError as error:
        return f"left out: {str(error).splitlines()[0]}", None
    except Exception as error:  # another library's failure must not end the run
        if contender.name.startswith("prefixmem_fast"):
            raise
        return f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:200]}", None
    return (f"WRONG: {wrong}; not timed", None) if wrong else (None, thing)


def free_bytes(device: str) -> int:
    """Memory that another contender may take."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - (1 << 30)
    facts = Path("/proc/meminfo")
    for line in facts.read_text().splitlines() if facts.exists() else ():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024 - (2 << 30)
    return machine.memory() // 2


def _take_turns(
    case: Case, made: list[tuple[Contender, Any]], clock: Clock, seconds: float, title: str
) -> tuple[dict[str, list[dict[str, float]]], dict[str, str]]:
    """Phases of every timed step by contender; and who failed, why."""
    times: dict[str, list[dict[str, float]]] = {contender.name: [] for contender, _ in made}
    spent = dict.fromkeys(times, 0.0)
    failed: dict[str, str] = {}
    alone = {}
    progress = tqdm(total=MOST_TURNS, desc=title, leave=False, disable=None)
    for turn in range(-1, MOST_TURNS):  # the check was a first warm-up
        order = made if turn % 2 == 0 else made[::-1]
        short = [name for name in times if spent[name] < seconds or len(times[name]) < case.least_turns]
        waiting = [contender for contender, _ in made if contender.name in short and contender.name not in failed]
        if not waiting:
            break
        for contender, thing in order:
            name = contender.name
            if name in failed or contender not in waiting:
                continue
            began = time.perf_counter()
            try:
                phases = _time(clock, lambda mark: case.step(thing, turn, mark), (name, ""))  # noqa: B023
                if turn == -1:
                    alone[name] = case.alone(thing)
                for part, work in alone.get(name, {}).items() if turn >= 0 else ():
                    timed = _time(clock, lambda mark: (work(), mark("alone")), (name, part))  # noqa: B023
                    phases[f"{part} alone"] = timed["alone"]
            except torch.OutOfMemoryError as error:
                failed[name] = f"left out: {str(error).splitlines()[0]}"
                continue
            if turn >= 0:
                times[name].append(phases)
                spent[name] += time.perf_counter() - began
        progress.update(turn >= 0)
    progress.close()
    return times, failed


def _time(clock: Clock, step: Callable[[Mark], Any], key: tuple[str, str]) -> dict[str, float]:
    return clock.time(step) if isinstance(clock, HostClock) else clock.time(step, key)


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


def _launches(case: Case, thing: Any) -> int:
    """Kernels that one step launches, copies and fills not counted."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        case.step(thing, 0, lambda phase: None)
        torch.cuda.synchronize()
    kernels = [event for event in found.events() if event.device_type == DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in kernels) // case.steps


def _memory_on_device(case: Case, thing: Any) -> Row:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.step(thing, 0, lambda phase: None)
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
            case.step(thing, turn, lambda phase: None)
    return _memory_row(peak_bytes() - before, case.held(thing))


def _memory_row(peak: int, held: int) -> Row:
    return {"metric": "peak memory", "unit": "MiB", **_same(round(peak / 2**20, 1)), "held_mib": round(held / 2**20, 1)}
