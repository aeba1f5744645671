"""The tables of a model that processes train together, and how they are kept from what wraps the model."""

from __future__ import annotations

import os

import torch.distributed as dist
from torch import nn

from ..addressing import AddressSpec
from ..encoder import PrefixMemory, QuantizedMemory
from ..encoder.saving import is_part
from ..operation.table_state import table_state
from .ranks import several

_IGNORED = "_ddp_params_and_buffers_to_ignore"  # where DistributedDataParallel looks


def memories_of(model: nn.Module) -> dict[str, PrefixMemory]:
    """The memories in a model by their names in it, each once; quantized ones, which do not train, are left out."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give a torch module that holds a PrefixMem")
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PrefixMemory) and not isinstance(module, QuantizedMemory)
    }
    if not found:
        raise ValueError(f"model, a {type(model).__name__}, holds no PrefixMem with tables to train; attach one first")
    return found


def trained_by_rows(model: nn.Module, *, meta: bool = False) -> dict[str, PrefixMemory]:
    """`memories_of`, all of which have to be trained by rows, on one process so far.

    Args:
        meta: whether they may be without memory.

    Raises:
        TypeError, ValueError: they are not.
    """
    memories = memories_of(model)
    for name, memory in memories.items():
        where = name or type(memory).__name__
        if memory.grad == "dense":
            raise ValueError(
                f'{where} has grad="dense", whose gradient DistributedDataParallel and FSDP reduce by themselves; give '
                'the encoder grad="sparse" or grad="fused", or leave this call out'
            )
        if memory.tables == "mapped":
            raise ValueError(f'{where} has tables="mapped", which is not trained; load the encoder with tables="host"')
        if is_part(memory.weight):
            raise ValueError(
                f"{where} is divided by DeepSpeed or FSDP already; make this call before they wrap the model"
            )
        if memory.weight.is_meta and not meta:
            raise ValueError(f"{where} is on the meta device; load its tables before this call")
        if table_state(memory.weight).exchange is not None:
            raise ValueError(f"{where} is replicated or divided already; one call is enough")
    return memories


def process_group_is_needed() -> bool:
    """Whether there are several processes.

    Raises:
        ValueError: torchrun has started several, and they have not met yet.
    """
    met = dist.is_available() and dist.is_initialized()
    if not met and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']}, and torch.distributed is not initialised; call this after "
            "torch.distributed.init_process_group(), which Hugging Face's TrainingArguments and Accelerator call too"
        )
    return several()


def hide_from_ddp(model: nn.Module, name: str) -> None:
    """Have DistributedDataParallel ignore the table of a memory, whichever module from `model` down it wraps."""
    parts = name.split(".") if name else []
    for depth in range(len(parts) + 1):
        module = model.get_submodule(".".join(parts[:depth]))
        ignored = [*getattr(module, _IGNORED, ()), ".".join([*parts[depth:], "weight"])]
        setattr(module, _IGNORED, ignored)


def blocks_of(memory: PrefixMemory) -> list[tuple[int, int, slice, slice]]:
    """(order, head, its rows here, its rows in the whole table) of the tables that are here, all counted from 0."""
    own = memory.config.spec
    return blocks_within(own if memory.division is None else memory.division.config.spec, own)


def blocks_within(whole: AddressSpec, own: AddressSpec) -> list[tuple[int, int, slice, slice]]:
    """The same of a spec for some of another's heads."""
    first, _ = own.place
    return [
        (n, first + h, _rows(own, n, h), _rows(whole, n, first + h))
        for n in range(own.max_order)
        for h in range(own.heads)
        if own.rows_per_order[n]
    ]


def _rows(spec: AddressSpec, order: int, head: int) -> slice:
    start = spec.offsets[order][head]
    return slice(start, start + spec.rows_per_order[order])
