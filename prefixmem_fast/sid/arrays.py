"""Arrays in .npy and .pt files, whose headers are held against the file before memory is taken."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._inputs import shown


def read_npy(path: Path, kinds: str, expected: str) -> Tensor:
    """An array whose header agrees with its file: numpy would allocate, or divide by, whatever a damaged one says.

    Args:
        kinds: of numpy's kinds of numbers those that are allowed, such as "iu".
        expected: names them in errors, with their shape.
    """
    with path.open("rb") as file:
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        version = np.lib.format.read_magic(file)
        if version not in readers:
            raise ValueError(f"it is of format {version}; {expected} in format 1.0 or 2.0 were expected")
        shape, _, kind = readers[version](file)
        if kind.kind not in kinds:
            raise ValueError(f"it holds {kind}; {expected} were expected")
        left = path.stat().st_size - file.tell()
    if min(shape, default=0) < 1 or math.prod(shape) * kind.itemsize > left:
        raise ValueError(f"its header says {shown(shape)} numbers of {kind}, and {left} bytes follow")
    found = np.load(path, allow_pickle=False)
    return torch.from_numpy(found.astype(found.dtype.newbyteorder("="), copy=False))


def read_pt(path: Path, expected: str) -> Any:
    """What torch.save wrote, by torch.load's reader of weights alone; a tensor is held against the file's size."""
    found = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(found, Tensor):
        check_size(found, path, expected)
    return found


def check_size(tensor: Tensor, path: Path, expected: str) -> None:
    """A tensor may say that it has more numbers than its file: strides of 0, sparse tensors, the meta device."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        raise ValueError(f"it holds no dense tensor; {expected} were expected")
    size = path.stat().st_size
    if not tensor.numel() or tensor.numel() * tensor.element_size() > size:
        raise ValueError(f"its tensor has shape {tuple(tensor.shape)}, and the file only {size} bytes")
