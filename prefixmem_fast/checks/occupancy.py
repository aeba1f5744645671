"""How many warps a multiprocessor holds at once, and how many bytes must be in flight on it for full bandwidth."""

from __future__ import annotations

from dataclasses import dataclass

from .timeline import LATENCY, ROWS


@dataclass(frozen=True)
class Multiprocessor:
    """What programs share; the same for every card of an architecture."""

    shared_bytes: int
    registers: int = 65_536
    partitions: int = 4  # a warp lives in one, with its part of the registers
    warps: int = 64
    programs: int = 32


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(164 << 10),
    "sm_90": Multiprocessor(228 << 10),
    "sm_100": Multiprocessor(228 << 10),
}
_RESERVED_SHARED = 1024  # bytes a program that uses shared memory or not
_REGISTER_UNIT = 256  # registers are given to warps in such units


@dataclass(frozen=True)
class Card:
    """Data sheet values, and what a copy is known to reach."""

    target: str
    multiprocessors: int
    ghz: float
    bandwidth: float  # GB/s
    copy_bandwidth: float  # GB/s of reads and writes together

    @property
    def bytes_a_cycle(self) -> float:
        """Of one multiprocessor."""
        return self.bandwidth / self.ghz / self.multiprocessors

    @property
    def bytes_needed_in_flight(self) -> float:
        """Of one multiprocessor, by Little's law at the assumed latency of DRAM."""
        return self.bytes_a_cycle * LATENCY[ROWS]


CARDS = {
    "H100": Card("sm_90", 132, 1.755, 3350, 2900),
    "H200": Card("sm_90", 132, 1.755, 4800, 4200),
}


def resident_programs(target: str, registers: int, shared_bytes: int, warps: int) -> int | None:
    """Programs of `warps` warps that one multiprocessor holds; None for an architecture without these rules."""
    sm = MULTIPROCESSORS.get(target)
    if sm is None:
        return None
    of_a_warp = -(-max(registers, 1) * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = sm.registers // sm.partitions // of_a_warp * sm.partitions // warps
    by_shared = sm.shared_bytes // (shared_bytes + _RESERVED_SHARED)
    return min(by_registers, by_shared, sm.warps // warps, sm.programs)
