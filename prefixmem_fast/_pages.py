"""Huge pages under memory tables: rows at random in a large table miss the translation of addresses at every row."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

_MADV_HUGEPAGE = 14
_HUGE_PAGE = 2 << 20


def ask_for_huge_pages(tensor: Tensor) -> bool:
    """Ask Linux to put a tensor that is yet to be written on huge pages; whether it took note.

    Where they are switched off, or the tensor is small, on a device or on another system, nothing happens.
    """
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type != "cpu" or size < 2 * _HUGE_PAGE or sys.platform != "linux":
        return False
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + size - first) // mmap.PAGESIZE * mmap.PAGESIZE
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise(first, length, _MADV_HUGEPAGE) == 0
