"""Block sizes, column tiles and launch options that the kernels share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixmem_fast._dtypes import accumulator
from prefixmem_fast._launch import forget
from prefixmem_fast._triton import interpreting
from prefixmem_fast.addressing import AddressSpec

from .settings import DEFAULTS, Settings, settings_for

# Naming the option keeps the bits equal across Triton's changing defaults, and equal to PyTorch's.
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


_INTERPRETING = interpreting()


class Device:
    """A device that kernels are launched on; every kind of launches names it. Equal to itself alone.

    Attributes:
        backend: "cuda" or "hip".
        lanes: threads a warp.
        settings: block sizes and warps in force.
    """

    def __init__(self, backend: str, lanes: int, settings: Settings) -> None:
        self.backend, self.lanes, self.settings = backend, lanes, settings


@lru_cache(maxsize=64)
def _device_of(index: int | str, pinned: bool) -> Device:
    """Asking the driver for a target takes microseconds."""
    if not pinned:
        settings = settings_for(torch.cuda.get_device_name(index) if isinstance(index, int) else index)
        if settings == DEFAULTS:
            return _device_of(index, True)
    else:
        settings = DEFAULTS
    if _INTERPRETING:
        return Device("cuda", 32, settings)
    target = triton.runtime.driver.active.get_current_target()
    return Device(target.backend, target.warp_size, settings)


def current_device(pinned: bool = False) -> Device:
    """The device to launch on; with the defaults where the caller or torch asks for the same bits run after run."""
    index = "interpreter" if _INTERPRETING else triton.runtime.driver.active.get_current_device()
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        pinned = True
    return _device_of(index, pinned)


@contextmanager
def trying(settings: Settings) -> Iterator[None]:
    """Launches take these settings in here."""
    device = current_device()
    before = device.settings
    device.settings = settings
    forget()
    try:
        yield
    finally:
        device.settings = before
        forget()


def roomy_launch(device: Device, num_warps: int, registers: int = 255) -> dict[str, int | bool]:
    """Options for kernels that keep many values: ptxas would rather spill a few registers, or wait for a load early,
    than lose a warp's place. A program of many warps has fewer registers a thread."""
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    fitting = 65_536 // (device.lanes * num_warps)
    return {**options, "maxnreg": min(registers, fitting)} if device.backend == "cuda" else options


def aligned(tensor: Tensor | None) -> bool:
    """Whether a tensor starts at a multiple of 16 bytes, for which Triton compiles kernels of their own."""
    return tensor is None or tensor.data_ptr() % 16 == 0


class Tile(NamedTuple):
    """Block sizes of one launch, and how many column tiles cover a row of H x W."""

    BM: int
    BH: int
    BW: int
    columns: int


def index_dtype(size: int) -> torch.dtype:
    """Of indices below `size`, and of -1."""
    return torch.int32 if size < 1 << 31 else torch.int64


def blocks(size: int, block: int) -> int:
    """ceil(size / block); triton.cdiv takes microseconds on the host."""
    return -(-size // block)


@lru_cache(maxsize=256)
def tile_of(heads: int, width: int, dtype: torch.dtype, budget: int) -> Tile:
    """A tile whose accumulator takes `budget` bytes a program."""
    elements = budget // accumulator(dtype).itemsize
    BW = min(triton.next_power_of_2(width), elements)
    BH = min(triton.next_power_of_2(heads), elements // BW)
    BM = min(elements // (BH * BW), 32)
    return Tile(BM, BH, BW, blocks(heads, BH) * blocks(width, BW))


MOST_WARPS = 16  # of a program
SUM_BYTES = 32  # of a running sum a thread: 8 values, which are 16-byte reads of bfloat16


def warp_bytes(device: Device) -> int:
    """Bytes of a running sum that one warp holds."""
    return SUM_BYTES * device.lanes


def row_tile(device: Device, width: int, dtype: torch.dtype, whole: bool) -> tuple[int, int, int]:
    """Rows and columns of a tile that one warp holds, and the number of warps: more only where a `whole` row is wider.

    Warps of one program would have to wait for one another before a row that all have read is written.
    """
    values = warp_bytes(device) // accumulator(dtype).itemsize
    BW = triton.next_power_of_2(width)
    if not whole:
        BW = min(BW, values)
    return max(min(values // BW, 32), 1), BW, min(max(BW // values, 1), MOST_WARPS)


@triton.jit
def column_tile(i_block, H: tl.constexpr, W: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr):
    """Heads and columns of tile i_block of a row of H x W: offsets [BH], [BW], element offsets and mask [1, BH, BW]."""
    N_W: tl.constexpr = (W + BW - 1) // BW
    o_h = i_block // N_W * BH + tl.arange(0, BH)
    o_w = i_block % N_W * BW + tl.arange(0, BW)
    o_d = (o_h[:, None] * W + o_w[None, :])[None, :, :]
    m_d = ((o_h < H)[:, None] & (o_w < W)[None, :])[None, :, :]
    return o_h, o_w, o_d, m_d


def zero_table(spec: AddressSpec, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table of zeros to sum a dense gradient in."""
    return torch.zeros((spec.total_rows, width), dtype=dtype, device=device)
