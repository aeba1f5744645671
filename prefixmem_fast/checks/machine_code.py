"""Compile every kernel for GPUs that are not here, and read from the machine code what decides its speed.

Registers, spills and access widths for every architecture; for NVIDIA's also what `schedule.py` tells.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from .._choices import DTYPES, MODES, QUANTIZATIONS, TARGETS
from ..operation import BackendError
from .launches import (
    CROSS_ITEM,
    WIDTH,
    Launch,
    compiled_by,
    launches,
    paper_spec,
    problem,
    record,
    sids_of,
    stand_in_driver,
)
from .pointers import Pointers
from .sass import Program, parse
from .schedule import Analysed, Schedule

__all__ = [
    "WIDTH",
    "Compiled",
    "analysed",
    "compile_all",
    "compiled_by",
    "launches",
    "paper_spec",
    "problem",
    "stand_in_driver",
]

SIDS = 65_536  # of the launches that are compiled
_DTYPES = {name: getattr(torch, name) for name in DTYPES}


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled for one target. Widths are bytes a thread moves in one instruction, with their counts.

    Of two kernels of one name the first is launched first. What is None is not known for the architecture.
    """

    launcher: str
    kernel: str
    mode: str
    dtype: str
    target: str
    warps: int  # a program
    registers: int
    resident_warps: int | None  # that registers, shared memory and warps let a multiprocessor hold
    spills: int  # instructions on sm, vector registers on gfx
    local_bytes: int  # stack or scratch a thread
    shared_bytes: int
    loads: dict[int, int]
    stores: dict[int, int]
    reductions: dict[int, int]
    instructions_a_sid: float | None = None  # of warps, on the common path, all turns and the code around them
    row_bytes_in_flight: int | None = None  # a multiprocessor, at the first wait for a row
    schedule: Schedule | None = None

    @property
    def clean(self) -> bool:
        """Whether it keeps to its registers. ptxas may set a few bytes of stack aside that no instruction touches."""
        return self.spills == 0 and (self.target.startswith("sm_") or self.local_bytes == 0)


# Gradients that sort, by dtype in prefix mode: each destination and update once, the largest where sums are wide. They
# take a compiler many seconds each.
_SORTING = {
    "bfloat16": (
        "deterministic_token_bwd",
        "sparse_bwd",
        "sgd_bwd",
        "row_adagrad_bwd",
        "row_adam_bwd",
        "lazy_adam_bwd",
    ),
    "float32": ("deterministic_bwd", "row_adagrad_bwd"),
    "float16": ("deterministic_bwd",),
    "float64": ("lazy_adam_bwd",),
}


def _chosen(mode: str, dtype: str, launcher: str) -> bool:
    """Whether `compile_all` takes a launcher."""
    if launcher.startswith(QUANTIZATIONS):
        return mode == "prefix"
    if launcher not in {name for names in _SORTING.values() for name in names}:
        return True
    return launcher in (_SORTING[dtype] if mode == "prefix" else ("row_adagrad_bwd",))


def compile_all(
    targets: tuple[str, ...] = TARGETS, dtypes: tuple[str, ...] = DTYPES, launchers: tuple[str, ...] | None = None
) -> Iterator[Compiled]:
    """Compile every kernel for every target and dtype at the paper's default shape, and the other modes and cross-item
    orders in bfloat16.

    Kernels over quantized tables are taken in prefix mode, with S in each dtype that it can have.

    A kernel that several launchers share is reported once. With `launchers`, theirs alone, in prefix mode.

    Raises:
        BackendError: nothing can be compiled here, or a disassembler is missing.
        ValueError: a target or dtype is unknown.
    """
    reason = problem()
    if reason is not None:
        raise BackendError(f"the kernels cannot be compiled: {reason}")
    every = tuple(launches(paper_spec(), torch.bfloat16, WIDTH))
    chosen = (("target", targets, TARGETS), ("dtype", dtypes, DTYPES), ("launcher", launchers or (), every))
    for name, given, known in chosen:
        unknown = [value for value in given if value not in known]
        if unknown:
            raise ValueError(f"{name} = {unknown[0]!r} is unknown; allowed are {', '.join(map(repr, known))}")
    for target in targets:
        met: set[str] = set()
        for dtype in dtypes:
            for mode in (*MODES, CROSS_ITEM) if dtype == "bfloat16" and launchers is None else MODES[:1]:
                spec = paper_spec(mode)
                calls = launches(spec, _DTYPES[dtype], WIDTH)
                for launcher, call in calls.items():
                    if launcher not in launchers if launchers else not _chosen(mode, dtype, launcher):
                        continue
                    for launch in record(call, target):
                        if not isinstance(launch, Launch) or launch.compiled.hash in met:
                            continue
                        met.add(launch.compiled.hash)
                        sids = sids_of(launcher, spec, SIDS)
                        yield inspect(launch.compiled, launcher, mode, dtype, target, launch, sids)


def inspect(
    kernel: Any,
    launcher: str,
    mode: str,
    dtype: str,
    target: str,
    launch: Launch | None = None,
    sids: int | None = None,
) -> Compiled:
    """Read one kernel; with a launch and the SIDs that its programs share, instructions a SID as well."""
    name = kernel.metadata.name.removesuffix("_kernel")
    row = partial(Compiled, launcher, name, mode, dtype, target, kernel.metadata.num_warps)
    shared = kernel.metadata.shared
    if not target.startswith("sm_"):
        registers, read = _read_gcn(kernel)
        return row(registers, None, shared_bytes=shared, **read)
    registers, read, program = _read_sass(kernel)
    found = analysed(kernel, program)
    schedule = found.schedule(launch.sizes if launch else None)
    cost = found.cost(target, registers, shared, kernel.metadata.num_warps, launch.sizes if launch else None)
    warps, instructions = cost.resident * cost.warps, cost.warps * cost.instructions
    return row(
        registers,
        warps,
        shared_bytes=shared,
        **read,
        instructions_a_sid=round(launch.programs * instructions / sids, 1) if launch and sids else None,
        row_bytes_in_flight=warps * schedule.row_bytes_in_flight,
        schedule=schedule,
    )


def analysed(kernel: Any, program: Program | None = None) -> Analysed:
    """A compiled kernel's machine code, on its common path."""
    program = program or parse(_disassembled(kernel))
    names = kernel.src.fn.arg_names
    constants = {names[place[0]]: value for place, value in kernel.src.constants.items() if len(place) == 1}
    name = kernel.metadata.name.removesuffix("_kernel")
    return Analysed(program, Pointers(kernel.asm["ptx"], kernel.src.signature), name, constants)


def registers_of(kernel: Any) -> int:
    return _usage(kernel)["REG"]


def _read_sass(kernel: Any) -> tuple[int, dict[str, Any], Program]:
    usage, program = _usage(kernel), parse(_disassembled(kernel))
    return (
        usage["REG"],
        {
            "spills": sum(i.name in ("LDL", "STL") for i in program.instructions),
            "local_bytes": usage["STACK"] + usage["LOCAL"],
            **_widths((i.name, i.bytes_a_thread) for i in program.instructions),
        },
        program,
    )


def _usage(kernel: Any) -> dict[str, int]:
    text = _on_cubin(kernel.asm["cubin"], "cuobjdump", "-res-usage")
    return {key: int(re.search(rf"{key}:(\d+)", text).group(1)) for key in ("REG", "STACK", "LOCAL")}


def _disassembled(kernel: Any) -> str:
    return _on_cubin(kernel.asm["cubin"], "nvdisasm", "-c", "-ndf", "-hex", "-gi")


_GCN_ACCESS = re.compile(r"\b(?:global|buffer|flat)_(load|store|atomic_[a-z_]*add)_([a-z0-9_]+)")


def _read_gcn(kernel: Any) -> tuple[int, dict[str, Any]]:
    text = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", text).group(1))

    return field("vgpr_count"), {
        "spills": field("vgpr_spill_count"),  # scalar registers spill into lanes of vector ones, not into memory
        "local_bytes": field("private_segment_fixed_size"),
        **_widths((op.split("_")[0], _gcn_bytes(suffix)) for op, suffix in _GCN_ACCESS.findall(text)),
    }


def _gcn_bytes(suffix: str) -> int:
    words = re.match(r"dwordx(\d)", suffix)
    if words:
        return 4 * int(words.group(1))
    for key, size in (("dword", 4), ("f64", 8), ("x2", 8), ("ubyte", 1), ("sbyte", 1), ("byte", 1), ("short", 2)):
        if key in suffix:
            return size
    return 4


def _widths(accesses: Iterable[tuple[str, int]]) -> dict[str, dict[int, int]]:
    """How many instructions of each kind move how many bytes a thread; other instructions are left out."""
    kinds = {"loads": ("LDG", "load"), "stores": ("STG", "store"), "reductions": ("RED", "REDG", "ATOMG", "atomic")}
    accesses = list(accesses)
    return {
        kind: dict(sorted(Counter(size for op, size in accesses if op in names).items()))
        for kind, names in kinds.items()
    }


@lru_cache(maxsize=64)  # the model asks again for what the report has read
def _on_cubin(code: bytes, tool: str, *arguments: str) -> str:
    """What one of NVIDIA's tools prints about a kernel's binary."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    path = str(bundled) if bundled.exists() else shutil.which(tool)
    if path is None:
        raise BackendError(f"{tool} is neither in triton's package nor on the PATH; install the CUDA toolkit's tools")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(code)
        done = subprocess.run([path, *arguments, str(cubin)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
