"""NVIDIA machine code as text: instructions with their control bits, source lines and loops.

`nvdisasm -c -ndf -hex -gi` prints two words of 64 bits an instruction. Bits 41 and up of the second are the same from
sm_80 to sm_100: how long issue stalls, which scoreboards the instruction sets, and which it waits for. Issue is in
order, so a wait holds up everything that stands behind it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

_FIRST_WORD = re.compile(r"^\s*/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/")
_SECOND_WORD = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
_SOURCE = re.compile(r'//## File "([^"]+)", line (\d+)')
_LABEL = re.compile(r"^\s*\.(L_\w+):")
_PARTS = re.compile(r"^(@!?U?P[T0-9]+)?\s*(\S+)\s*(.*)$")
_TARGET = re.compile(r"\.(L_\w+)\)")
_WIDTH = re.compile(r"\.(U8|S8|U16|S16|64|128|256)(?![0-9])")
_NO_SCOREBOARD = 7


@dataclass(frozen=True)
class Instruction:
    """One instruction with its control bits."""

    address: int  # bytes from the kernel's start
    predicate: str  # "@P0", "@!P0" or ""
    opcode: str  # with its modifiers
    operands: str
    stall: int  # cycles until the next instruction of the warp issues
    sets: int | None  # scoreboard that is released when the result has arrived
    sets_when_read: int | None  # scoreboard that is released when the operands have been read
    waits: tuple[int, ...]  # scoreboards that must be free before it issues
    source: tuple[tuple[str, int], ...] = ()  # file and line, innermost function first

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def conditional(self) -> bool:
        return self.predicate not in ("", "@PT") or re.match(r"!?U?P\d", self.operands) is not None

    @property
    def loads_global(self) -> bool:
        """Whether it waits for memory's answer: loads, and atomics that return what was there."""
        return self.name in ("LDG", "LDGSTS", "LD", "ATOMG", "ATOM")

    @property
    def stores_global(self) -> bool:
        return self.name in ("STG", "ST")

    @property
    def bytes_a_thread(self) -> int:
        return access_bytes(self.opcode)

    @property
    def target(self) -> str | None:
        found = _TARGET.search(self.operands) if self.name == "BRA" else None
        return found.group(1) if found else None


@dataclass(frozen=True)
class Loop:
    """Instructions `first` to `last`, which branches back."""

    first: int
    last: int

    def __contains__(self, index: int) -> bool:
        return self.first <= index <= self.last


class Program:
    """The instructions of a kernel without padding, and where its labels stand."""

    def __init__(self, instructions: list[Instruction], labels: dict[str, int]) -> None:
        exits = [k for k, i in enumerate(instructions) if i.name == "EXIT"]
        traps = {k for k, i in enumerate(instructions) if i.target is not None and labels.get(i.target) == k}
        end = len(instructions)
        while end > 0 and (instructions[end - 1].name == "NOP" or end - 1 in traps):
            end -= 1
        self.instructions = instructions[: max(end, exits[-1] + 1 if exits else 0)]
        self.labels = labels

    def __len__(self) -> int:
        return len(self.instructions)

    def target_of(self, index: int) -> int | None:
        """Where a branch leads."""
        target = self.instructions[index].target
        return None if target is None else self.labels.get(target)

    @cached_property
    def loops(self) -> list[Loop]:
        """Loops by their branch back, in the order of their ends; an inner loop comes before the one around it."""
        found: dict[int, int] = {}
        for k in range(len(self)):
            target = self.target_of(k)
            if target is not None and target < k:
                found[target] = k  # several branches back to one label are one loop
        return sorted((Loop(first, last) for first, last in found.items()), key=lambda loop: loop.last)

    @property
    def main_loop(self) -> Loop | None:
        """The loop with the most instructions."""
        return max(self.loops, key=lambda loop: loop.last - loop.first, default=None)

    def in_loops(self, *names: str) -> int:
        """How many instructions of these names stand inside a loop."""
        return sum(i.name in names and any(k in loop for loop in self.loops) for k, i in enumerate(self.instructions))


def parse(text: str) -> Program:
    """Read what `nvdisasm -c -ndf -hex -gi` prints for one kernel."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    source: list[tuple[str, int]] = []
    first, source_is_old = None, True
    for line in text.splitlines():
        if place := _SOURCE.search(line):
            if source_is_old:
                source, source_is_old = [], False
            source.append((place.group(1), int(place.group(2))))
        elif label := _LABEL.match(line):
            labels[label.group(1)] = len(instructions)
        elif found := _FIRST_WORD.match(line):
            first = found
        elif first is not None and (second := _SECOND_WORD.match(line)):
            instructions.append(_decode(first, int(second.group(1), 16), tuple(source)))
            first, source_is_old = None, True
    return Program(instructions, labels)


def _decode(first: re.Match, second_word: int, source: tuple[tuple[str, int], ...]) -> Instruction:
    predicate, opcode, operands = _PARTS.match(first.group(2)).groups()
    control = second_word >> 41
    scoreboards = [(control >> shift) & 7 for shift in (5, 8)]
    sets, sets_when_read = (None if value == _NO_SCOREBOARD else value for value in scoreboards)
    waits = tuple(board for board in range(6) if (control >> 11) >> board & 1)
    address = int(first.group(1), 16)
    return Instruction(address, predicate or "", opcode, operands, control & 15, sets, sets_when_read, waits, source)


def access_bytes(modifiers: str) -> int:
    """Bytes a thread of a memory instruction, from its modifiers."""
    lanes = re.search(r"F32x(\d)", modifiers)
    if lanes:
        return 4 * int(lanes.group(1))
    if ".F64" in modifiers:
        return 8
    width = _WIDTH.search(modifiers)
    if width is None:
        return 4
    return {"U8": 1, "S8": 1, "U16": 2, "S16": 2}.get(width.group(1)) or int(width.group(1)) // 8
