"""Encoders to and from folders: what `save_pretrained` and `from_pretrained` of `PrefixMem` and `SIDTransformer` do."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import checkpoint
from .._choices import DTYPES
from .._inputs import clipped
from .._pages import ask_for_huge_pages
from .._weights import SAVE_AGAIN
from ..checkpoint import CONFIG, CheckpointError
from ..sid import SIDVocabulary
from .host_tables import MappedTable

_TABLE = "memory.weight"  # the tables of cross-item orders have a name before it, as has their W_out
_OUTPUT = re.compile(r"(cross_item\.)*(out_proj|head_proj)\.weight")
_HOW_WEIGHTS_STARTED = ("memory_init_std", "output_init_std")  # does not matter any more once they are read


class Encoder(Protocol):
    """A module with a config, as `PrefixMem` and `SIDTransformer` are."""

    config_class: type
    config: Any

    def reset_output(self) -> None:
        """Start W_out afresh."""


def save_encoder(
    encoder: Encoder,
    path: str | Path,
    vocabulary: SIDVocabulary | None = None,
    *,
    max_shard_size: int | str = "2GB",
    weights: bool = True,
    whole: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an encoder into a folder; see `checkpoint.save`.

    Args:
        whole: by name, what is written in place of the encoder's own tensors: those that FSDP2 or ZeRO 3 has divided.

    Raises:
        ValueError: the vocabulary's codebooks are not the encoder's, an argument is not as stated, or a tensor is
            divided over processes and not in `whole`.
        OSError: the folder cannot be written; what was in it is left as it was.
    """
    if vocabulary is not None:
        vocabulary.check_codebooks(encoder.config)
    for module in encoder.modules():
        if getattr(module, "division", None) is not None:
            module.division.save(encoder, Path(path), vocabulary, max_shard_size)
            return
    values = None if vocabulary is None else vocabulary.to_dict()
    for name, parameter in encoder.named_parameters():
        if is_part(parameter) and name not in (whole or {}):  # all processes put it together, and this may be one
            raise ValueError(
                f"{name} is divided over processes, by FSDP2 or DeepSpeed; call "
                "prefixmem_fast.distributed.save_pretrained on every rank, or the model's save_pretrained with "
                "state_dict=accelerator.get_state_dict(model)"
            )
    tensors = {name: tensor.contiguous() for name, tensor in tensors_of(encoder, whole).items()}
    checkpoint.save(
        Path(path), encoder.config.to_dict(), values, tensors, max_shard_size=max_shard_size, weights=weights
    )


def load_encoder(
    kind: type[Encoder],
    path: str | Path,
    *,
    hidden_size: int | None = None,
    active_levels: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    **options: Any,
) -> Encoder:
    """Read what `save_encoder` wrote; see `PrefixMem.from_pretrained`.

    Raises:
        MemoryError: the files are sound, and the tensors do not fit the memory.
    """

    def load(folder: Path, stored: dict[str, Any]) -> Encoder:
        config, fresh = _config_of(kind, folder, stored, hidden_size, active_levels)
        first = next(iter(stored["tensors"].values()))  # a parameter
        if first["dtype"] not in DTYPES:
            raise CheckpointError(f"{folder / CONFIG}: its first tensor is of {first['dtype']}; {SAVE_AGAIN}")
        stored_dtype = getattr(torch, first["dtype"])
        with torch.inference_mode(False), torch.no_grad():  # loaded while serving, it can still be trained
            encoder = _on_meta(kind, config, folder, dtype=dtype or stored_dtype, **options)
            names = [name for name in tensors_of(encoder) if not (fresh and _OUTPUT.fullmatch(name))]
            wanted = {name: tensors_of(encoder)[name] for name in names}
            sources = checkpoint.check_tensors(wanted, folder, stored)
            if options.get("tables") == "mapped":
                for name in [name for name in names if name.endswith(_TABLE)]:
                    _check_dtype(dtype, sources[name].dtype)
                    memory = encoder.get_submodule(name.rpartition(".")[0])
                    memory.weight = MappedTable(sources[name].mapped(verify=verify), requires_grad=False)
                    names.remove(name)
            try:
                encoder = encoder.to_empty(device=device or torch.get_default_device())
            except RuntimeError as error:
                if "alloc" not in str(error) and "memory" not in str(error):
                    raise
                size = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(encoder).values())
                raise MemoryError(f"{folder}: the encoder takes {size} bytes, more than there is ({error})") from None
            targets = {name: tensor for name, tensor in tensors_of(encoder).items() if name in names}
            for tensor in targets.values():
                ask_for_huge_pages(tensor)
            checkpoint.copy_tensors(targets, folder, stored, verify=verify)
            if fresh:
                encoder.reset_output()
        return encoder

    return checkpoint.read_with(path, load)


def _config_of(
    kind: type[Encoder],
    folder: Path,
    stored: dict[str, Any],
    hidden_size: int | None,
    active_levels: Sequence[int] | None,
) -> tuple[Any, bool]:
    """The config to build, and whether W_out is of another width than the stored one."""
    try:
        large = [name for name, value in stored["encoder"].items() if isinstance(value, int) and value >= 1 << 63]
        if large:
            raise ValueError(f"{large[0]} = {stored['encoder'][large[0]]} is above 2^63 - 1")
        config = kind.config_class.from_dict(stored["encoder"])
        fresh = hidden_size is not None and hidden_size != config.hidden_size
        if fresh:
            if getattr(config, "quantization", None) is not None:
                raise ValueError(
                    f"hidden_size = {hidden_size}, and the encoder, which is quantized and not trained, has "
                    f"{config.hidden_size}; W_out cannot start afresh"
                )
            config = config.with_hidden_size(hidden_size)
        if active_levels is not None:
            config = config.with_active_levels(active_levels)
        if config.hidden_size is None:
            raise ValueError("hidden_size is null; give one")
        if getattr(config, "layers", 0) > len(stored["tensors"]):
            raise ValueError(f"layers = {config.layers}, but there are {len(stored['tensors'])} tensors")
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{folder / CONFIG}: {clipped(error, 2000)}") from error
    return config, fresh


def _check_dtype(dtype: torch.dtype | None, stored: torch.dtype) -> None:
    if dtype not in (None, stored):
        raise ValueError(
            f'dtype = {dtype}, and tables="mapped" reads the file as it is, in {stored}; leave dtype out, or load with '
            'tables="host"'
        )


def _on_meta(kind: type[Encoder], config: Any, folder: Path, **options: Any) -> Encoder:
    try:
        return kind(config, device="meta", **options)
    except (OverflowError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{folder / CONFIG}: no tensors can be of the sizes of the config ({reason})") from error


def kind_of_encoder(path: str | Path) -> str:
    """ "prefixmem" or "sid-transformer": what the folder of an encoder, or of a model saved with one, holds."""
    return checkpoint.read(path)[1]["encoder"].get("kind", "prefixmem")


def load_weights(encoder: Encoder, path: str | Path) -> bool:
    """Read the tensors of a checkpoint into an encoder of the same spec and sizes; on an error it is left as it was.

    Returns:
        whether the encoder held anything else before.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another config; both are printed.
    """

    def load(folder: Path, stored: dict[str, Any]) -> bool:
        for module in encoder.modules():
            if hasattr(module, "before_write"):
                module.before_write()
        own, saved = same_weights(encoder.config.to_dict()), same_weights(stored["encoder"])
        names = [name for name in dict.fromkeys((*own, *saved)) if saved.get(name) != own.get(name)]
        if names:
            values = json.dumps({name: saved.get(name) for name in names})[:4000]
            raise CheckpointError(
                f"{folder / CONFIG} is of another encoder: it differs in {', '.join(names)}\n"
                f"  checkpoint: {values}\n  encoder:    {json.dumps({name: own.get(name) for name in names})[:4000]}"
            )
        return checkpoint.copy_tensors(tensors_of(encoder), folder, stored)

    return checkpoint.read_with(path, load)


def same_weights(config: dict[str, Any]) -> dict[str, Any]:
    """The entries of a config, and of those within it, that weights have to agree in."""
    return {
        name: same_weights(value) if name == "cross_item" and isinstance(value, dict) else value
        for name, value in config.items()
        if name not in _HOW_WEIGHTS_STARTED
    }


def is_part(tensor: Tensor) -> bool:
    """Whether a parameter is a DTensor, as FSDP2 leaves it, or one that DeepSpeed's ZeRO 3 has divided."""
    return hasattr(tensor, "device_mesh") or hasattr(tensor, "ds_id")


def check_merged(encoder: Encoder) -> None:
    """Raises ValueError where PEFT has put adapters around a projection: they are none of the encoder's tensors."""
    for name, module in encoder.named_modules():
        if hasattr(module, "base_layer"):
            raise ValueError(
                f"{name} has adapters of PEFT on it, which would be left out; merge them first, by the PeftModel's "
                "merge_and_unload(), or save the PeftModel"
            )


def tensors_of(encoder: Encoder, whole: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Parameters, then buffers: what a quantized encoder keeps its tables in. Managed tables come first, by name.

    Those of `whole` take the place of the encoder's own. Of a projection that PEFT has wrapped it is the weight alone:
    PEFT saves and loads its adapters.
    """
    managed = {
        f"{name}.weight" if name else "weight": module.weight
        for name, module in encoder.named_modules()
        if getattr(module, "managed", False)
    }
    tensors = {**managed, **dict(encoder.named_parameters()), **dict(encoder.named_buffers())}
    tensors = {name: (whole or {}).get(name, tensor) for name, tensor in tensors.items()}
    for wrapper in [f"{name}." for name, module in encoder.named_modules() if hasattr(module, "base_layer")]:
        own = f"{wrapper}base_layer."
        tensors = {
            name.replace(own, wrapper, 1): tensor
            for name, tensor in tensors.items()
            if name.startswith(own) or not name.startswith(wrapper)
        }
    return {name: tensor.detach() for name, tensor in tensors.items()}
