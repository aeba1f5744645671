"""Tables and their optimizer's state by torch.distributed.checkpoint: an entry for each order and head.

However the tables are laid out, whole on one process, whole on many or divided, the entries are the same. So a
checkpoint of 2 ranks is read by 3 or by 1, and a divided one by whole ones and the other way round.

    tables.json   what the entries are of: spec, dtype, the optimizer's rule; and the SHA-256 of each other file
    .metadata     of torch.distributed.checkpoint
    *.distcp      of each rank
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from .._files import flush_folder, read_json, sha256_of, write_text
from .._inputs import clipped, shown
from .._version import __version__
from .._weights import CheckpointError
from ..encoder import PrefixMemory
from ..operation.table_state import finish_updates, table_state
from ..optim import RowOptimizer
from .ranks import from_first, gathered, on_all, on_first, rank, several, size
from .replicated import fingerprint
from .tables import blocks_of, memories_of

MANIFEST = "tables.json"
_FORMAT, _VERSION = "prefixmem tables", 1


def save_tables(model: nn.Module, folder: str | Path) -> None:
    """Write the tables of a model, and the state of the optimizer that holds them, into a folder. Collective.

    Every rank calls it, and reaches the folder. What was in the folder is replaced once the new files are whole.

    Args:
        model: holds a `PrefixMem`, or is one.
        folder: a new one, or one that this function wrote.

    Raises:
        ValueError: something else is in the folder, or ranks that hold the same rows disagree.
        OSError, CheckpointError: it cannot be written; what was in it is left as it was.
    """
    folder, memories = Path(folder), memories_of(model)
    on_first(lambda: _tidy(folder))
    on_all(lambda: _check_copies(memories))
    token = from_first(secrets.token_hex(4))
    new, old = (folder.parent / f".{folder.name}.{kind}-{token}" for kind in ("tmp", "old"))
    try:
        on_first(lambda: new.mkdir(parents=True))
        on_all(lambda: _check_shared(new))
        entries: dict[str, Tensor] = {}
        for name, memory in memories.items():
            entries |= _entries(name, memory)
        with _told(folder):
            dcp.save(entries, checkpoint_id=new, no_dist=not several())
        digests = {path.name: sha256_of(path) for path in new.glob(f"__{rank()}_*.distcp")}
        digests = {name: digest for found in gathered(digests) for name, digest in found.items()}

        def finish() -> None:
            files = {**digests, ".metadata": sha256_of(new / ".metadata")}
            rules = {name: _optimizer_of(m).rule if _state_of(m) else None for name, m in memories.items()}
            tables = {name: _described(memory, rules[name]) for name, memory in memories.items()}
            values = {"format": _FORMAT, "version": _VERSION, "package_version": __version__}
            write_text(new / MANIFEST, json.dumps({**values, "tables": tables, "files": files}, indent=1) + "\n")
            flush_folder(new)
            if folder.exists():
                os.replace(folder, old)
            os.replace(new, folder)
            shutil.rmtree(old, ignore_errors=True)

        on_first(finish)
    finally:
        if rank() == 0:
            shutil.rmtree(new, ignore_errors=True)


def load_tables(model: nn.Module, folder: str | Path, *, verify: bool = True) -> None:
    """Read what `save_tables` wrote into the tables of a model and the optimizer that holds them. Collective.

    The number of ranks and the layout may be others than those that it was written with.

    Args:
        model: holds the same tables under the same names.
        folder: of `save_tables`.
        verify: compare the SHA-256 of each file with the stored one; the ranks share the work. torch reads .metadata
            as a pickle: load only folders that you trust.

    Raises:
        FileNotFoundError: no such checkpoint is there.
        CheckpointError: it is damaged, or of other tables or another optimizer; nothing has been changed.
    """
    folder, memories = Path(folder), memories_of(model)
    on_first(lambda: _finish_cut_save(folder))
    stored: dict[str, Any] = {}

    def check() -> None:
        stored.update(_read_manifest(folder))
        _check_files(folder, stored["files"], verify)
        _check_tables(folder, stored["tables"], memories)

    on_all(check)
    entries: dict[str, Tensor] = {}
    for name, memory in memories.items():
        memory.before_write()
        finish_updates(memory.weight)
        optimizer = _optimizer_of(memory)
        if optimizer is None:
            if stored["tables"][name]["rule"] is not None:
                warnings.warn(
                    f"{folder} has the state of an optimizer of {name}, and none of prefixmem_fast.optim holds it "
                    "here; build the optimizer before load_tables",
                    stacklevel=2,
                )
        elif stored["tables"][name]["rule"] is None:  # saved before its first step
            optimizer.state.pop(memory.weight, None)
        else:
            optimizer.start(memory.weight)
        entries |= _entries(name, memory)
    known = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    wanted = {key: value for key, value in entries.items() if key in known}
    with _told(folder):
        dcp.load(wanted, checkpoint_id=folder, no_dist=not several())
    for memory in memories.values():
        torch.autograd.graph.increment_version(memory.weight)


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Turn torch's CheckpointException, a BaseException, into CheckpointError; hide its warning of one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        try:
            yield
        except CheckpointException as error:
            reasons = "; ".join(f"rank {i}: {clipped(reason[0])}" for i, reason in error.failures.items())
            raise CheckpointError(f"{folder} could not be written or read whole ({reasons})") from error


def _entries(name: str, memory: PrefixMemory) -> dict[str, Tensor]:
    """Views of the table and of its optimizer's state, by names that do not depend on the layout."""
    state = _state_of(memory)
    entries = {f"{name}.step": state.pop("step")} if state else {}
    tensors = {"weight": memory.weight.detach(), **state}
    for order, head, rows, _ in blocks_of(memory):
        for kind, tensor in tensors.items():
            entries[f"{name}.order{order + 1}.head{head + 1}.{kind}"] = tensor[rows]
    return entries


def _optimizer_of(memory: PrefixMemory) -> RowOptimizer | None:
    optimizer = table_state(memory.weight).optimizer
    return optimizer if isinstance(optimizer, RowOptimizer) else None


def _state_of(memory: PrefixMemory) -> dict[str, Tensor]:
    optimizer = _optimizer_of(memory)
    return {} if optimizer is None else dict(optimizer.state.get(memory.weight, {}))


def _described(memory: PrefixMemory, rule: str | None) -> dict[str, Any]:
    """
    Args:
        rule: of the optimizer; None where the rows alone count.
    """
    config = memory.config if memory.division is None else memory.division.config
    return {
        "spec": config.spec.to_dict(),
        "earlier_codes": config.earlier_codes,
        "row_width": config.row_width,
        "dtype": str(memory.weight.dtype).removeprefix("torch."),
        "rule": rule,
    }


def _check_tables(folder: Path, stored: dict[str, Any], memories: dict[str, PrefixMemory]) -> None:
    if stored.keys() != memories.keys():
        raise CheckpointError(f"{folder} holds the tables {sorted(stored)}, the model {sorted(memories)}; give its own")
    for name, memory in memories.items():
        found, optimizer = stored[name], _optimizer_of(memory)
        rows_alone = optimizer is None or found["rule"] is None
        own = _described(memory, found["rule"] if rows_alone else optimizer.rule)
        differ = [key for key in own if found.get(key) != own[key]]
        if differ:
            raise CheckpointError(
                f"{folder / MANIFEST}: {name} differs in {', '.join(differ)}: it has "
                f"{shown({key: found.get(key) for key in differ})}, the model "
                f"{shown({key: own[key] for key in differ})}"
            )


def _check_files(folder: Path, files: dict[str, str], verify: bool) -> None:
    for i, (name, digest) in enumerate(sorted(files.items())):
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is not there, and {MANIFEST} names it; take another copy of the checkpoint")
        mine = name == ".metadata" or (verify and i % size() == rank())
        if mine and sha256_of(file) != digest:
            raise CheckpointError(f"{file} is damaged: its SHA-256 is not the stored one; take another checkpoint")


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no tables: {MANIFEST} is not there; give a folder of save_tables")
    try:
        stored = read_json(file)
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    if not isinstance(stored, dict) or stored.get("format") != _FORMAT or stored.get("version") != _VERSION:
        raise CheckpointError(f"{file} is not of format {_FORMAT!r}, version {_VERSION}; give a folder of save_tables")
    files, tables = stored.get("files"), stored.get("tables")
    if not isinstance(files, dict) or not isinstance(tables, dict) or any(Path(name).name != name for name in files):
        raise CheckpointError(f"{file} is malformed; take another copy of the checkpoint")
    return stored


def _tidy(folder: Path) -> None:
    """Before a save: what a killed one has left beside the folder is removed."""
    _finish_cut_save(folder)
    _check_replaceable(folder)
    for path in _left_by_saves(folder):
        shutil.rmtree(path, ignore_errors=True)


def _finish_cut_save(folder: Path) -> None:
    """A save that was killed between its two renames has left the folder under another name."""
    old = [path for path in _left_by_saves(folder) if ".old-" in path.name and (path / MANIFEST).is_file()]
    if old and not os.path.lexists(folder):
        os.replace(old[0], folder)


def _left_by_saves(folder: Path) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.(tmp|old)-[0-9a-f]{{8}}")
    parent = folder.parent
    return [parent / name for name in os.listdir(parent) if pattern.fullmatch(name)] if parent.is_dir() else []


def _check_shared(folder: Path) -> None:
    if not folder.is_dir():
        raise OSError(f"{folder.parent} is another folder on rank {rank()}; give one that all ranks share")


def _check_copies(memories: dict[str, PrefixMemory]) -> None:
    """Refuse ranks that hold the same rows with other numbers: one of them would be written."""
    own = {name: ([b[:2] for b in blocks_of(m)], fingerprint(m.weight)) for name, m in memories.items()}
    for other, found in enumerate(gathered(own)):
        for name, (blocks, checksum) in found.items():
            if name in own and blocks == own[name][0] and checksum != own[name][1]:
                raise ValueError(
                    f"{name} has other rows on rank {other} than on rank {rank()}, and the same prefixes; they have "
                    "gone apart since replicate or shard: load one checkpoint on all ranks"
                )


def _check_replaceable(folder: Path) -> None:
    if os.path.lexists(folder) and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds something else than tables; give a new folder")
