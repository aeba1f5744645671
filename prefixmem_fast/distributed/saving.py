"""The folder of an encoder whose tables are divided: every rank writes its own rows, and the first one config.json."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._files import locked, remove_leftovers
from .._version import __version__
from .._weights import CONFIG, FOLDER, WEIGHTS, chunks_of, entry_of
from ..checkpoint import (
    PARTS_VERSION,
    bytes_of,
    check_replaceable,
    files_named,
    parts_of,
    weights_in,
    write_json,
    write_tensors,
)
from ..encoder import PrefixMem, PrefixMemory
from ..sid import SIDVocabulary
from .ranks import gathered, on_all, on_first, rank
from .tables import blocks_of, memories_of


def save_pretrained(
    model: nn.Module, folder: str | Path, vocabulary: SIDVocabulary | None = None, *, max_shard_size: int | str = "2GB"
) -> None:
    """Save an encoder, or a model of transformers with one attached, whose tables are divided. Collective.

    Every rank calls it, and reaches the folder. What one process reads with `PrefixMem.from_pretrained`, or attaches
    again from a model's folder, is what `save_pretrained` of whole tables would have written.

    Args:
        model: a `PrefixMem`, or a model with one attached.
        folder, max_shard_size: as for `PrefixMem.save_pretrained`.
        vocabulary: of the encoder; an attached one has its own.

    Raises:
        TypeError, ValueError: an argument is not as stated.
        OSError: the folder cannot be written; the encoder that was in it is left as it was.
    """
    folder, encoder = Path(folder), model
    attachment = getattr(model, "prefixmem_attachment", None)
    if attachment is not None:
        encoder, vocabulary = attachment.encoder, attachment.vocabulary
        on_first(lambda: type(model).save_pretrained(model, folder))
        folder = folder / FOLDER
    if not isinstance(encoder, PrefixMem):
        raise TypeError(f"model is a {type(model).__name__}; give a PrefixMem, or a model that one is attached to")
    if not any(memory.division for memory in memories_of(encoder).values()):
        on_first(lambda: encoder.save_pretrained(folder, vocabulary, max_shard_size=max_shard_size))
        return
    _save(encoder, folder, vocabulary, bytes_of(max_shard_size))


def _save(encoder: PrefixMem, folder: Path, vocabulary: SIDVocabulary | None, limit: int) -> None:
    if vocabulary is not None:
        vocabulary.check_codebooks(encoder.config)
    with ExitStack() as held:

        def begin() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder))
            check_replaceable(folder / CONFIG, "prefixmem")
            remove_leftovers(folder, rf"{WEIGHTS}|config\.json")

        on_first(begin)
        before: set[str] = set()
        replaced: set[str] = set()

        def look() -> None:
            if not folder.is_dir():
                raise OSError(f"{folder} is not there on rank {rank()}; give a folder that all ranks share")
            before.update(weights_in(folder))
            replaced.update(files_named(folder))

        on_all(look)
        own = _rows_here(encoder, limit)
        digests = {place: entry_of(chunks_of(rows))["sha256"] for place, rows in own.items()}
        all_digests = {place: digest for found in gathered(digests) for place, digest in found.items()}
        name = hashlib.sha256("".join(all_digests[place] for place in sorted(all_digests)).encode()).hexdigest()[:12]
        places = [sorted(found) for found in gathered(list(own))]
        written: list[Path] = []
        files = {place: (r, i) for r, found in enumerate(places) for i, place in enumerate(found)}
        number = {place: n for n, place in enumerate(sorted(files, key=files.__getitem__), start=1)}
        file_of = {place: f"memory-{name}-{n:05}-of-{len(number):05}.safetensors" for place, n in number.items()}

        def write() -> None:
            for place, rows in own.items():
                written.append(folder / file_of[place])
                write_tensors(written[-1], {place[0]: rows.contiguous()})

        def finish() -> None:
            missing = [file for file in file_of.values() if not (folder / file).is_file()]
            if missing:
                raise OSError(f"{folder} has no {missing[0]} of another rank; give a folder that all ranks share")
            entries: dict[str, Any] = defaultdict(lambda: {"shape": [0], "parts": []})
            for place in sorted(file_of):
                entry, (count, shape, dtype) = entries[place[0]], sizes[place]
                entry |= {"dtype": dtype, "shape": [entry["shape"][0] + count, *shape]}
                part = {"file": file_of[place], "key": place[0], "rows": count, "sha256": all_digests[place]}
                entry["parts"].append(part)
            tensors = {tensor: entries[tensor] for tensor in _names(encoder)}
            values = {
                "package_version": __version__,
                "encoder": encoder.config.to_dict(),
                "vocabulary": None if vocabulary is None else vocabulary.to_dict(),
                "tensors": tensors,
            }
            write_json(folder / CONFIG, "prefixmem", values, PARTS_VERSION)
            for old in replaced - parts_of(tensors):
                with suppress(OSError):
                    (folder / old).unlink()

        described = {p: (len(t), list(t.shape[1:]), str(t.dtype).removeprefix("torch.")) for p, t in own.items()}
        sizes = {place: size for found in gathered(described) for place, size in found.items()}
        try:
            on_all(write)
            on_first(finish)
        except BaseException:
            for file in written:
                if file.name not in before:
                    file.unlink(missing_ok=True)
            raise


def _names(encoder: PrefixMem) -> list[str]:
    """Names of the tensors of a whole encoder, tables first: readers take the dtype from the first."""
    tables = [f"{name}.weight" for name in memories_of(encoder)]
    return [*tables, *(name for name, _ in encoder.named_parameters() if name not in tables)]


def _rows_here(encoder: PrefixMem, limit: int) -> dict[tuple[str, int], Tensor]:
    """The rows that this rank writes, by tensor and first row; of ranks that hold copies, one writes."""
    rows: dict[tuple[str, int], Tensor] = {}
    for name, memory in memories_of(encoder).items():
        division = memory.division
        if division is None:
            if rank() == 0:
                rows |= _split(f"{name}.weight", 0, memory.weight.detach(), limit)
        elif division.is_first_copy:
            for start, block in _neighbours(memory):
                rows |= _split(f"{name}.weight", start, block, limit)
    if rank() == 0:
        tables = {f"{name}.weight" for name in memories_of(encoder)}
        for name, tensor in encoder.named_parameters():
            if name not in tables:
                rows |= _split(name, 0, tensor.detach(), limit)
    return rows


def _neighbours(memory: PrefixMemory) -> list[tuple[int, Tensor]]:
    """The rows of each order, which lie together here and in the whole table, with their first row there."""
    weight, found = memory.weight.detach(), {}
    for order, _, here, there in blocks_of(memory):
        first = found.setdefault(order, [here.start, here.stop, there.start])
        first[1] = here.stop
    return [(first, weight[start:stop]) for start, stop, first in found.values()]


def _split(name: str, first: int, rows: Tensor, limit: int) -> dict[tuple[str, int], Tensor]:
    step = max(limit // max(rows[:1].numel() * rows.element_size(), 1), 1)
    return {(name, first + start): rows[start : start + step] for start in range(0, len(rows), step)}
