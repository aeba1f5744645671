"""One warp's way through a kernel, cycle by cycle, from the control bits of its machine code.

Stall counts and waits are facts of the code. Latencies are assumptions: with them the walk tells how long each wait
takes. It is the time of a warp that has a multiprocessor for itself, and a lower bound of that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .pointers import CACHED, LINE, LOOKUP, ROWS, STREAM, TOKENS, class_of
from .sass import Loop, Program

# Cycles from the issue of a load until its value is there; H100 at 1.755 GHz.
LATENCY = {ROWS: 1100, LINE: 300, LOOKUP: 300, TOKENS: 200, STREAM: 120, CACHED: 40}
L1_HIT = 40  # a later load of a turn from a line that an earlier one has fetched
SHARED, OTHER, OPERANDS_READ = 30, 20, 10  # shared memory and shuffles; other instructions that set a scoreboard
ROUND = 150  # a wait for global loads of at least so many cycles is a dependent round
LANES = 32
_SHARED_NAMES = ("LDS", "LDSM", "SHFL", "LDC", "S2R", "S2UR")
_STEADY_TURNS = 4


@dataclass(frozen=True)
class Accesses:
    """What each load and store of a program touches, by index of the instruction."""

    pointers: Mapping[int, str | None]  # the kernel's argument, None where unknown
    masked: frozenset[int] = frozenset()  # loads and stores whose masks are off for every lane
    from_dram: Mapping[int, float] = field(default_factory=dict)  # of a load of rows, the share of its bytes

    def kind(self, load: int) -> str:
        return class_of(self.pointers.get(load))


@dataclass(frozen=True)
class Wait:
    """A wait on a scoreboard that a global load has set."""

    at: int  # index of the instruction that waits
    cycles: int
    load: int | None  # index of the load that came last; None where something else came last
    in_flight: tuple[int, ...]  # indices of the global loads issued and not waited for until now
    for_rows: bool  # whether a load of rows is among those waited for


@dataclass
class Turn:
    """The program, or one turn of its main loop."""

    cycles: int = 0
    instructions: int = 0
    waits: list[Wait] = field(default_factory=list)
    rows_waited_for_at_once: int = 0  # loads of rows issued and waited for in this turn
    row_bytes: float = 0  # bytes of rows that a warp loads from DRAM, and of anything that it stores

    @property
    def rounds(self) -> int:
        """Waits for global loads that take long enough to be a trip to L2 or DRAM."""
        return sum(wait.cycles >= ROUND and wait.load is not None for wait in self.waits)

    @property
    def loads_at_first_wait(self) -> int:
        """Global loads in flight when the warp first waits for one."""
        return len(self.waits[0].in_flight) if self.waits else 0

    def rows_at_first_wait(self, accesses: Accesses) -> list[int]:
        """Loads of rows in flight, by index, when the warp first waits for one of them."""
        first = next((wait for wait in self.waits if wait.for_rows), None)
        return [k for k in first.in_flight if accesses.kind(k) == ROWS] if first is not None else []


def row_bytes(program: Program, loads: Sequence[int]) -> int:
    """Bytes that a warp moves by these instructions."""
    return sum(LANES * program.instructions[k].bytes_a_thread for k in loads)


@dataclass(frozen=True)
class Walk:
    whole: Turn
    steady: Turn  # the last turn of the main loop; the whole program where it has no loop


def skipped_branches(program: Program, masked: frozenset[int]) -> frozenset[int]:
    """Forward branches that the common path takes; every other one falls through.

    Taken are those around a call (the slow path of a division or a root), around an early exit, and around accesses
    that are all masked off, unless a loop is among what they skip; and those to a loop that is jumped over otherwise.
    """
    taken = set()
    for k, instruction in enumerate(program.instructions):
        target = program.target_of(k)
        if target is None or target <= k or not instruction.conditional or ".DIV" in instruction.opcode:
            continue
        block = range(k + 1, min(target, len(program)))
        if any(loop.first in block for loop in program.loops):
            continue
        inside = [(j, program.instructions[j]) for j in block]
        accessed = [j for j, i in inside if i.loads_global or i.stores_global]
        leaves = any(i.name in ("CALL", "EXIT") and not i.conditional for _, i in inside)
        past = max((program.target_of(j) or 0 for j, i in inside if not i.conditional), default=0)
        misses_loop = any(target <= loop.first < past for loop in program.loops)
        if leaves or misses_loop or (accessed and masked.issuperset(accessed)):
            taken.add(k)
    return frozenset(taken)


def walk(program: Program, accesses: Accesses, turns: Mapping[Loop, int] | None = None) -> Walk:
    """Walk the common path. `turns` gives how often a loop's body runs; the main loop's default is a steady state."""
    return _Walker(program, accesses, turns).run()


class _Walker:
    def __init__(self, program: Program, accesses: Accesses, turns: Mapping[Loop, int] | None) -> None:
        self.program, self.accesses = program, accesses
        self.main = program.main_loop
        given = {self.main: _STEADY_TURNS} if turns is None else turns
        self.turns = {loop.last: (loop, max(given.get(loop, 1), 1)) for loop in program.loops}
        self.taken = skipped_branches(program, accesses.masked)
        self.time = self.turn = 0
        self.pending: dict[int, list[tuple[int, int | None, int]]] = defaultdict(list)  # arrival, load, its turn
        self.arrival: dict[str | None, int] = {}  # of the lines that this turn has asked for, by pointer
        self.whole, self.steady = Turn(), Turn()

    def run(self) -> Walk:
        k, done, steady_from = 0, defaultdict(int), 0
        while k < len(self.program):
            instruction = self.program.instructions[k]
            if self.main is not None and k == self.main.first:
                self.turn += 1
                self.steady, steady_from = Turn(), self.time
                self.arrival.clear()
            self._step(k)
            inside = self.main is not None and k in self.main
            if inside and k == self.main.last:
                self.steady.cycles = self.time - steady_from
            if instruction.name == "EXIT" and not instruction.conditional:
                break
            target = self.program.target_of(k)
            if target is not None and target < k:
                loop, turns = self.turns.get(k, (None, 0))
                done[k] += 1
                if loop is not None and done[k] < turns:
                    k = target
                    continue
                done[k] = 0
            elif target is not None and self._leads_on(k):
                k = target
                continue
            k += 1
        self.whole.cycles = self.time
        return Walk(self.whole, self.steady if self.main is not None else self.whole)

    def _leads_on(self, k: int) -> bool:
        """Whether a forward branch is taken; BRA.DIV is for warps whose lanes part."""
        instruction = self.program.instructions[k]
        return k in self.taken or not (instruction.conditional or ".DIV" in instruction.opcode)

    def _step(self, k: int) -> None:
        instruction = self.program.instructions[k]
        records = [self.whole]
        if self.main is not None and k in self.main:
            records.append(self.steady)
        self._wait(k, self._boards(k), records)
        loads, stores = instruction.loads_global, instruction.stores_global
        runs = k not in self.accesses.masked
        if runs and instruction.sets is not None:
            latency = OTHER
            if loads:
                latency = self._latency(k)
            elif instruction.name in _SHARED_NAMES:
                latency = SHARED
            self.pending[instruction.sets].append((self.time + latency, k if loads else None, self.turn))
        if runs and instruction.sets_when_read is not None:
            self.pending[instruction.sets_when_read].append((self.time + OPERANDS_READ, None, self.turn))
        moved = LANES * instruction.bytes_a_thread if runs and (stores or self._loads_rows(k)) else 0
        for record in records:
            record.instructions += 1
            record.row_bytes += moved * self.accesses.from_dram.get(k, 1)
        self.time += max(instruction.stall, 1)

    def _loads_rows(self, k: int) -> bool:
        return self.program.instructions[k].loads_global and self.accesses.kind(k) == ROWS

    def _boards(self, k: int) -> list[tuple[int, int]]:
        """Scoreboards to wait for, and how many of their results may still be on their way."""
        instruction = self.program.instructions[k]
        boards = [(board, 0) for board in instruction.waits]
        if instruction.name == "DEPBAR" and instruction.operands.startswith("SB"):
            board, _, left = instruction.operands[2:].partition(",")
            boards.append((int(board), int(left.strip() or "0", 0)))
        return boards

    def _wait(self, k: int, boards: list[tuple[int, int]], records: list[Turn]) -> None:
        ready, last, waited = self.time, None, []
        in_flight = tuple(load for queue in self.pending.values() for _, load, _ in queue if load is not None)
        for board, left in boards:
            queue = self.pending[board]
            awaited = queue[: len(queue) - left] if left else queue
            for arrival, load, turn in awaited:
                if arrival > ready:
                    ready, last = arrival, load
                if load is not None:
                    waited.append((load, turn))
            self.pending[board] = queue[len(awaited) :]
        if waited:
            rows = [turn for load, turn in waited if self.accesses.kind(load) == ROWS]
            for record in records:
                record.waits.append(Wait(k, ready - self.time, last, in_flight, bool(rows)))
                record.rows_waited_for_at_once += sum(turn == self.turn for turn in rows)
        self.time = ready

    def _latency(self, k: int) -> int:
        """Cycles of a load; of a line that this turn has asked for already, what is left until it is there."""
        kind = self.accesses.kind(k)
        if kind not in (LINE, STREAM):
            return LATENCY[kind]
        pointer = self.accesses.pointers[k]
        if pointer in self.arrival:
            return max(self.arrival[pointer] - self.time, L1_HIT)
        self.arrival[pointer] = self.time + LATENCY[kind]
        return LATENCY[kind]
