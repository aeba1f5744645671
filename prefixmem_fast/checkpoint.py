"""Tensors and what describes them on disk: safetensors files, and a config.json that says what they are.

config.json holds the encoder's config with its address spec, the vocabulary, and for each tensor its dtype, shape,
SHA-256 and the files that hold its rows, each with its own where several processes have written them; a digest over all
of it comes last. Weights files bear their content's digest in their names, so a new checkpoint never overwrites the
files of the old one, and replacing config.json, one rename, makes the new one valid at once.

A file is named by its bare name: nothing outside the folder, or for a model's files outside the model's, is read,
written or removed. A reader believes no number before it has held it against the headers of the weights files.

Beside a model saved by transformers, whose own files hold the encoder's tensors, the folder `prefixmem` has this
config.json alone. Nothing here knows a class of the package: configs and vocabularies are dicts.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._choices import DTYPES, QUANTIZED_DTYPES
from ._files import MOST_TEXT_BYTES, locked, read_json, remove_leftovers, size_of, write_file, write_text
from ._inputs import shown
from ._version import __version__
from ._weights import (
    CONFIG,
    FOLDER,
    SAVE_AGAIN,
    WEIGHTS,
    CheckpointError,
    Rows,
    chunks_in,
    chunks_of,
    entry_of,
    find_in_model,
)

FORMAT_VERSION = 1
QUANTIZED_VERSION = 2  # of the config.json of a quantized encoder, which earlier releases refuse
PARTS_VERSION = 3  # where parts have a SHA-256 each, in place of the whole
_VERSIONS = (FORMAT_VERSION, QUANTIZED_VERSION, PARTS_VERSION)
_VOCABULARY = "sid_vocabulary.json"
_ENCODER, _TABLE = "prefixmem", "prefixmem vocabulary"  # the formats of config.json and sid_vocabulary.json
_READS = 20  # of a folder that others save into meanwhile
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


_Result = TypeVar("_Result")


def save(
    path: Path,
    config: dict[str, Any],
    vocabulary: dict[str, Any] | None,
    tensors: Mapping[str, Tensor],
    *,
    max_shard_size: int | str = "2GB",
    weights: bool = True,
) -> None:
    """Write an encoder into a folder.

    Args:
        config, vocabulary: dicts for JSON.
        tensors: by name, contiguous.
        max_shard_size: bytes of a weights file, or a string such as "500MB"; larger tables are split by rows.
        weights: False where a model's own files beside the folder hold the tensors; where they do not, they are
            written all the same.

    Of the folder's files, this removes those alone whose names are of its own pattern. Processes that save into one
    folder wait for one another, a minute at most, where the system has locks.

    Raises:
        ValueError: `max_shard_size` is no size, the folder's config.json is of something else, or the vocabulary does
            not fit a file.
        OSError: the folder cannot be written, or others hold it for too long; what was in it is left as it was.
    """
    limit = bytes_of(max_shard_size)
    path.mkdir(parents=True, exist_ok=True)
    with locked(path) as alone:
        _save(path, config, vocabulary, tensors, limit, weights, alone)


def _save(
    path: Path,
    config: dict[str, Any],
    vocabulary: dict[str, Any] | None,
    tensors: Mapping[str, Tensor],
    limit: int,
    weights: bool,
    alone: bool,
) -> None:
    check_replaceable(path / CONFIG, _ENCODER)
    if alone:
        remove_leftovers(path, rf"{WEIGHTS}|config\.json")
    before, replaced, old = weights_in(path), files_named(path), identity(path / CONFIG)
    entries = None if weights else _entries_in_model(list(tensors), path.parent)
    written: list[Path] = []
    try:
        if entries is None:
            entries = {name: entry_of(chunks_of(tensor)) for name, tensor in tensors.items()}
            for file, rows in _shards(tensors, entries, limit):
                written.append(path / file)
                write_tensors(path / file, rows)
        values = {"encoder": config, "vocabulary": vocabulary, "tensors": entries}
        quantized = any(entry["dtype"] in QUANTIZED_DTYPES for entry in entries.values())
        version = QUANTIZED_VERSION if quantized else FORMAT_VERSION
        write_json(path / CONFIG, _ENCODER, {"package_version": __version__, **values}, version)
    except BaseException:
        if identity(path / CONFIG) == old:  # a config.json that is new names the new files, however late the failure
            for file in written:
                if file.name not in before:
                    file.unlink(missing_ok=True)
        raise
    # Where nobody else can be saving, a file that config.json does not name is one that a killed process has left.
    for name in (weights_in(path) if alone else replaced) - parts_of(entries):
        with suppress(OSError):  # the encoder is saved; the next save tries again
            (path / name).unlink()


def read(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The folder of an encoder in `path`, or beside a model in it, and its config.json: encoder, vocabulary, tensors.

    Raises:
        FileNotFoundError: no encoder is there.
        CheckpointError: config.json is damaged, or of another version.
    """
    folder = _folder(path)
    return folder, _stored_in(folder)


def read_with(path: str | Path, load: Callable[[Path, dict[str, Any]], _Result]) -> _Result:
    """`load(*read(path))`, once more where another process has saved into the folder meanwhile."""
    for _ in range(_READS):
        folder, stored = read(path)
        try:
            return load(folder, stored)
        except CheckpointError as error:
            found = error
            if read(path) == (folder, stored):
                break
    raise found


def check_tensors(targets: Mapping[str, Tensor], folder: Path, stored: Mapping[str, Any]) -> dict[str, Rows]:
    """Hold the shapes of the wanted tensors against config.json, and config.json against the headers of the files.

    Nothing of a tensor's size is allocated. Tensors of 8 bits a number are not converted, so their dtypes must agree.

    Args:
        targets: by name; meta tensors do.
        folder, stored: what `read` returned.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or not in its files as config.json says.
    """
    sources = {}
    for name, target in targets.items():
        entry, shape = stored["tensors"].get(name), list(target.shape)
        if entry is None or entry["shape"] != shape:
            problem = "is missing" if entry is None else f"has shape {shown(entry['shape'])}"
            raise CheckpointError(f"{folder / CONFIG}: {name} {problem}; the config needs {shape}")
        dtypes = entry["dtype"], str(target.dtype).removeprefix("torch.")
        if dtypes[0] != dtypes[1] and not set(QUANTIZED_DTYPES).isdisjoint(dtypes):
            raise CheckpointError(f"{folder / CONFIG}: {name} is of {dtypes[0]}; the config needs {dtypes[1]}")
        sources[name] = Rows(name, entry, folder)
    return sources


def copy_tensors(
    targets: Mapping[str, Tensor], folder: Path, stored: Mapping[str, Any], *, verify: bool = True
) -> bool:
    """Read tensors into `targets`, by name; they are changed once all files have been checked.

    Args:
        folder, stored: what `read` returned.
        verify: compare the SHA-256 of each tensor with the stored one; one more pass over the files.

    Returns:
        whether `targets` held anything else before.

    Raises:
        CheckpointError: a tensor is missing, of another shape, damaged or cut.
    """
    sources = check_tensors(targets, folder, stored)
    if verify:
        for source in sources.values():
            source.check()
    changed = False
    for name, source in sources.items():
        start = 0
        for chunk in source.chunks():
            place = targets[name][start : start + len(chunk)]
            chunk = chunk.to(place.device, place.dtype)
            changed = changed or not torch.equal(*map(_comparable, (place, chunk)))
            place.copy_(chunk)
            start += len(chunk)
    return changed


def _comparable(tensor: Tensor) -> Tensor:
    """torch.equal does not take every kind of float8."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def save_vocabulary(vocabulary: dict[str, Any], path: str | Path) -> None:
    """Write a vocabulary into a folder.

    Raises:
        ValueError: the folder's sid_vocabulary.json is of something else, or the vocabulary does not fit a file.
        OSError: the folder cannot be written; what was in it is left as it was.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    check_replaceable(path / _VOCABULARY, _TABLE)
    write_json(path / _VOCABULARY, _TABLE, {"vocabulary": vocabulary})


def read_vocabulary(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The file that holds the vocabulary of a folder, alone or with an encoder, and the vocabulary."""
    file = Path(path) / _VOCABULARY
    if os.path.lexists(file):
        stored = _read_json(file, _TABLE)
    else:
        folder, stored = read(path)
        file = folder / CONFIG
    if stored.get("vocabulary") is None:
        raise CheckpointError(f"{file} holds no vocabulary; the encoder was saved without one")
    if not isinstance(stored["vocabulary"], dict):
        raise CheckpointError(f"{file} is malformed: vocabulary is {shown(stored['vocabulary'])}; {SAVE_AGAIN}")
    return file, stored["vocabulary"]


# Writing


def _entries_in_model(names: list[str], folder: Path) -> dict[str, dict[str, Any]] | None:
    """The entries of tensors as a model's files hold them; None where these cannot be read."""
    try:
        return {name: entry_of(chunks_in(*find_in_model(f"{FOLDER}.{name}", folder))) for name in names}
    except (CheckpointError, FileNotFoundError):
        return None


def _shards(
    tensors: Mapping[str, Tensor], entries: dict[str, dict], limit: int
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(file name, its tensors); says in `entries` which file holds which rows."""
    digest = hashlib.sha256("".join(entry["sha256"] for entry in entries.values()).encode()).hexdigest()[:12]
    parts: list[tuple[str, str, Tensor]] = []  # (tensor, key in its file, rows)
    for name, tensor in tensors.items():
        step = max(limit // max(tensor[:1].numel() * tensor.element_size(), 1), 1)
        for i, start in enumerate(range(0, len(tensor), step)):
            parts.append((name, name if step >= len(tensor) else f"{name}.{i}", tensor[start : start + step]))
    files: list[list[tuple[str, str, Tensor]]] = []
    held = limit + 1
    for part in parts:
        size = part[2].numel() * part[2].element_size()
        if held + size > limit:
            files.append([])
            held = 0
        files[-1].append(part)
        held += size
    for i, content in enumerate(files, start=1):
        number = f"-{i:05}-of-{len(files):05}" if len(files) > 1 else ""
        file = f"memory-{digest}{number}.safetensors"
        for name, key, rows in content:
            entries[name].setdefault("parts", []).append({"file": file, "key": key, "rows": len(rows)})
        yield file, {key: rows for _, key, rows in content}


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        write_file(file, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))
    except SafetensorError as error:
        raise OSError(f"{file} cannot be written ({error}); is the disk full?") from None


def write_json(file: Path, kind: str, values: dict[str, Any], version: int = FORMAT_VERSION) -> None:
    values = {"format": kind, "format_version": version, **values}
    values = {**values, "digest": _digest(values)}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items())
    if len(lines) + 4 > MOST_TEXT_BYTES:  # ASCII
        raise ValueError(
            f"{file} would have {len(lines)} bytes; allowed are {MOST_TEXT_BYTES}: the vocabulary is too large"
        )
    write_text(file, "{\n" + lines + "\n}\n")


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def bytes_of(size: int | str) -> int:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMG]?I?B)", str(size).strip().upper())
    count = int(float(match[1]) * _UNITS[match[2]]) if match else size
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f'max_shard_size = {size!r} is no size; give bytes, or a string such as "2GB"')
    return count


def weights_in(folder: Path) -> set[str]:
    """The names of the weights files in a folder, by their pattern."""
    return {name for name in os.listdir(folder) if re.fullmatch(WEIGHTS, name)}


# Reading


def _folder(path: str | Path) -> Path:
    """Where the config.json of an encoder is: in `path`, or in its folder beside a model."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder; give a local one that save_pretrained wrote")
    folder = path / FOLDER if os.path.lexists(path / FOLDER / CONFIG) else path
    if not os.path.lexists(folder / CONFIG):
        raise FileNotFoundError(f"{path} holds no encoder: neither {CONFIG} nor {FOLDER}/{CONFIG} is there")
    return folder


def _stored_in(folder: Path) -> dict[str, Any]:
    """The config.json of a folder, and of no other."""
    stored = _read_json(folder / CONFIG, _ENCODER)
    _check_stored(folder / CONFIG, stored)
    return stored


def _json(file: Path) -> Any:
    try:
        return read_json(file)
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None


def _read_json(file: Path, kind: str) -> dict[str, Any]:
    stored = _json(file)
    if not isinstance(stored, dict) or stored.get("format") != kind:
        found = shown(stored.get("format") if isinstance(stored, dict) else type(stored).__name__)
        raise CheckpointError(
            f"{file} is not of prefixmem_fast (its format is {found}), and {file.parent / FOLDER} is not there; "
            "was the model saved with the encoder on it?"
        )
    version = stored.get("format_version")
    if type(version) is not int or version not in _VERSIONS:
        raise CheckpointError(
            f"{file} has format version {_plain(version)}, written by prefixmem_fast "
            f"{_plain(stored.get('package_version'))}; prefixmem_fast {__version__} reads versions "
            f"{', '.join(map(str, _VERSIONS))}"
        )
    digest = stored.pop("digest", None)
    try:
        own = _digest(stored)
    except RecursionError:
        raise CheckpointError(f"{file} is damaged: it is nested too deeply") from None
    if digest != own:
        raise CheckpointError(f"{file} is damaged or edited: its digest is {_plain(digest)}, its content's {own}")
    return stored


def _plain(value: Any) -> str:
    """A value in a message: a short word as it is."""
    return value if isinstance(value, str) and value.isprintable() and len(value) <= 64 else shown(value)


def _check_stored(file: Path, stored: dict[str, Any]) -> None:
    """Refuse a config.json whose entries are not what `save` writes."""

    def refuse(what: str, value: Any, allowed: str) -> None:
        raise CheckpointError(f"{file} is malformed: {what} is {shown(value)}, not {allowed}; {SAVE_AGAIN}")

    known = DTYPES if stored["format_version"] == FORMAT_VERSION else (*DTYPES, *QUANTIZED_DTYPES)
    encoder, vocabulary, tensors = (stored.get(name) for name in ("encoder", "vocabulary", "tensors"))
    if not isinstance(encoder, dict):
        refuse("encoder", encoder, "a config")
    if encoder.get("kind", "prefixmem") not in ("prefixmem", "sid-transformer"):
        refuse("the encoder's kind", encoder["kind"], "one that this release knows")
    if not (vocabulary is None or isinstance(vocabulary, dict)):
        refuse("vocabulary", vocabulary, "one, nor null")
    if not isinstance(tensors, dict) or not tensors:
        refuse("tensors", tensors, "a table of tensors")
    for name, entry in tensors.items():
        call = f"tensors[{shown(name)}]"
        if not isinstance(entry, dict):
            refuse(call, entry, "a table")
        if not isinstance(entry.get("dtype"), str) or entry["dtype"] not in known:
            refuse(f"{call}['dtype']", entry.get("dtype"), f"one of {', '.join(known)}")
        shape = entry.get("shape")
        if not isinstance(shape, list) or not shape or not all(_is_count(n) for n in shape):
            refuse(f"{call}['shape']", shape, "a list of sizes")
        parts = entry.get("parts", [])
        if not isinstance(parts, list) or not (parts or stored["format_version"] != PARTS_VERSION):
            refuse(f"{call}['parts']", parts, "a list")
        digests = {f"{call}['sha256']": entry.get("sha256")}
        if stored["format_version"] == PARTS_VERSION:
            found = [part.get("sha256") if isinstance(part, dict) else None for part in parts]
            digests = {f"{call}['parts'][{i}]['sha256']": digest for i, digest in enumerate(found)}
        for where, digest in digests.items():
            if not re.fullmatch("[0-9a-f]{64}", str(digest)):
                refuse(where, digest, "a digest of 64 hexadecimal digits")
        for part in parts:
            key = part.get("key") if isinstance(part, dict) else None
            if not isinstance(key, str) or not key.isprintable() or not _is_count(part.get("rows")):
                refuse(f"a part of {call}", part, "a file, a key and a number of rows")
            if not isinstance(part.get("file"), str) or not re.fullmatch(WEIGHTS, part["file"]):
                refuse(f"the file of a part of {call}", part.get("file"), "the bare name of a memory-….safetensors")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def check_replaceable(file: Path, kind: str) -> None:
    """Refuse to write over a file that is not certainly of the package."""
    if os.path.lexists(file) and not _is_ours(file, kind):
        raise ValueError(
            f"{file} belongs to something else, a model perhaps; give a folder of its own, or move the file away"
        )


def _is_ours(file: Path, kind: str) -> bool:
    """Whether a file is one of `write_json`, sound, or damaged behind its first line."""
    try:
        size_of(file)
    except (OSError, ValueError):
        return False
    try:
        stored = read_json(file)
    except ValueError:
        with open(file, "rb") as opened:
            return f'"format": "{kind}"'.encode() in opened.read(200)
    return isinstance(stored, dict) and stored.get("format") == kind


def identity(file: Path) -> tuple[int, ...] | None:
    """What tells a file, or a link, from another that is put in its place; None where none is there."""
    try:
        found = os.lstat(file)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def files_named(folder: Path) -> set[str]:
    """The weights files that the config.json of a folder names; none where it is damaged."""
    try:
        return parts_of(_stored_in(folder)["tensors"])
    except (OSError, CheckpointError):
        return set()


def parts_of(entries: Mapping[str, Any]) -> set[str]:
    return {part["file"] for entry in entries.values() for part in entry.get("parts", ())}
