"""The figures of a kernel that its instructions, their control bits and the assumed latencies give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .common_path import accesses_on, common_path, turns_of
from .occupancy import resident_programs
from .pointers import Pointers, is_known
from .sass import Program
from .timeline import Accesses, Turn, row_bytes, walk


@dataclass(frozen=True)
class Schedule:
    """Of a turn of the main loop where there is one, else of the program; a warp, on its common path.

    Counts of loads and bytes are facts of the code along this path; cycles and rounds come from assumed latencies.
    """

    path: str | None  # what the common path assumes; None: straight through
    instructions: int  # of the whole program, as it stands there
    program_cycles: int  # of the whole program, all turns
    program_rounds: int
    turn_instructions: int | None  # None without a loop
    cycles: int
    rounds: int
    loads_at_first_wait: int
    rows_at_first_wait: int  # loads of rows in flight at the first wait for one
    row_bytes_in_flight: int  # bytes of these loads
    rows_waited_for_at_once: int  # loads of rows issued and waited for in the same turn
    barriers_in_loops: int
    shared_accesses_in_loops: int
    unknown_pointers: tuple[str, ...]  # of loads, taken for rows


@dataclass(frozen=True)
class Cost:
    """What the model takes of a launch: all turns of a program."""

    cycles: int  # of one warp that has the multiprocessor for itself
    instructions: int  # a warp
    row_bytes: float  # a warp
    warps: int  # a program
    resident: int  # programs a multiprocessor


class Analysed:
    """A kernel's machine code, ready to be walked."""

    def __init__(
        self,
        program: Program,
        pointers: Pointers,
        kernel: str,
        constants: Mapping[str, Any],
    ) -> None:
        self.program, self.constants = program, constants
        self.path = common_path(kernel)
        touched = {k: pointers.of(i) for k, i in enumerate(program.instructions) if i.loads_global or i.stores_global}
        self._walked: dict[tuple, Turn] = {}
        self.accesses: Accesses = accesses_on(self.path, program, touched, constants)

    def _whole(self, sizes: Mapping[str, int]) -> Turn:
        """All turns of a program, walked once for launches of equal turns."""
        turns = turns_of(self.path, self.program, {**self.constants, **sizes})
        key = tuple(turns.items())
        if key not in self._walked:
            self._walked[key] = walk(self.program, self.accesses, turns).whole
        return self._walked[key]

    def schedule(self, sizes: Mapping[str, int] | None = None) -> Schedule:
        """Of a launch with these sizes."""
        program, accesses = self.program, self.accesses
        turn: Turn = walk(program, accesses).steady
        whole = self._whole(sizes or {})
        rows = turn.rows_at_first_wait(accesses)
        loads = [k for k, i in enumerate(program.instructions) if i.loads_global]
        unknown = {str(accesses.pointers[k]) for k in loads if not is_known(accesses.pointers[k])}
        return Schedule(
            path=self.path.why if self.path is not None else None,
            instructions=len(program),
            program_cycles=whole.cycles,
            program_rounds=whole.rounds,
            turn_instructions=turn.instructions if program.main_loop is not None else None,
            cycles=turn.cycles,
            rounds=turn.rounds,
            loads_at_first_wait=turn.loads_at_first_wait,
            rows_at_first_wait=len(rows),
            row_bytes_in_flight=row_bytes(program, rows),
            rows_waited_for_at_once=turn.rows_waited_for_at_once,
            barriers_in_loops=program.in_loops("BAR"),
            shared_accesses_in_loops=program.in_loops("STS", "LDS", "LDSM", "STSM"),
            unknown_pointers=tuple(sorted(unknown)),
        )

    def cost(
        self, target: str, registers: int, shared_bytes: int, warps: int, sizes: Mapping[str, int] | None = None
    ) -> Cost:
        """Of a launch with these sizes."""
        whole = self._whole(sizes or {})
        resident = resident_programs(target, registers, shared_bytes, warps)
        return Cost(whole.cycles, whole.instructions, whole.row_bytes, warps, resident)
