"""Tensors and what describes them on disk: safetensors files, and a config.json that says what they are.

config.json holds the encoder's config with its address spec, the vocabulary, and for each tensor its dtype, shape,
SHA-256 and the files that hold its rows; a digest over all of it comes last. Weights files bear their content's digest
in their names, so a new checkpoint never overwrites the files of the old one, and replacing config.json, one rename,
makes the new one valid at once.

Beside a model saved by transformers, whose own files hold the encoder's tensors, the folder `prefixmem` has this
config.json alone. Nothing here knows a class of the package: configs and vocabularies are dicts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._files import write_file
from ._version import __version__

FORMAT_VERSION = 1
FOLDER = "prefixmem"  # the encoder's folder beside a model
CONFIG = "config.json"
_VOCABULARY = "sid_vocabulary.json"
_CHUNK_BYTES = 64 << 20
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


class CheckpointError(ValueError):
    """A checkpoint is damaged, or is not what it is asked to be."""


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

    Raises:
        ValueError: `max_shard_size` is no size, or the folder's config.json is of something else.
        OSError: the folder cannot be written; what was in it is left as it was.
    """
    limit = _bytes_of(max_shard_size)
    path.mkdir(parents=True, exist_ok=True)
    if (path / CONFIG).is_file() and not _is_ours(path / CONFIG):
        raise ValueError(f"{path / CONFIG} belongs to something else, a model perhaps; give a folder of its own")
    replaced = _files_named(path)
    entries = None if weights else _entries_in_model(list(tensors), path.parent)
    written: list[Path] = []
    try:
        if entries is None:
            entries = {name: _entry(_chunks_of(tensor)) for name, tensor in tensors.items()}
            for file, rows in _shards(tensors, entries, limit):
                _write_tensors(path / file, rows)
                written.append(path / file)
        values = {"encoder": config, "vocabulary": vocabulary, "tensors": entries}
        _write_json(path / CONFIG, "prefixmem", {"package_version": __version__, **values})
    except BaseException:
        for file in written:
            if file.name not in replaced:
                file.unlink(missing_ok=True)
        raise
    for name in replaced - _files_named(path):
        (path / name).unlink(missing_ok=True)


def read(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The folder of an encoder in `path`, or beside a model in it, and its config.json: encoder, vocabulary, tensors.

    Raises:
        FileNotFoundError: no encoder is there.
        CheckpointError: config.json is damaged, or of another version.
    """
    folder = _folder(path)
    return folder, _read_json(folder / CONFIG, "prefixmem")


def copy_tensors(
    targets: Mapping[str, Tensor], folder: Path, stored: Mapping[str, Any], *, verify: bool = True
) -> None:
    """Read tensors into `targets`, by name; they are changed once all files have been checked.

    Args:
        folder, stored: what `read` returned.
        verify: compare the SHA-256 of each tensor with the stored one; one more pass over the files.

    Raises:
        CheckpointError: a tensor is missing, of another shape, damaged or cut.
    """
    sources = {}
    for name, target in targets.items():
        entry = stored["tensors"].get(name)
        if entry is None or entry["shape"] != list(target.shape):
            problem = "is missing" if entry is None else f"has shape {entry['shape']}"
            raise CheckpointError(f"{folder / CONFIG}: {name} {problem}; the config needs {list(target.shape)}")
        sources[name] = _Rows(name, entry, folder)
    if verify:
        for source in sources.values():
            source.check()
    for name, source in sources.items():
        start = 0
        for chunk in source.chunks():
            targets[name][start : start + len(chunk)].copy_(chunk)
            start += len(chunk)


def save_vocabulary(vocabulary: dict[str, Any], path: str | Path) -> None:
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    _write_json(path / _VOCABULARY, "prefixmem vocabulary", {"vocabulary": vocabulary})


def read_vocabulary(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The file that holds the vocabulary of a folder, alone or with an encoder, and the vocabulary."""
    file = Path(path) / _VOCABULARY
    if file.is_file():
        stored = _read_json(file, "prefixmem vocabulary")
    else:
        folder, stored = read(path)
        file = folder / CONFIG
    if stored.get("vocabulary") is None:
        raise CheckpointError(f"{file} holds no vocabulary; the encoder was saved without one")
    return file, stored["vocabulary"]


# Writing


def _entry(chunks: Iterable[Tensor]) -> dict[str, Any]:
    """What config.json says of a tensor, whose rows come in chunks."""
    total, rows = hashlib.sha256(), 0
    for chunk in chunks:
        total.update(chunk.cpu().contiguous().view(torch.uint8).numpy())
        rows += len(chunk)
    dtype = str(chunk.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": [rows, *chunk.shape[1:]], "sha256": total.hexdigest()}


def _entries_in_model(names: list[str], folder: Path) -> dict[str, dict[str, Any]] | None:
    """The entries of tensors as a model's files hold them; None where these cannot be read."""
    try:
        return {name: _entry(_chunks_in(*_find_in_model(f"{FOLDER}.{name}", folder))) for name in names}
    except CheckpointError:
        return None


def _chunks_of(rows: Tensor) -> Iterator[Tensor]:
    """The rows in slices of `_CHUNK_BYTES` at most."""
    return iter(rows.split(max(_CHUNK_BYTES // max(rows[:1].numel() * rows.element_size(), 1), 1)))


def _chunks_in(file: Path, key: str) -> Iterator[Tensor]:
    """The same of a tensor in a file, read from a memory map slice by slice."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            rows = opened.get_slice(key)
            count, first = rows.get_shape()[0], rows[:1]
            step = max(_CHUNK_BYTES // max(first.numel() * first.element_size(), 1), 1)
            for start in range(0, count, step):
                yield rows[start : min(start + step, count)]
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged or cut: {error}") from None


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


def _write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    write_file(file, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))


def _write_json(file: Path, kind: str, values: dict[str, Any]) -> None:
    values = {"format": kind, "format_version": FORMAT_VERSION, **values}
    values = {**values, "digest": _digest(values)}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items())
    write_file(file, lambda temporary: Path(temporary).write_text("{\n" + lines + "\n}\n", encoding="utf-8"))


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _bytes_of(size: int | str) -> int:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMG]?I?B)", str(size).strip().upper())
    count = int(float(match[1]) * _UNITS[match[2]]) if match else size
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f'max_shard_size = {size!r} is no size; give bytes, or a string such as "2GB"')
    return count


# Reading


def _folder(path: str | Path) -> Path:
    """Where the config.json of an encoder is: in `path`, or in its folder beside a model."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder; give a local one that save_pretrained wrote")
    folder = path / FOLDER if (path / FOLDER / CONFIG).is_file() else path
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{path} holds no encoder: neither {CONFIG} nor {FOLDER}/{CONFIG} is there")
    return folder


def _read_json(file: Path, kind: str) -> dict[str, Any]:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: it is not JSON ({error})") from None
    if not isinstance(stored, dict) or stored.get("format") != kind:
        kind_found = stored.get("format") if isinstance(stored, dict) else type(stored).__name__
        raise CheckpointError(
            f"{file} is not of prefixmem_fast (its format is {kind_found!r}), and {file.parent / FOLDER} is not there; "
            "was the model saved with the encoder on it?"
        )
    if stored.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {stored.get('format_version')}, written by prefixmem_fast "
            f"{stored.get('package_version')}; prefixmem_fast {__version__} reads version {FORMAT_VERSION}"
        )
    digest = stored.pop("digest", None)
    if digest != _digest(stored):
        raise CheckpointError(f"{file} is damaged or edited: its digest is {digest}, its content's {_digest(stored)}")
    return stored


def _is_ours(file: Path) -> bool:
    """Whether a config.json is one of an encoder, sound or damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("format") == "prefixmem"
    except (AttributeError, UnicodeDecodeError, ValueError):
        return bool(list(file.parent.glob("memory-*.safetensors")))


def _files_named(folder: Path) -> set[str]:
    try:
        entries = _read_json(folder / CONFIG, "prefixmem")["tensors"].values()
        return {part["file"] for entry in entries for part in entry.get("parts", ())}
    except (OSError, CheckpointError):
        return set()


class _Rows:
    """The rows of one tensor in the files that hold them, read from a memory map chunk by chunk."""

    def __init__(self, name: str, entry: dict[str, Any], folder: Path) -> None:
        self.name, self.entry = name, entry
        self.parts = [(folder / part["file"], part["key"]) for part in entry.get("parts", ())]
        if not self.parts:
            self.parts = [_find_in_model(f"{FOLDER}.{name}", folder.parent)]

    def chunks(self) -> Iterator[Tensor]:
        rows = 0
        shape, dtype = tuple(self.entry["shape"]), getattr(torch, self.entry["dtype"])
        for file, key in self.parts:
            try:
                for chunk in _chunks_in(file, key):
                    if chunk.dtype != dtype or chunk.shape[1:] != shape[1:]:
                        raise CheckpointError(
                            f"{file} holds {key} as {chunk.dtype}, rows of {tuple(chunk.shape[1:])}; {CONFIG} says "
                            f"{dtype} {shape}"
                        )
                    yield chunk
                    rows += len(chunk)
            except FileNotFoundError:
                raise CheckpointError(f"{file} is not there, and {CONFIG} names it for {self.name}") from None
        if rows != shape[0]:
            raise CheckpointError(f"the files hold {rows} rows of {self.name}; {CONFIG} says {shape[0]}")

    def check(self) -> None:
        digest = _entry(self.chunks())["sha256"]
        if digest != self.entry["sha256"]:
            files = ", ".join(str(file) for file in dict.fromkeys(file for file, _ in self.parts))
            raise CheckpointError(
                f"{self.name} in {files} is damaged, or not the one that {CONFIG} was saved with: its SHA-256 is "
                f"{digest}, stored is {self.entry['sha256']}"
            )


def _find_in_model(key: str, folder: Path) -> tuple[Path, str]:
    """The file of a model saved by transformers that holds a tensor, and its key there."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        else:
            file = folder / "model.safetensors"
            with safe_open(file, framework="pt") as opened:
                files = dict.fromkeys(opened.keys(), file.name)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no model.safetensors, and the encoder's weights lie in it") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"the model's files in {folder} are damaged or cut: {error}") from None
    name = next((name for name in files if name == key or name.endswith("." + key)), None)
    if name is None:
        raise CheckpointError(
            f"the model's files in {folder} hold no {key}; was the model saved with the encoder on it?"
        )
    return folder / files[name], name
