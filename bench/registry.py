"""What a benchmark is, and the list of all: files of benchmarks/ add theirs when they are imported.

A benchmark is a function that sets up one workload on one device and returns a `Case`: who takes part, one step, what
a right result is, and the fewest bytes that the step moves. Times, memory, launches and the check use that one set-up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Mark = Callable[[str], None]  # ends a phase of a step: the time since the phase before is its own


def unmarked(phase: str) -> None:
    """The `Mark` of a step that nobody times."""


class Floor(NamedTuple):
    """The fewest bytes of a step: rows that several SIDs share counted once, or once for each SID that reads them."""

    distinct: float
    every_read: float

    def __add__(self, other: Floor) -> Floor:
        return Floor(self.distinct + other.distinct, self.every_read + other.every_read)


@dataclass(frozen=True)
class Contender:
    """One line of the table.

    Attributes:
        make: gives the object that `Case.step` and `Case.check` take; None where it cannot run here.
        missing: why it cannot.
        needs: bytes that it takes beside its inputs.
        warm_up: seconds before its first step that a compiler takes, roughly.
    """

    name: str
    make: Callable[[], Any] | None
    missing: str | None = None
    needs: int = 0
    warm_up: float = 0.0


@dataclass
class Case:
    """One workload, set up.

    Attributes:
        step: takes a contender's object, the number of the turn, and `mark`, which ends a phase.
        check: why the object's result is wrong, or None; runs once, before the first step.
        floors: by phase or total, the fewest bytes.
        totals: metrics that are sums of phases.
        alone: work of one contender's step to be timed apart: name -> function without arguments.
        state_bytes: tables and optimizer state that an object keeps between steps; given where memory is of interest.
        steps: how many steps of the subject one turn takes.
        least_turns: how many each contender gets, whatever they take.
    """

    contenders: list[Contender]
    step: Callable[[Any, int, Mark], None]
    check: Callable[[Any], str | None]
    floors: dict[str, Floor] = field(default_factory=dict)
    totals: dict[str, tuple[str, ...]] = field(default_factory=dict)
    alone: Callable[[Any], dict[str, Callable[[], None]]] = lambda subject: {}
    state_bytes: Callable[[Any], int] | None = None
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
