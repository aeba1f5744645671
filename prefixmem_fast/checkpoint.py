"""Encoders and vocabularies on disk: safetensors files, and a config.json that says what they are.

config.json holds the encoder's config with its address spec, the vocabulary, and for each tensor its dtype, shape,
SHA-256 and the files that hold its rows; a digest over all of it comes last. Weights files bear their content's digest
in their names, so a new checkpoint never overwrites the files of the old one, and replacing config.json, one rename,
makes the new one valid at once.

Beside a model saved by transformers, whose own files hold the encoder's tensors, the folder `prefixmem` has this
config.json alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .sid.vocabulary import SIDVocabulary

if TYPE_CHECKING:
    from .encoder.modules import PrefixMem

FORMAT_VERSION = 1
FOLDER = "prefixmem"  # the encoder's folder beside a model
_CONFIG, _VOCABULARY = "config.json", "sid_vocabulary.json"
_CHUNK_BYTES = 64 << 20
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


class CheckpointError(ValueError):
    """A checkpoint is damaged, or is not what it is asked to be."""


def save_encoder(
    encoder: PrefixMem,
    path: str | Path,
    vocabulary: SIDVocabulary | None = None,
    *,
    max_shard_size: int | str = "2GB",
    weights: bool = True,
) -> None:
    """Write an encoder into a folder.

    Args:
        vocabulary: kept with it.
        max_shard_size: bytes of a weights file, or a string such as "500MB"; larger tables are split by rows.
        weights: False where a model's own files beside the folder hold the tensors; where they do not, they are
            written all the same.

    Raises:
        TypeError, ValueError: an argument is not as stated.
        OSError: the folder cannot be written; what was in it is left as it was.
    """
    from . import __version__

    limit = _bytes_of(max_shard_size)
    if vocabulary is not None:
        vocabulary.check_codebooks(encoder.config)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if (path / _CONFIG).is_file() and not _is_ours(path / _CONFIG):
        raise ValueError(f"{path / _CONFIG} belongs to something else, a model perhaps; give a folder of its own")
    replaced = _files_named(path)
    tensors = _tensors_of(encoder)
    entries = None if weights else _entries_in_model(list(tensors), path.parent)
    written: list[Path] = []
    try:
        if entries is None:
            entries = {name: _entry(_chunks_of(tensor)) for name, tensor in tensors.items()}
            for file, parts in _shards(tensors, entries, limit):
                _write_tensors(path / file, parts)
                written.append(path / file)
        _write_json(
            path / _CONFIG,
            {
                "format": "prefixmem",
                "format_version": FORMAT_VERSION,
                "package_version": __version__,
                "encoder": encoder.config.to_dict(),
                "vocabulary": None if vocabulary is None else vocabulary.to_dict(),
                "tensors": entries,
            },
        )
    except BaseException:
        for file in written:
            if file.name not in replaced:
                file.unlink(missing_ok=True)
        raise
    for name in replaced - _files_named(path):
        (path / name).unlink(missing_ok=True)


def load_encoder(
    kind: type[PrefixMem],
    path: str | Path,
    *,
    hidden_size: int | None = None,
    active_levels: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    **how: Any,
) -> PrefixMem:
    """Read what `save_encoder` wrote; see `PrefixMem.from_pretrained`."""
    folder = _folder(path)
    stored = _read_config(folder)
    try:
        config = kind.config_class.from_dict(stored["encoder"])
        fresh = hidden_size is not None and hidden_size != config.hidden_size
        if fresh:
            config = replace(config, hidden_size=hidden_size)
        if active_levels is not None:
            config = config.with_active_levels(active_levels)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / _CONFIG}: {error}") from error
    if dtype is None:
        dtype = getattr(torch, next(iter(stored["tensors"].values()))["dtype"])
    with torch.inference_mode(False), torch.no_grad():  # loaded while serving, it can still be trained
        made = kind(config, device="meta", dtype=dtype, **how)
        encoder = made.to_empty(device=device or torch.get_default_device())
        names = [name for name, _ in encoder.named_parameters() if not (fresh and name == "out_proj.weight")]
        _copy_weights(encoder, folder, stored, names, verify)
        if fresh:
            encoder.reset_output()
    return encoder


def kind_of_encoder(path: str | Path) -> str:
    """ "prefixmem" or "sid-transformer": what the folder of an encoder, or of a model saved with one, holds."""
    return _read_config(_folder(path))["encoder"].get("kind", "prefixmem")


def load_weights(encoder: PrefixMem, path: str | Path) -> None:
    """Read the tensors of a checkpoint into an encoder of the same spec and sizes; on an error it is left as it was.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another config; both are printed.
    """
    folder = _folder(path)
    stored = _read_config(folder)
    own = encoder.config.to_dict()
    free = ("memory_init_std", "output_init_std")  # how weights started does not matter any more
    names = [name for name in own if name not in free and stored["encoder"].get(name) != own[name]]
    if names:
        raise CheckpointError(
            f"{folder / _CONFIG} is of another encoder: it differs in {', '.join(names)}\n"
            f"  checkpoint: { {name: stored['encoder'].get(name) for name in names} }\n"
            f"  encoder:    { {name: own[name] for name in names} }"
        )
    _copy_weights(encoder, folder, stored, [name for name, _ in encoder.named_parameters()], verify=True)


def save_vocabulary(vocabulary: SIDVocabulary, path: str | Path) -> None:
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    values = {"format": "prefixmem vocabulary", "format_version": FORMAT_VERSION, "vocabulary": vocabulary.to_dict()}
    _write_json(path / _VOCABULARY, values)


def load_vocabulary(path: str | Path) -> SIDVocabulary:
    path = Path(path)
    if (path / _VOCABULARY).is_file():
        file = path / _VOCABULARY
        stored = _read_json(file, "prefixmem vocabulary")
    else:
        file = _folder(path) / _CONFIG
        stored = _read_config(file.parent)
    if stored.get("vocabulary") is None:
        raise CheckpointError(f"{file} holds no vocabulary; the encoder was saved without one")
    try:
        return SIDVocabulary.from_dict(stored["vocabulary"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from error


# Writing


def _tensors_of(encoder: PrefixMem) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in encoder.named_parameters()}


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


def _write_json(file: Path, values: dict[str, Any]) -> None:
    values = {**values, "digest": _digest(values)}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items())
    write_file(file, lambda temporary: Path(temporary).write_text("{\n" + lines + "\n}\n", encoding="utf-8"))


def write_file(file: Path, write: Any) -> None:
    """All of a file, or none of it: written under another name first."""
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    try:
        write(temporary)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp's files are the owner's alone
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _bytes_of(size: int | str) -> int:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMG]?I?B)", str(size).strip().upper())
    found = int(float(match[1]) * _UNITS[match[2]]) if match else size
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise ValueError(f'max_shard_size = {size!r} is no size; give bytes, or a string such as "2GB"')
    return found


# Reading


def _folder(path: str | Path) -> Path:
    """Where the config.json of an encoder is: in `path`, or in its folder beside a model."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder; give a local one that save_pretrained wrote")
    folder = path / FOLDER if (path / FOLDER / _CONFIG).is_file() else path
    if not (folder / _CONFIG).is_file():
        raise FileNotFoundError(f"{path} holds no encoder: neither {_CONFIG} nor {FOLDER}/{_CONFIG} is there")
    return folder


def _read_json(file: Path, kind: str) -> dict[str, Any]:
    from . import __version__

    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: it is not JSON ({error})") from None
    if not isinstance(stored, dict) or stored.get("format") != kind:
        found = stored.get("format") if isinstance(stored, dict) else type(stored).__name__
        raise CheckpointError(
            f"{file} is not of prefixmem_fast (its format is {found!r}), and {file.parent / FOLDER} is not there; "
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


def _read_config(folder: Path) -> dict[str, Any]:
    return _read_json(folder / _CONFIG, "prefixmem")


def _is_ours(file: Path) -> bool:
    """Whether a config.json is one of an encoder, sound or damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("format") == "prefixmem"
    except (AttributeError, UnicodeDecodeError, ValueError):
        return bool(list(file.parent.glob("memory-*.safetensors")))


def _files_named(folder: Path) -> set[str]:
    try:
        entries = _read_config(folder)["tensors"].values()
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
                            f"{file} holds {key} as {chunk.dtype}, rows of {tuple(chunk.shape[1:])}; {_CONFIG} says "
                            f"{dtype} {shape}"
                        )
                    yield chunk
                    rows += len(chunk)
            except FileNotFoundError:
                raise CheckpointError(f"{file} is not there, and {_CONFIG} names it for {self.name}") from None
        if rows != shape[0]:
            raise CheckpointError(f"the files hold {rows} rows of {self.name}; {_CONFIG} says {shape[0]}")

    def check(self) -> None:
        found = _entry(self.chunks())["sha256"]
        if found != self.entry["sha256"]:
            files = ", ".join(str(file) for file in dict.fromkeys(file for file, _ in self.parts))
            raise CheckpointError(
                f"{self.name} in {files} is damaged, or not the one that {_CONFIG} was saved with: its SHA-256 is "
                f"{found}, stored is {self.entry['sha256']}"
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
    found = next((name for name in files if name == key or name.endswith("." + key)), None)
    if found is None:
        raise CheckpointError(
            f"the model's files in {folder} hold no {key}; was the model saved with the encoder on it?"
        )
    return folder / files[found], found


def _copy_weights(encoder: PrefixMem, folder: Path, stored: dict[str, Any], names: list[str], verify: bool) -> None:
    targets = _tensors_of(encoder)
    sources = {}
    for name in names:
        entry = stored["tensors"].get(name)
        if entry is None or entry["shape"] != list(targets[name].shape):
            found = "is missing" if entry is None else f"has shape {entry['shape']}"
            raise CheckpointError(f"{folder / _CONFIG}: {name} {found}; the config needs {list(targets[name].shape)}")
        sources[name] = _Rows(name, entry, folder)
    if verify:
        for source in sources.values():
            source.check()
    for name, source in sources.items():
        start = 0
        for chunk in source.chunks():
            targets[name][start : start + len(chunk)].copy_(chunk)
            start += len(chunk)
