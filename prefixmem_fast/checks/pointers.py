"""Which argument of a kernel an instruction loads or stores by, and how far away that lies.

In PTX every address leads back, over definitions of registers, to the kernel's parameters. The machine code keeps the
line of source of each PTX instruction, so line and width tell which one a machine instruction was. No text of a
kernel's source is looked at.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from .sass import Instruction

# How a pointer is read; `timeline.py` gives the latencies.
ROWS = "rows"  # rows of the table, their states, gradients and sums: anywhere in DRAM
LINE = "line"  # a look-up in L2; a turn's loads by one such pointer share a line
LOOKUP = "look-up"  # a look-up in L2, each address in a line of its own
TOKENS = "tokens"  # ids and segments of a stream: the first touch of a line is far, the others near; a mean
STREAM = "stream"  # consecutive entries: in L1, or on their way
CACHED = "cached"  # the same bytes again and again: L1
ATOMIC = "an atomic"  # carried out in L2 whatever its address, which may have gone through shared memory

POINTERS = {
    ROWS: (
        "p_weight",
        "p_scales",
        "p_grad",
        "p_total",
        "p_values",
        "p_aside",
        "p_edges",
        "destination.table",
        "destination.first_moment",
        "destination.second_moment",
    ),
    LINE: ("p_codes", "p_targets", "p_level"),
    LOOKUP: ("p_table", "p_ranks", "p_once", "p_twice", "p_heads", "p_links", "p_count", ATOMIC),
    TOKENS: ("p_ids", "p_segments"),
    STREAM: (
        "p_order",
        "p_sids",
        "p_counts",
        "p_rows",
        "p_keys",
        "p_entries",
        "p_shared",
        "p_first",
        "p_n_tokens",
        "p_edge_keys",
    ),
    CACHED: (
        "p_differs",  # a byte an entry
        "destination.step",
        "destination.lr",
    ),
}
_CLASS_OF = {pointer: kind for kind, pointers in POINTERS.items() for pointer in pointers}


def class_of(pointer: str | None) -> str:
    """How a kernel's argument is read. One that is not known counts as rows, the slowest; of `a|b` the slower one."""
    found = {_CLASS_OF.get(name, ROWS) for name in (pointer or "").split("|")}
    return next(kind for kind in POINTERS if kind in found)


def is_known(pointer: str | None) -> bool:
    return pointer is not None and all(name in _CLASS_OF for name in pointer.split("|"))


def parameter_names(signature: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and type of each parameter that a compiled kernel has; fields of a named tuple as `tuple.field`."""
    return [pair for name, kind in signature.items() for pair in _flat(name, kind)]


def _flat(name: str, kind: Any) -> Iterator[tuple[str, str]]:
    if isinstance(kind, tuple):
        fields = getattr(kind, "_fields", range(len(kind)))
        for field, inner in zip(fields, kind, strict=True):
            yield from _flat(f"{name}.{field}", inner)
    elif kind != "constexpr":
        yield name, kind


Place = tuple[str, int]  # file and line


class Pointers:
    """Tells by which parameter an instruction loads or stores, from the PTX that it was compiled from."""

    def __init__(self, ptx: str, signature: dict[str, Any]) -> None:
        names = parameter_names(signature)
        self._names: dict[tuple, set[str]] = defaultdict(set)
        for access in _accesses_of(ptx):
            found = {names[k][0] for k in access.parameters if k < len(names) and names[k][1].startswith("*")}
            for key in _keys(access.operation, access.places, access.width):
                self._names[key] |= found

    def of(self, access: Instruction) -> str | None:
        """The parameter, as `a|b` where the lines leave two possible; None where they leave none."""
        operation = "atom" if access.name.startswith("ATOM") else "ld" if access.loads_global else "st"
        places = tuple((path.rsplit("/", 1)[-1], line) for path, line in access.source[:2])
        for key in _keys(operation, places, access.bytes_a_thread):
            if self._names.get(key):
                return "|".join(sorted(self._names[key]))
        return ATOMIC if operation == "atom" else None


def _keys(operation: str, places: tuple[Place, ...], width: int) -> list[tuple]:
    """What an access is known by, the surest first: the line and the call of its function, the line alone."""
    return [(operation, places, width), (operation, places[:1], width), (operation, places[:1], None)] if places else []


class _Access(NamedTuple):
    operation: str  # "ld", "st" or "atom"
    places: tuple[Place, ...]  # its line, and that of the call that its function was inlined at
    width: int  # bytes a thread
    parameters: set[int]


_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]+)"')
_LOC = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)\s+\d+(?:.*inlined_at\s+(\d+)\s+(\d+))?")
_ACCESS = re.compile(r"\b(ld|st|atom)\.global((?:\.[\w:]+)*)\s[^\[]*\[\s*(%\w+)")
_PARAMETER = re.compile(r"\bld\.param\.\w+\s+(%\w+),\s*\[\w+?_param_(\d+)")
_DEFINITION = re.compile(r"^\s*(?:@!?%\w+\s+)?(?!ld\.)[a-z][\w.:]*\s+(%\w+)\s*,\s*(.*);")
_REGISTER = re.compile(r"%r\w*\d")


def _accesses_of(ptx: str) -> list[_Access]:
    files: dict[str, str] = {}
    defined_by: dict[str, set[str]] = defaultdict(set)
    parameter_of: dict[str, int] = {}
    found = []
    places: tuple[tuple[str, int], ...] = ()
    for text in ptx.splitlines():
        if file := _FILE.match(text):
            files[file.group(1)] = file.group(2).rsplit("/", 1)[-1]
        elif loc := _LOC.match(text):
            places = tuple((loc.group(k), int(loc.group(k + 1))) for k in (1, 3) if loc.group(k))
        elif access := _ACCESS.search(text):
            found.append((access.group(1), places, _ptx_width(access.group(2)), access.group(3)))
        elif parameter := _PARAMETER.search(text):
            parameter_of[parameter.group(1)] = int(parameter.group(2))
        elif definition := _DEFINITION.match(text):
            defined_by[definition.group(1)].update(_REGISTER.findall(definition.group(2)))
    return [
        _Access(
            operation,
            tuple((files.get(file, ""), line) for file, line in places),
            width,
            _behind(address, defined_by, parameter_of),
        )
        for operation, places, width, address in found
    ]


def _ptx_width(modifiers: str) -> int:
    lanes = re.search(r"\.v(\d)", modifiers)
    bits = re.search(r"\.[bfus](\d+)\b", modifiers)
    return (int(lanes.group(1)) if lanes else 1) * (int(bits.group(1)) // 8 if bits else 4)


def _behind(register: str, defined_by: dict[str, set[str]], parameter_of: dict[str, int]) -> set[int]:
    """Parameters that an address is computed from; a value that was loaded leads no further."""
    found, met, left = set(), set(), [register]
    while left:
        name = left.pop()
        if name in met:
            continue
        met.add(name)
        if name in parameter_of:
            found.add(parameter_of[name])
        left.extend(defined_by.get(name, ()))
    return found
