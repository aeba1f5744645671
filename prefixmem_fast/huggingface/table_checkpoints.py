"""Tables in the checkpoints of transformers' Trainer: divided ones, which its first process does not hold, and managed
ones under FSDP2, which are in no state_dict."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..checkpoint import write_tensors
from ..distributed import load_tables, save_tables
from ..distributed.ranks import on_first
from ..distributed.tables import memories_of
from ..encoder import PrefixMem
from ..encoder.prefixmem import is_beside_shards
from .hooks import NAME, unwrapped

FOLDER = "prefixmem_tables"  # in a checkpoint
REST = "prefixmem_rest.safetensors"  # there: W_out of an encoder on a PeftModel, whose checkpoints are adapters alone


class TableCheckpoints(TrainerCallback):
    """Has a Trainer save and resume tables and their optimizer's state: ``callbacks=[TableCheckpoints()]``.

    Each checkpoint gets a folder `prefixmem_tables`, see `prefixmem_fast.distributed.save_tables`. A run may be resumed
    with another number of processes, and divided tables as managed ones or the other way round. The tables of the best
    checkpoint come with `load_best_model_at_end`. What `Trainer.save_model` writes is no checkpoint and has no divided
    tables: call `prefixmem_fast.distributed.save_pretrained` on every rank.

    Args:
        resume_from: the checkpoint that `Trainer.train` is given, where it is not one of the Trainer's `output_dir`.

    Raises:
        FileNotFoundError, ValueError: at the start of a run that is resumed, its checkpoint has no tables, or the one
            of `output_dir` is of another run.
    """

    def __init__(self, resume_from: str | Path | None = None) -> None:
        self.resume_from = resume_from

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for memory in memories_of(model).values():
            if memory.division is not None:
                memory.division.saved_apart = True

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        checkpoint = _checkpoint(args, state)
        save_tables(model, checkpoint / FOLDER)
        if hasattr(model, "peft_config") and _are_divided(model):
            on_first(lambda: _save_rest(model, checkpoint))

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if args.max_grad_norm and any(memory.managed for memory in memories_of(model).values()):
            warnings.warn(
                f"max_grad_norm = {args.max_grad_norm} does not reach managed or divided tables, which train "
                "unclipped; give max_grad_norm=0, or clip with prefixmem_fast.optim.clip_grad_norm_(model, ...)",
                stacklevel=2,
            )
        if not state.global_step:
            return
        checkpoint = _checkpoint(args, state) if self.resume_from is None else Path(self.resume_from)
        found = (checkpoint / FOLDER).is_dir()
        if found and self.resume_from is None and not _is_of_this_run(checkpoint, state):
            raise ValueError(
                f"{checkpoint} is of another run than the one that is resumed; give "
                "TableCheckpoints(resume_from=...) the checkpoint that Trainer.train is given"
            )
        if found:
            _load(model, checkpoint)
        elif _are_divided(model) or _are_beside_shards(model):  # in no other file of a checkpoint, nor is their state
            raise FileNotFoundError(
                f"{checkpoint} has no {FOLDER}, from which this run reads its tables and their optimizer's state; give "
                "TableCheckpoints(resume_from=...) the checkpoint that Trainer.train is given"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None and (Path(best) / FOLDER).is_dir():
            _load(model, Path(best))


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _is_of_this_run(checkpoint: Path, state: Any) -> bool:
    """Whether the losses there are those that the Trainer has read; nothing else tells where it has read them."""
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return json.dumps(log) == json.dumps(state.log_history)


def _are_divided(model: nn.Module) -> bool:
    return any(memory.division is not None for memory in memories_of(model).values())


def _are_beside_shards(model: nn.Module) -> bool:
    return any(is_beside_shards(module) for module in model.modules() if isinstance(module, PrefixMem))


def _save_rest(model: nn.Module, checkpoint: Path) -> None:
    """An encoder's tensors but its divided tables."""
    rest = unwrapped(getattr(model, NAME)).state_dict()
    write_tensors(checkpoint / REST, {name: tensor.contiguous() for name, tensor in rest.items()})


def _load(model: nn.Module, checkpoint: Path) -> None:
    load_tables(model, checkpoint / FOLDER)
    if (checkpoint / REST).is_file():
        from safetensors.torch import load_file

        unwrapped(getattr(model, NAME)).load_state_dict(load_file(checkpoint / REST), strict=False)
