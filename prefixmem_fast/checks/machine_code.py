"""Compile every kernel for GPUs that are not here, and read registers, spills and access widths from the machine code.

The functions of the triton backend run on meta tensors, so what is compiled is what a real launch would compile: the
argument types, the alignment and the block sizes are theirs. A stand-in driver names the target and launches nothing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from .._choices import DTYPES, MODES, TARGETS
from .._dtypes import accumulator
from .._triton import TRITON_PROBLEM, interpreting
from ..addressing import AddressSpec, TokenStream
from ..operation import BackendError
from ..operation.backends import functions_of
from ..operation.interface import PrefixState
from ..operation.rules import RULES, Hyper, RowUpdate

_DTYPES = {name: getattr(torch, name) for name in DTYPES}
WIDTH = 64  # the paper: d_mem = 256 over 4 heads


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled for one target. Widths are bytes a thread moves in one instruction, with their counts.

    Of two `sum_prefixes` or `sum_rows` of one launcher the first reads gradients, the second the partial sums of the
    first.
    """

    launcher: str
    kernel: str
    mode: str
    dtype: str
    target: str
    registers: int
    spills: int  # instructions on sm, vector registers on gfx
    local_bytes: int  # stack or scratch a thread
    shared_bytes: int
    loads: dict[int, int]
    stores: dict[int, int]
    reductions: dict[int, int]

    @property
    def clean(self) -> bool:
        return self.spills == 0 and self.local_bytes == 0


def paper_spec(mode: str = "prefix") -> AddressSpec:
    """The paper's default shape: L = 5, K = 2048, N = H = 4, T = 2M, memory read at prefix lengths 3 and 4."""
    return AddressSpec((2048,) * 5, mode=mode, active_levels=(3, 4))


def problem() -> str | None:
    """Why nothing can be compiled here, or None."""
    if interpreting():
        return "TRITON_INTERPRET=1 is set, so Triton interprets and does not compile; unset it"
    return TRITON_PROBLEM


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


def launches(spec: AddressSpec, dtype: torch.dtype, width: int, sids: int = 65_536) -> dict[str, Callable[[], Any]]:
    """Every kernel as a call of its launcher on meta tensors; the gradients that sort launch several kernels."""
    triton = functions_of("triton")

    def meta(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    codes = meta(sids, spec.levels)
    ids, segments = meta(8, sids), meta(8, sids)
    table = meta(150_000, 2, dtype=torch.int32)
    weight = meta(spec.total_rows, width, dtype=dtype)
    grad = meta(sids, len(spec.active_levels), spec.heads * width, dtype=dtype)
    token_grad = meta(8, sids, spec.heads * width, dtype=dtype)
    wide = accumulator(dtype)

    def update_of(rule: str) -> RowUpdate:
        state = [
            meta(*(weight.shape if kind == "element" else weight.shape[:1]), dtype=wide)
            for kind in RULES[rule].state.values()
        ]
        hyper = Hyper(0.1, 0.0, 1e-8, 0.9, 0.999)
        return RowUpdate(weight, rule, state, meta(), hyper, 0 if dtype == torch.bfloat16 else None)

    sparse = torch.sparse_coo_tensor(
        meta(1, sids), meta(sids, width, dtype=dtype), weight.shape, device="meta", check_invariants=False
    )
    stream = TokenStream(ids, table, segments)
    state = PrefixState(meta(1, 256, spec.levels), meta(1, 256), meta(256, spec.heads, width, dtype=wide))
    return {
        "prefix_memory_fwd": lambda: triton.forward(codes, weight, spec),
        "token_memory_fwd": lambda: triton.forward(stream, weight, spec),
        "prefix_memory_bwd": lambda: triton.dense_gradient(grad, codes, spec),
        "token_memory_bwd": lambda: triton.dense_gradient(token_grad, stream, spec),
        "prefix_rows": lambda: triton.prefix_rows(codes, spec),
        "token_step": lambda: triton.decoding_step(meta(256), table, state, weight, spec),
        "deterministic_bwd": lambda: triton.dense_gradient(grad, codes, spec, deterministic=True),
        "deterministic_token_bwd": lambda: triton.dense_gradient(token_grad, stream, spec, deterministic=True),
        "sparse_bwd": lambda: triton.row_sums(grad, codes, spec, dtype),
        "sparse_update": lambda: triton.sparse_update(sparse, update_of("row_adagrad")),
        **{f"{rule}_bwd": partial(triton.fused_update, grad, codes, spec, update_of(rule)) for rule in RULES},
    }


def _chosen(mode: str, dtype: str, launcher: str) -> bool:
    """Whether `compile_all` takes a launcher."""
    if launcher not in {name for names in _SORTING.values() for name in names}:
        return True
    return launcher in (_SORTING[dtype] if mode == "prefix" else ("row_adagrad_bwd",))


def compile_all(targets: tuple[str, ...] = TARGETS, dtypes: tuple[str, ...] = DTYPES) -> Iterator[Compiled]:
    """Compile every kernel for every target and dtype at the paper's default shape, and the other modes in bfloat16.

    A kernel that several launchers share is reported once.

    Raises:
        BackendError: nothing can be compiled here, or a disassembler is missing.
        ValueError: a target or dtype is unknown.
    """
    reason = problem()
    if reason is not None:
        raise BackendError(f"the kernels cannot be compiled: {reason}")
    for name, given, known in (("target", targets, TARGETS), ("dtype", dtypes, DTYPES)):
        unknown = [value for value in given if value not in known]
        if unknown:
            raise ValueError(f"{name} = {unknown[0]!r} is unknown; allowed are {', '.join(map(repr, known))}")
    for target in targets:
        met: set[str] = set()
        for dtype in dtypes:
            for mode in MODES if dtype == "bfloat16" else MODES[:1]:
                spec = paper_spec(mode)
                calls = launches(spec, _DTYPES[dtype], WIDTH)
                for launcher, call in calls.items():
                    if not _chosen(mode, dtype, launcher):
                        continue
                    for kernel in compiled_by(call, target):
                        if kernel.hash in met:
                            continue
                        met.add(kernel.hash)
                        yield _inspect(kernel, launcher, mode, dtype, target)


def compiled_by(call: Callable[[], Any], target: str) -> list[Any]:
    """The kernels that a launcher compiles for a target, as Triton's CompiledKernel, in the order of their launch."""
    from triton.runtime.jit import JITFunction

    from .._launch import Launcher

    seen: list[Any] = []
    run = JITFunction.run

    def recording_run(self, *args, **kwargs):
        kernel = run(self, *args, **kwargs)
        if kernel not in seen:
            seen.append(kernel)
        return kernel

    watched = mock.patch.object(JITFunction, "run", recording_run), mock.patch.object(Launcher, "remembers", False)
    with stand_in_driver(target), watched[0], watched[1]:
        call()
    return seen


@contextmanager
def stand_in_driver(target: str, *, module: Any = None) -> Iterator[None]:
    """Triton's driver names `target`; kernels are compiled for it, and each launch returns at once.

    Args:
        module: what stands for a loaded binary. With None each launch loads it anew; anything else must not outlive
            this driver, since Triton unloads it with the kernel.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    if target.startswith("sm_"):
        gpu = GPUTarget("cuda", int(target[3:]), 32)
    else:
        gpu = GPUTarget("hip", target, 64)
    properties = {"max_shared_mem": 1 << 20, "multiprocessor_count": 132}
    stand_in = SimpleNamespace(
        get_current_device=lambda: target,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: gpu,
        launcher_cls=lambda src, metadata: lambda *args, **kwargs: None,
        utils=SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=lambda name, binary, shared, device: (module, 1, 0, 0, 1024),
            unload_module=lambda module: None,
        ),
    )
    slot = "_active" if hasattr(driver, "_active") else "active"  # triton 3.4 keeps a lazy proxy in `active`
    active = getattr(driver, slot)
    driver.set_active(stand_in)
    try:
        yield
    finally:
        setattr(driver, slot, active)


def _inspect(kernel: Any, launcher: str, mode: str, dtype: str, target: str) -> Compiled:
    read = _read_sass if target.startswith("sm_") else _read_gcn
    name = kernel.metadata.name.removesuffix("_kernel")
    return Compiled(launcher, name, mode, dtype, target, shared_bytes=kernel.metadata.shared, **read(kernel))


_SASS_WIDTH = re.compile(r"\.(U8|S8|U16|S16|64|128|256)\b")
_SASS_ACCESS = re.compile(r"\b(LDG|STG|REDG?|ATOMG|LDL|STL)(?![A-Z])((?:\.[A-Za-z0-9_]+)*)")


def _read_sass(kernel: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", cubin)
        sass = _run("nvdisasm", "-c", "-ndf", cubin)
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK", "LOCAL"))
    accesses = _SASS_ACCESS.findall(sass)
    return {
        "registers": registers,
        "spills": sum(op in ("LDL", "STL") for op, _ in accesses),
        "local_bytes": stack + local,
        **_widths((op, _sass_bytes(suffix)) for op, suffix in accesses),
    }


def _sass_bytes(suffix: str) -> int:
    lanes = re.search(r"F32x(\d)", suffix)
    if lanes:
        return 4 * int(lanes.group(1))
    if ".F64" in suffix:
        return 8
    width = _SASS_WIDTH.search(suffix + " ")
    if width is None:
        return 4
    return {"U8": 1, "S8": 1, "U16": 2, "S16": 2}.get(width.group(1)) or int(width.group(1)) // 8


_GCN_ACCESS = re.compile(r"\b(?:global|buffer|flat)_(load|store|atomic_[a-z_]*add)_([a-z0-9_]+)")


def _read_gcn(kernel: Any) -> dict[str, Any]:
    text = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", text).group(1))

    return {
        "registers": field("vgpr_count"),
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


def _run(tool: str, *arguments: Any) -> str:
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    path = str(bundled) if bundled.exists() else shutil.which(tool)
    if path is None:
        raise BackendError(f"{tool} is neither in triton's package nor on the PATH; install the CUDA toolkit's tools")
    done = subprocess.run([path, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
