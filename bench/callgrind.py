"""Instructions and cache misses of one call of the CPU kernels, counted in valgrind: the same on every machine.

The caches are simulated, of a fixed size, and smaller than what a call touches, so that a miss of the last one is a
line of 64 bytes that comes from memory. Prefetches are no reads there. The library is the one that users run, by its
vectors of AVX2 (valgrind knows no AVX-512).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .rows import OURS, Row, append_rows, check_out

SOURCE = Path(__file__).parent / "cpp" / "one_call.cpp"
LINE = 64
CACHES = ("--I1=32768,8,64", "--D1=32768,8,64", "--LL=1048576,16,64")
COUNTED = {
    "forward": ("prefixmem_forward",),
    "step": ("prefixmem_plan", "prefixmem_sum", "prefixmem_free_plan"),
    "window": ("prefixmem_last_tokens",),
}
# Of one_call.cpp, but for the first two, which it is given.
TABLE_ROWS, WIDTH, HEADS, LEVELS, ACTIVE = 20_000, 64, 4, 5, 2
WORKLOADS = [
    {"call": call, "sids": sids, "dtype": dtype, "first_codes": first}
    for call in COUNTED
    for sids, dtype, first in (
        (1024, "float32", 2048),
        (1024, "bfloat16", 2048),
        (4096, "float32", 2048),
        (4096, "float32", 1),
        (1, "float32", 2048),
    )
]


class Counts(NamedTuple):
    """Of one call.

    Attributes:
        instructions: all of them.
        lines: of 64 bytes, that come from memory or are written there without having been read.
        floor: the fewest lines: each row, gradient, sum and state once.
    """

    instructions: int
    lines: int
    floor: float


def problem() -> str | None:
    """Why nothing can be counted here, or None."""
    from prefixmem_fast._native import instruction_sets, native_problem

    if shutil.which("valgrind") is None:
        return "valgrind is not there; install it (Debian: apt install valgrind)"
    return native_problem() or (None if "AVX2" in instruction_sets() else "the counts are those of AVX2")


def build(folder: Path) -> Path:
    """The program that makes one call, linked to the library that is counted."""
    from prefixmem_fast import _native

    library = _native.find_or_build().with_name("avx2.so")
    include = next(path.parent for path in _native.sources() if path.name == "interface.h")
    program = folder / "one_call"
    command = [*_native.compiler(), "-std=c++17", "-O1", "-I", str(include), str(SOURCE), str(library)]
    subprocess.run([*command, f"-Wl,-rpath,{library.parent}", "-o", str(program)], check=True)
    return program


def count(program: Path, call: str, sids: int, dtype: str, first_codes: int) -> Counts:
    """Count one call; see WORKLOADS."""
    itemsize = 4 if dtype == "float32" else 2
    given = [str(value) for value in (sids, TABLE_ROWS, WIDTH, int(dtype == "float32"), first_codes)]
    toggles = [f"--toggle-collect={name}" for name in COUNTED[call]]
    options = ["--tool=callgrind", "--callgrind-out-file=/dev/null", "--cache-sim=yes", "--collect-atstart=no"]
    command = ["valgrind", *options, *CACHES, *toggles, str(program), call, *given]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    collected = [int(value) for value in re.search(r"Collected : ([\d ]+)", text)[1].split()]
    step = [str(program), "step", *given]
    rows = int(subprocess.run(step, capture_output=True, text=True, check=True).stdout.split()[1])
    # S or its gradient; a window has the rows of its last token, at the last active level.
    vectors = sids * HEADS * WIDTH / LINE
    lines_a_row = WIDTH * itemsize / LINE
    if call == "forward":
        floor = rows * lines_a_row + vectors * ACTIVE * itemsize + sids * LEVELS * 8 / LINE
    elif call == "step":
        floor = rows * (lines_a_row + 1) + vectors * ACTIVE * itemsize + sids * LEVELS * 8 / LINE
    else:
        floor = rows * lines_a_row + vectors * itemsize + sids * (LEVELS - 1) * 8 / LINE
    return Counts(collected[0], collected[7] + collected[8], floor)


def add_arguments(option: Callable) -> None:
    option("--out", type=Path, help="file of rows to append to")


def run(options: argparse.Namespace) -> int:
    from .machine import run_record

    if reason := problem():
        raise ValueError(reason)
    if options.out is not None:
        check_out(options.out)
    record = {**run_record(), "ceilings": {}}
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        for workload in WORKLOADS:
            rows = _rows(workload, count(program, **workload))
            if options.out is not None:
                append_rows(options.out, record, rows)
            instructions, lines, floor = (row["p50"] for row in rows)
            if options.json:
                print("\n".join(json.dumps({**record, **row}) for row in rows), flush=True)
            else:
                sids = workload["sids"]
                print(
                    f"{workload['call']:<8}{sids:>6} SIDs, {workload['dtype']}, {workload['first_codes']} first codes: "
                    f"{instructions / sids:,.0f} instructions a SID, {lines / sids:.1f} lines, {lines / floor:.2f} of "
                    "the floor",
                    flush=True,
                )
    print("counted by valgrind's callgrind", file=sys.stderr)
    return 0


def _rows(workload: dict[str, Any], counts: Counts) -> list[Row]:
    common = {"benchmark": "callgrind", "workload": workload, "provider": OURS, "repeats": 1}
    units = {"instructions": "instructions", "lines": "lines", "floor": "lines"}
    return [
        {**common, "metric": name, "unit": units[name], **dict.fromkeys(("p50", "p20", "p80"), value)}
        for name, value in counts._asdict().items()
    ]
