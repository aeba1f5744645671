"""Tables in the checkpoints of transformers' Trainer: divided ones, which its first process does not hold, and managed
ones under FSDP2, which are in no state_dict."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..distributed import load_tables, save_tables
from ..distributed.tables import memories_of

FOLDER = "prefixmem_tables"  # in a checkpoint


class TableCheckpoints(TrainerCallback):
    """Has a Trainer save and resume tables and their optimizer's state: ``callbacks=[TableCheckpoints()]``.

    Each checkpoint gets a folder `prefixmem_tables`, see `prefixmem_fast.distributed.save_tables`. A run may be resumed
    with another number of processes and in another layout.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for memory in memories_of(model).values():
            if memory.division is not None:
                memory.division.saved_apart = True

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        save_tables(model, _checkpoint(args, state) / FOLDER)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if args.max_grad_norm and any(memory.managed for memory in memories_of(model).values()):
            warnings.warn(
                f"max_grad_norm = {args.max_grad_norm} does not reach managed or divided tables, which train "
                "unclipped; give max_grad_norm=0, or clip with prefixmem_fast.optim.clip_grad_norm_(model, ...)",
                stacklevel=2,
            )
        folder = _checkpoint(args, state) / FOLDER
        if state.global_step and folder.is_dir():
            load_tables(model, folder)


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
