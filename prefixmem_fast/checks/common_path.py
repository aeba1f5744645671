"""What a launch does on uniform codes: the assumptions of the timeline and of the model that the code does not show.

A load or store whose mask is off for every lane takes no time. Where that is the rule for a kernel, it stands here by
the name of the kernel's argument; all else is walked straight through. A kernel that is not named here has no masks
off; its largest loop takes BLOCK turns, or E where there are fewer entries, if it has such a constant, else one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from .sass import Loop, Program
from .timeline import Accesses

Constants = Mapping[str, Any]  # a kernel's compile-time constants
Share = tuple[float, float]  # from, to: of a pointer's loads, and of its stores, in the order of the code


@dataclass(frozen=True)
class CommonPath:
    kernels: str  # pattern of names
    why: str
    masked: Callable[[Constants], Mapping[str, Share]]  # by pattern of pointer names
    from_dram: Mapping[str, float] = field(default_factory=dict)  # of a pointer's loads, the share of bytes
    turns: Callable[[Constants], int] | None = None  # of its largest loop, from constants and sizes of the launch
    working: float = 1.0  # share of the programs that go this way; the others find nothing to do and end


ALL = (0.0, 1.0)


def _nothing(constants: Constants) -> Mapping[str, Share]:
    return {}


def _once(constants: Constants) -> int:
    return 1


def _turns_of_merge(constants: Constants) -> int:
    """The list of shared slots is taken BM at a time by the programs of the grid."""
    return math.ceil(_shared(constants["S"]) / (constants["programs"] * constants["BM"])) if "S" in constants else 1


def _shared(slots: int) -> float:
    """Of 16 slots a SID 12 claim rows, 2 M a table: shared by chance, or by a bit of the filter. Order 1 always is."""
    sids = slots / 16
    by_chance, by_a_bit = 1 - math.exp(-sids / 2_000_000), 1 / 43
    return 12 * sids * (by_chance + by_a_bit) + 4 * min(sids, 2048)


PATHS = (
    CommonPath(
        "sum_prefixes*",
        "orders 2 and up end with each SID, order 1 goes on; no row is shared; no run is cut by a block's edge",
        lambda c: {"p_aside": ALL, "p_edges": ALL},
    ),
    CommonPath(
        "sum_edges*",
        "order 1 alone goes over a block's edge and is put aside; it ends in the first quarter of the blocks that are "
        "added at once; the programs of the three other orders end after their first loads",
        lambda c: {"destination.*": ALL},
        from_dram={"p_edges": 1 / 4},
        turns=_once,
        working=1 / 4,
    ),
    CommonPath(
        "sum_rows*",
        "no two entries share a row over a block's edge",
        lambda c: {"p_edge_*": ALL},
    ),
    CommonPath(
        "merge_rows*",
        "as many slots are shared as chance and the filter's bits have it with 2 M rows a table, and those of order 1; "
        "no row has more than two, and the first of two adds both",
        lambda c: {"p_aside": (1 / 2, 1), "p_heads": (1 / 2, 1), "p_links": (1 / 2, 1), "p_targets": (2 / 3, 1)},
        from_dram={"p_aside": 1 / 2},
        turns=_turns_of_merge,
    ),
    CommonPath(
        "prefix_memory_fwd*",
        "the rows of order 1 are in L2, as 2048 codes have few",
        _nothing,
        from_dram={"p_weight": 3 / 4, "p_scales": 3 / 4},
    ),
    CommonPath(
        "token_memory_fwd*",
        "every token belongs to a SID of 5 codes; what its levels read again is in L1, and the rows of order 1 in L2",
        _nothing,
        from_dram={"p_weight": 3 / 4 / 5, "p_scales": 3 / 4 / 5},
    ),
)


def common_path(kernel: str) -> CommonPath | None:
    """A kernel's path, or None: straight through."""
    return next((path for path in PATHS if fnmatch(kernel, path.kernels)), None)


def accesses_on(
    path: CommonPath | None, program: Program, pointers: Mapping[int, str | None], constants: Constants
) -> Accesses:
    """A program's accesses with the masks of a path."""
    if path is None:
        return Accesses(pointers)
    shares = {
        k: share
        for k, name in pointers.items()
        for pattern, share in path.from_dram.items()
        if name is not None and fnmatch(name, pattern)
    }
    return Accesses(pointers, _chosen(path.masked(constants), program, pointers), shares)


def _chosen(shares: Mapping[str, Share], program: Program, pointers: Mapping[int, str | None]) -> frozenset[int]:
    """Of each pointer that fits a pattern, a share of its loads, and as large a share of its stores."""
    chosen: set[int] = set()
    for name in {name for name in pointers.values() if name is not None}:
        share = _share_of(name, shares)
        if share is None:
            continue
        for loads in (True, False):
            of = [k for k in pointers if pointers[k] == name and program.instructions[k].loads_global == loads]
            chosen.update(of[round(share[0] * len(of)) : round(share[1] * len(of))])
    return frozenset(chosen)


def _share_of(name: str, shares: Mapping[str, Share]) -> Share | None:
    """Of a name `a|b`, the share that both have."""
    found = {
        next((share for pattern, share in shares.items() if fnmatch(one, pattern)), None) for one in name.split("|")
    }
    return found.pop() if len(found) == 1 else None


def turns_of(path: CommonPath | None, program: Program, constants: Constants) -> dict[Loop, int]:
    """How often a program runs the body of its largest loop; the others run once a time that they are met.

    `constants` may hold what a launch is given too: E entries, S slots, and how many `programs` there are.
    """
    main = program.main_loop
    if main is None:
        return {}
    if path is not None and path.turns is not None:
        return {main: path.turns(constants)}
    block = constants.get("BLOCK", 1)
    return {main: min(block, constants.get("E", block))}
