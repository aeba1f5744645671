"""A model of how long an operation takes on a card. Nothing in it is measured.

A launch runs in waves: as many programs at a time as the card's multiprocessors hold. A wave takes as long as the
slowest of three: one warp's way through its code, the issue of all its warps' instructions, and its bytes of DRAM.
Sorts are estimates. The host's time is left out. Trust ratios within 1.3 times, absolute times within 1.5 times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import launches as meta
from .common_path import PATHS, common_path
from .machine_code import analysed, registers_of
from .occupancy import CARDS, Card
from .pointers import POINTERS
from .schedule import Analysed, Cost
from .timeline import L1_HIT, LATENCY, ROUND

SIDS = (1024, 16_384, 65_536, 262_144)
OPERATIONS = {
    "forward": "prefix_memory_fwd",
    "token forward": "token_memory_fwd",
    "backward + update": "row_adagrad_bwd",
}
DTYPE, TARGET = torch.bfloat16, "sm_90"

LAUNCH_US = 3.0  # from the end of a kernel to the first instructions of the next
ROW_EFFICIENCY = 0.9  # of a copy's bandwidth: rows of 128 bytes at random
IDLE_CYCLES = 600  # of a program that finds nothing to do: two loads from L2
ISSUE = 4  # instructions a cycle that a multiprocessor issues
SORT_SMALL, SORT_SMALL_US = 4096, 15.0  # entries that one block sorts
SORT_US, SORT_PASS_US, SORT_BANDWIDTH = 8.0, 5.0, 2000.0  # a sort, the least of a pass over 8 bits of the keys; GB/s


@dataclass(frozen=True)
class Part:
    """A launch of a kernel or an operator of torch."""

    name: str
    programs: int | None
    microseconds: float


@dataclass(frozen=True)
class Prediction:
    operation: str
    card: str
    sids: int
    microseconds: float
    floor_bytes: int  # the fewest bytes of DRAM, without sorts
    share_of_copy: float  # of the bandwidth of a copy, on these bytes
    parts: tuple[Part, ...]


def assumptions() -> dict[str, Any]:
    """All numbers that the timeline and the model take for granted."""
    return {
        "kind": "a model from machine code, not a measurement",
        "trust": "ratios within 1.3 times, absolute times within 1.5 times",
        "latency_cycles": dict(LATENCY),
        "read_so": {kind: ", ".join(pointers) for kind, pointers in POINTERS.items()},
        "l1_hit_cycles": L1_HIT,
        "round_cycles": ROUND,
        "cards": {name: _card(card) for name, card in CARDS.items()},
        "launch_us": LAUNCH_US,
        "rows_reach_of_copy_bandwidth": ROW_EFFICIENCY,
        "instructions_a_cycle_sm": ISSUE,
        "cycles_of_a_program_with_nothing_to_do": IDLE_CYCLES,
        "sort": {
            "up_to_4096_entries_us": SORT_SMALL_US,
            "start_us": SORT_US,
            "least_us_a_pass_of_8_bits": SORT_PASS_US,
            "gb_a_second": SORT_BANDWIDTH,
            "note": "a guess: passes over all bits of the key's dtype, keys and 8 bytes of index read and written",
        },
        "other_operators_of_torch": "a launch, and their bytes at the bandwidth of a copy",
        "workload": "uniform codes, 5 levels of 2048, 4 orders, 4 heads of 64, active levels 3 and 4, bfloat16 tables; "
        "updates: row-wise Adagrad with stochastic rounding",
        "common_paths": {path.kernels: path.why for path in PATHS},
        "loops": "the largest takes BLOCK turns where a kernel is given such a number, E with fewer entries; else one",
        "branches": "forward branches fall through, except around calls, exits and accesses that are all masked off, "
        "and into loops",
        "timeline": "of one warp alone: a lower bound",
        "host": "left out; operators and launches follow one another, launch_us apart",
    }


def _card(card: Card) -> dict[str, float]:
    return {
        "multiprocessors": card.multiprocessors,
        "ghz": card.ghz,
        "gb_a_second": card.bandwidth,
        "copy_gb_a_second": card.copy_bandwidth,
        "bytes_needed_in_flight_sm": need(card),
    }


def need(card: Card) -> int:
    return round(card.bytes_needed_in_flight)


def predict(launchers: tuple[str, ...] | None = None) -> Iterator[Prediction]:
    """Every operation of these launchers, number of SIDs and card; compiles what is not compiled yet."""
    analysis: dict[str, tuple[Analysed, int]] = {}
    for operation, launcher in OPERATIONS.items():
        if launchers is not None and launcher not in launchers:
            continue
        for sids in SIDS:
            events = [
                (event, _cost(event, analysis) if isinstance(event, meta.Launch) else None)
                for event in meta.record(_calls(launcher, sids)[launcher], TARGET)
            ]
            for name, card in CARDS.items():
                parts = tuple(_part(event, cost, card) for event, cost in events)
                total = sum(part.microseconds for part in parts)
                floor = floor_bytes(operation, sids)
                share = floor / total / card.copy_bandwidth / 1e3
                yield Prediction(operation, name, sids, round(total, 1), floor, round(share, 3), parts)


def _calls(launcher: str, sids: int) -> dict[str, Any]:
    spec = meta.paper_spec()
    stream = sids * spec.levels // 8  # tokens in each of the stream's 8 rows, so that it holds as many SIDs
    return meta.launches(spec, DTYPE, meta.WIDTH, stream if "token" in launcher else sids)


def _cost(launch: meta.Launch, analysis: dict[str, tuple[Analysed, int]]) -> Cost:
    kernel = launch.compiled
    if kernel.hash not in analysis:
        analysis[kernel.hash] = analysed(kernel), registers_of(kernel)
    found, registers = analysis[kernel.hash]
    return found.cost(TARGET, registers, kernel.metadata.shared, kernel.metadata.num_warps, launch.sizes)


def floor_bytes(operation: str, sids: int) -> int:
    """The fewest bytes of DRAM of an operation at the paper's shape, where rows that many SIDs share are read once."""
    spec = meta.paper_spec()
    row = meta.WIDTH * DTYPE.itemsize
    rows = sids * spec.heads * (spec.max_order - 1 + min(1.0, spec.codebook_sizes[0] / sids))
    codes, vectors = 8 * spec.levels * sids, row * spec.heads * sids
    if operation == "forward":
        return round(codes + rows * row + len(spec.active_levels) * vectors)
    if operation == "token forward":
        return round(codes + rows * row + spec.levels * vectors)
    states = 4
    listed = 52 * sids  # the sorted order, where prefixes differ, and rows that are compared
    return round(codes + listed + len(spec.active_levels) * vectors + rows * 2 * (row + states))


def _part(event: meta.Launch | meta.Operator, cost: Cost | None, card: Card) -> Part:
    if isinstance(event, meta.Launch):
        path = common_path(event.kernel)
        working = math.ceil(event.programs * path.working) if path else event.programs
        idle = idle_us(card, event.programs - working, cost)
        return Part(event.kernel, event.programs, round(launch_us(card, working, cost) + idle, 1))
    if event.name == "sort":
        return Part(f"sort {event.dtype}", None, round(sort_us(event.entries, event.dtype), 1))
    return Part(f"torch.{event.name}", None, round(LAUNCH_US + event.bytes / card.copy_bandwidth / 1e3, 1))


def launch_us(card: Card, programs: int, cost: Cost) -> float:
    """A launch in waves of programs, and the gap before it."""
    bytes_a_cycle = card.copy_bandwidth * ROW_EFFICIENCY / card.ghz / card.multiprocessors
    places, left, cycles = cost.resident * card.multiprocessors, programs, 0.0
    while left > 0:
        wave = min(left, places)
        warps = wave * cost.warps / card.multiprocessors
        issue = max(warps, cost.warps) * cost.instructions / ISSUE
        memory = warps * cost.row_bytes / bytes_a_cycle
        cycles += max(cost.cycles, issue, memory)
        left -= wave
    return LAUNCH_US + cycles / card.ghz / 1e3


def idle_us(card: Card, programs: int, cost: Cost) -> float:
    """Programs that end after their first loads."""
    waves = math.ceil(programs / (cost.resident * card.multiprocessors))
    return waves * IDLE_CYCLES / card.ghz / 1e3


def sort_us(entries: int, dtype: str) -> float:
    """A guess of torch.sort of integer keys with their indices."""
    if entries <= SORT_SMALL:
        return SORT_SMALL_US
    size = torch.iinfo(getattr(torch, dtype)).bits // 8
    moved = 2 * entries * (size + 8)
    return SORT_US + size * max(SORT_PASS_US, moved / SORT_BANDWIDTH / 1e3)
