"""Weights files as a reader meets them: which file holds which rows of a tensor, believed once the headers say so."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._files import read_json, size_of
from ._inputs import shown

CONFIG = "config.json"
FOLDER = "prefixmem"  # the encoder's folder beside a model
WEIGHTS = r"memory-[0-9a-f]{12}(-[0-9]{5,}-of-[0-9]{5,})?\.safetensors"  # the names of an encoder's own files
SAVE_AGAIN = "save the encoder again, or take another copy of the checkpoint"
_CHUNK_BYTES = 64 << 20
_NAMES_OF_SAFETENSORS = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F64": "float64",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
}


class CheckpointError(ValueError):
    """A checkpoint is damaged, or is not what it is asked to be."""

    def __init__(self, message: str) -> None:
        super().__init__(message.encode(errors="backslashreplace").decode())  # it may hold what a damaged file holds


def entry_of(chunks: Iterable[Tensor]) -> dict[str, Any]:
    """What config.json says of a tensor, whose rows come in chunks."""
    total, rows = hashlib.sha256(), 0
    for chunk in chunks:
        total.update(chunk.cpu().contiguous().view(torch.uint8).numpy())
        rows += len(chunk)
    dtype = str(chunk.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": [rows, *chunk.shape[1:]], "sha256": total.hexdigest()}


def chunks_of(rows: Tensor) -> Iterator[Tensor]:
    """The rows in slices of `_CHUNK_BYTES` at most."""
    return iter(rows.split(max(_CHUNK_BYTES // max(rows[:1].numel() * rows.element_size(), 1), 1)))


def chunks_in(file: Path, key: str) -> Iterator[Tensor]:
    """The same of a tensor in a file, read from a memory map slice by slice."""
    with _opened(file) as opened:
        rows = opened.get_slice(key)
        count, first = rows.get_shape()[0], rows[:1]
        step = max(_CHUNK_BYTES // max(first.numel() * first.element_size(), 1), 1)
        for start in range(0, count, step):
            yield rows[start : min(start + step, count)]


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file that is whole; what is no regular file is not opened."""
    from safetensors import SafetensorError, safe_open

    try:
        size_of(file)
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} is damaged or cut: {str(error)[:500]}") from None
    except MemoryError:
        raise MemoryError(f"{file}: its {size_of(file)} bytes cannot be mapped into memory") from None
    except RuntimeError as error:
        if "unable to" not in str(error):
            raise
        size_of(file)  # raises FileNotFoundError where a save has removed the file since
        raise OSError(f"{file} cannot be read: {error}") from None


# Of Linux on these machines; a map larger than memory is refused without it, as each page might be written to.
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") else None


def _mapped(file: Path, key: str, dtype: torch.dtype) -> Tensor:
    """A tensor of a safetensors file, flat, as private pages of the file: a write makes a page of memory of it."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        start, end = json.loads(opened.read(length))[key]["data_offsets"]
        if _MAP_NORESERVE is None:
            pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        else:
            flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
            pages = mmap.mmap(opened.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    if hasattr(mmap, "MADV_RANDOM"):
        pages.madvise(mmap.MADV_RANDOM)  # rows are far apart: what would be read ahead is not used
    if (8 + length + start) % dtype.itemsize:
        raise ValueError(f"{key} begins at byte {8 + length + start}, which is no multiple of {dtype.itemsize}")
    return torch.frombuffer(pages, dtype=dtype, count=(end - start) // dtype.itemsize, offset=8 + length + start)


class Rows:
    """The rows of one tensor in the files that hold them, read from a memory map chunk by chunk.

    Raises:
        CheckpointError: the headers of the files do not promise what config.json does.
    """

    def __init__(self, name: str, entry: dict[str, Any], folder: Path) -> None:
        self.name, self.entry = name, entry
        parts = entry.get("parts", ())
        self.parts = [(folder / part["file"], part["key"]) for part in parts]
        if not self.parts:
            self.parts = [find_in_model(f"{FOLDER}.{name}", folder.parent)]
        dtype, shape = entry["dtype"], entry["shape"]
        rows = 0
        for file, key in self.parts:
            found, (count, *width) = self._header(file, key)
            if found != dtype or width != shape[1:]:
                raise CheckpointError(
                    f"{file} holds {shown(key)} as {found}, rows of {width}; {CONFIG} says {dtype} {shown(shape)}"
                )
            rows += count
        if rows != shape[0] or sum(part["rows"] for part in parts) not in (0, rows):
            raise CheckpointError(f"the files hold {rows} rows of {name}; {CONFIG} says {shape[0]}")
        if len(set(self.parts)) != len(self.parts):  # a small file would fill any memory
            raise CheckpointError(f"{folder / CONFIG} names one part of {name} twice; {SAVE_AGAIN}")

    def _header(self, file: Path, key: str) -> tuple[str, list[int]]:
        """(dtype, shape) of a tensor, as the file's header has it; safetensors holds headers against sizes of files."""
        try:
            with _opened(file) as opened:
                tensor = opened.get_slice(key)
                shape = tensor.get_shape()
                return _NAMES_OF_SAFETENSORS.get(tensor.get_dtype(), tensor.get_dtype()), shape or [0]
        except FileNotFoundError:
            raise CheckpointError(f"{file} is not there, and {CONFIG} names it for {self.name}") from None

    def chunks(self) -> Iterator[Tensor]:
        try:
            for file, key in self.parts:
                yield from chunks_in(file, key)
        except FileNotFoundError:
            raise CheckpointError(f"{file} is not there any more, and {CONFIG} names it for {self.name}") from None

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.entry["dtype"])

    def mapped(self, *, verify: bool = True) -> Tensor:
        """A view of the file that holds the rows, without a copy; what is written into it stays in memory.

        Args:
            verify: compare the SHA-256 first, in one pass over the file.

        Raises:
            ValueError: several files hold the rows.
            CheckpointError: the rows are damaged, or the file is not there any more.
        """
        if len(self.parts) > 1:
            size = self.dtype.itemsize * math.prod(self.entry["shape"])
            raise ValueError(
                f'{self.name} is stored in {len(self.parts)} parts, and tables="mapped" reads one file; save the '
                f"encoder again with max_shard_size={size} or larger"
            )
        if verify:
            self.check()
        (file, key), shape = self.parts[0], self.entry["shape"]
        try:
            return _mapped(file, key, self.dtype).view(shape)
        except FileNotFoundError:
            raise CheckpointError(f"{file} is not there any more, and {CONFIG} names it for {self.name}") from None
        except OSError as error:
            raise OSError(error.errno, f"{file} cannot be mapped into memory: {error.strerror}") from None
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be mapped ({error}); {SAVE_AGAIN}") from None

    def check(self) -> None:
        if "sha256" in self.entry:
            self._check(self.chunks(), self.entry["sha256"], [file for file, _ in self.parts])
            return
        for (file, key), part in zip(self.parts, self.entry["parts"], strict=True):
            self._check(chunks_in(file, key), part["sha256"], [file])

    def _check(self, chunks: Iterable[Tensor], stored: str, files: list[Path]) -> None:
        digest = entry_of(chunks)["sha256"]
        if digest != stored:
            raise CheckpointError(
                f"{self.name} in {', '.join(map(str, dict.fromkeys(files)))} is damaged, or not the one that {CONFIG} "
                f"was saved with: its SHA-256 is {digest}, stored is {stored}"
            )


def find_in_model(key: str, folder: Path) -> tuple[Path, str]:
    """The file of a model saved by transformers that holds a tensor, and its key there.

    In the order of transformers, which reads no index beside a model.safetensors, and leaves an old one there.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files, name = {}, None
    try:
        if single.is_file() or not os.path.lexists(index):
            with _opened(single) as opened:
                files = dict.fromkeys(opened.keys(), single.name)
            name = _name_of(key, files)
        if name is None and os.path.lexists(index):
            stored = read_json(index)
            files = stored.get("weight_map") if isinstance(stored, dict) else None
            if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
                raise ValueError(f"{index.name} has no weight_map of names of files")
            name = _name_of(key, files)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no model.safetensors, and the encoder's weights lie in it") from None
    except ValueError as error:
        raise CheckpointError(f"the model's files in {folder} are damaged or cut: {error}") from None
    if name is None:
        raise CheckpointError(
            f"the model's files in {folder} hold no {key}; was the model saved with the encoder on it?"
        )
    if not re.fullmatch(r"[^/\\:]+", files[name]) or files[name].startswith("..") or not files[name].isprintable():
        raise CheckpointError(
            f"{index} names the file {shown(files[name])} for {shown(name)}, which is not the bare name of a file in "
            "its folder; save the model again"
        )
    if not os.path.exists(folder / files[name]):
        raise CheckpointError(f"{index} names {files[name]} for {shown(name)}, which is not there; save it again")
    return folder / files[name], name


def _name_of(key: str, names: Iterable[str]) -> str | None:
    """Which of a model's names is that of the encoder's tensor."""
    return next((name for name in names if name == key or name.endswith("." + key)), None)
