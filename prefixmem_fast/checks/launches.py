"""Launches of every kernel on meta tensors: what is launched is what a real call would launch, and nothing runs.

A stand-in driver names the target. Argument types, alignment, block sizes and grids are those of a real launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .._dtypes import QUANTIZED_DTYPES, SUM_DTYPES, accumulator
from .._triton import TRITON_PROBLEM, interpreting
from ..addressing import AddressSpec, TokenStream
from ..operation.backends import functions_of
from ..operation.interface import QuantizedTable
from ..operation.rules import RULES, Hyper, RowUpdate

WIDTH = 64  # the paper: d_mem = 256 over 4 heads


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    kernel: str
    grid: tuple[int, ...]
    sizes: Mapping[str, int]  # its whole numbers, by name of the argument, and the `programs` of its first dimension
    compiled: Any = None  # Triton's CompiledKernel, where it was asked for

    @property
    def programs(self) -> int:
        programs = 1
        for size in self.grid:
            programs *= size
        return programs


@dataclass(frozen=True)
class Operator:
    """An operator of torch between the launches that reads or writes memory."""

    name: str
    entries: int  # of its largest tensor
    dtype: str  # of its first tensor
    bytes: int  # of all tensors that it takes and returns


CROSS_ITEM = "cross-item"  # what stands for a mode in reports


def paper_spec(mode: str = "prefix") -> AddressSpec:
    """The paper's default shape: L = 5, K = 2048, N = H = 4, T = 2M, memory read at prefix lengths 3 and 4.

    With "cross-item" the orders of the item before, in as large tables, read at all prefix lengths.
    """
    if mode == CROSS_ITEM:
        return AddressSpec.cross_item((2048,) * 5)
    return AddressSpec((2048,) * 5, mode=mode, active_levels=(3, 4))


def problem() -> str | None:
    """Why nothing can be compiled here, or None."""
    if interpreting():
        return "TRITON_INTERPRET=1 is set, so Triton interprets and does not compile; unset it"
    return TRITON_PROBLEM


def launches(spec: AddressSpec, dtype: torch.dtype, width: int, sids: int = 65_536) -> dict[str, Callable[[], Any]]:
    """Every kernel as a call of its launcher on meta tensors; the gradients that sort launch several kernels.

    `dtype` is that of the table, and that of S where the table is quantized.
    """
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
    windows = meta(256, spec.levels + spec.gap), table
    last = meta(256, spec.heads * width, dtype=dtype)
    quantized: dict[str, Callable[[], Any]] = {}
    for kind, values in QUANTIZED_DTYPES.items() if dtype in SUM_DTYPES else ():
        rest = QuantizedTable(meta(*weight.shape, dtype=values), meta(len(weight), dtype=torch.float32)), spec, dtype
        quantized[f"{kind}_prefix_memory_fwd"] = partial(triton.quantized_forward, codes, *rest)
        quantized[f"{kind}_token_memory_fwd"] = partial(triton.quantized_forward, stream, *rest)
        quantized[f"{kind}_window_memory"] = partial(triton.read_windows, *windows, rest[0], spec, last)
    return {
        "prefix_memory_fwd": lambda: triton.forward(codes, weight, spec),
        "token_memory_fwd": lambda: triton.forward(stream, weight, spec),
        "prefix_memory_bwd": lambda: triton.dense_gradient(grad, codes, spec),
        "token_memory_bwd": lambda: triton.dense_gradient(token_grad, stream, spec),
        "prefix_rows": lambda: triton.prefix_rows(codes, spec),
        "window_memory": lambda: triton.read_windows(*windows, weight, spec, last),
        "deterministic_bwd": lambda: triton.dense_gradient(grad, codes, spec, deterministic=True),
        "deterministic_token_bwd": lambda: triton.dense_gradient(token_grad, stream, spec, deterministic=True),
        "sparse_bwd": lambda: triton.row_sums(grad, codes, spec, dtype),
        "sparse_update": lambda: triton.sparse_update(sparse, update_of("row_adagrad")),
        **quantized,
        **{f"{rule}_bwd": partial(triton.fused_update, grad, codes, spec, update_of(rule)) for rule in RULES},
    }


def sids_of(launcher: str, spec: AddressSpec, sids: int) -> int | None:
    """SIDs of a launch of `launches`; None where it is not given SIDs."""
    if launcher == "sparse_update":
        return None
    if launcher.endswith("window_memory"):
        return 256
    return 8 * sids // spec.item_levels if "token" in launcher else sids


def record(call: Callable[[], Any], target: str, compiling: bool = True) -> list[Launch | Operator]:
    """What a launcher launches on a target, in order; its kernels are compiled unless that is not asked for."""
    from triton.runtime.jit import JITFunction

    from .. import _launch

    events: list[Launch | Operator] = []
    run = JITFunction.run

    def recording_run(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=warmup, **kwargs) if compiling else None
        given = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        sizes = {name: value for name, value in given.items() if type(value) is int and name in self.arg_names}
        sizes["programs"] = grid[0]
        events.append(Launch(self.fn.__name__.removesuffix("_kernel"), tuple(grid), sizes, kernel))
        return kernel

    watched = (
        mock.patch.object(JITFunction, "run", recording_run),
        mock.patch.object(_launch.Launch, "remembers", False),
    )
    with stand_in_driver(target), _Operators(events), watched[0], watched[1]:
        call()
    return events


def compiled_by(call: Callable[[], Any], target: str) -> list[Any]:
    """The kernels that a launcher compiles for a target, as Triton's CompiledKernel, in the order of their launch."""
    seen: list[Any] = []
    for event in record(call, target):
        if isinstance(event, Launch) and event.compiled not in seen:
            seen.append(event.compiled)
    return seen


class _Operators(TorchDispatchMode):
    """Records operators of torch on meta tensors that are not views and do more than take memory."""

    def __init__(self, events: list[Launch | Operator]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        aliases = [value.alias_info for value in function._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in aliases)
        if not view and "empty" not in name:
            tensors = [t for t in _tensors([args, kwargs, result]) if t.is_meta]
            if tensors:
                total = sum(t.numel() * t.element_size() for t in tensors)
                dtype = str(tensors[0].dtype).removeprefix("torch.")
                self.events.append(Operator(name, max(t.numel() for t in tensors), dtype, total))
        return result


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


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
