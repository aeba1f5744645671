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
    identity,
    parts_of,
    weights_in,
    write_json,
    write_tensors,
)
from ..encoder import PrefixMem, PrefixMemory
from ..encoder.saving import check_merged, is_part, save_encoder, tensors_of
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
        state = _whole_state_dict(model)
        on_first(lambda: type(model).save_pretrained(model, folder, state_dict=state))
        folder = folder / FOLDER
    if not isinstance(encoder, PrefixMem):
        raise TypeError(f"model is a {type(model).__name__}; give a PrefixMem, or a model that one is attached to")
    if attachment is None:
        check_merged(encoder)
    if not any(memory.division for memory in memories_of(encoder).values()):
        options = {"max_shard_size": max_shard_size, "whole": _whole_state_dict(encoder)}
        on_first(lambda: save_encoder(encoder, folder, vocabulary, **options))
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
        config: tuple[int, ...] | None = None

        def look() -> None:
            nonlocal config
            if not folder.is_dir():
                raise OSError(f"{folder} is not there on rank {rank()}; give a folder that all ranks share")
            before.update(weights_in(folder))
            replaced.update(files_named(folder))
            config = identity(folder / CONFIG)

        on_all(look)
        own = _rows_here(encoder, _whole_state_dict(encoder) or {}, limit)
        of_ranks = gathered({place: entry_of(chunks_of(rows)) for place, rows in own.items()})
        parts = {place: entry for found in of_ranks for place, entry in sorted(found.items())}
        name = hashlib.sha256("".join(parts[place]["sha256"] for place in sorted(parts)).encode()).hexdigest()[:12]
        file_of = {
            place: f"memory-{name}-{n:05}-of-{len(parts):05}.safetensors" for n, place in enumerate(parts, start=1)
        }
        written: list[Path] = []

        def write() -> None:
            for place, rows in own.items():
                written.append(folder / file_of[place])
                write_tensors(written[-1], {place[0]: rows.contiguous()})

        def finish() -> None:
            missing = [file for file in file_of.values() if not (folder / file).is_file()]
            if missing:
                raise OSError(f"{folder} has no {missing[0]} of another rank; give a folder that all ranks share")
            entries: dict[str, Any] = defaultdict(lambda: {"shape": [0], "parts": []})
            for place, part in sorted(parts.items()):
                entry, (count, *width) = entries[place[0]], part["shape"]
                entry |= {"dtype": part["dtype"], "shape": [entry["shape"][0] + count, *width]}
                where = {"file": file_of[place], "key": place[0], "rows": count}
                entry["parts"].append({**where, "sha256": part["sha256"]})
            tensors = {tensor: entries[tensor] for tensor in tensors_of(encoder)}
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

        try:
            on_all(write)
            on_first(finish)
        except BaseException:
            if identity(folder / CONFIG) == config:  # a config.json that is new names the new files
                for file in written:
                    if file.name not in before:
                        file.unlink(missing_ok=True)
            raise


def _whole_state_dict(module: nn.Module) -> dict[str, Tensor] | None:
    """The state_dict of a module that FSDP2 or ZeRO 3 has divided, whole, for the first rank; None of others.

    Collective.
    """
    state = module.state_dict(keep_vars=True)
    if not any(is_part(tensor) for tensor in state.values()):
        return None
    whole: dict[int, Tensor] = {}  # tied parameters stay one
    for tensor in state.values():
        if is_part(tensor) and id(tensor) not in whole:
            put_together = _put_together(tensor)
            whole[id(tensor)] = put_together.cpu() if rank() == 0 else tensor
    return {name: whole.get(id(tensor), tensor).detach() for name, tensor in state.items()}


def _put_together(tensor: Tensor) -> Tensor:
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor()


def _rows_here(encoder: PrefixMem, whole: dict[str, Tensor], limit: int) -> dict[tuple[str, int], Tensor]:
    """The rows that this rank writes, by tensor and first row; of ranks that hold copies, one writes."""
    memories = {
        f"{name}.weight": memory for name, memory in memories_of(encoder).items() if memory.division is not None
    }
    rows: dict[tuple[str, int], Tensor] = {}
    for name, tensor in tensors_of(encoder, whole).items():
        blocks = [(0, tensor)] if rank() == 0 else []
        if name in memories:
            blocks = _neighbours(memories[name]) if memories[name].division.is_first_copy else []
        for first, block in blocks:
            rows |= _split(name, first, block, limit)
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
