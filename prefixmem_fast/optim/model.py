"""One optimizer for a model with an encoder: rows of the tables one way, W_out and everything else by AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..encoder import PrefixMem, PrefixMemory, SIDTransformer
from .rows import RowOptimizer, RowWiseAdagrad, restore_state


def for_model(
    model: nn.Module,
    lr: float = 1e-4,
    *,
    encoder_lr_multiple: float = 5.0,
    rows: type[RowOptimizer] = RowWiseAdagrad,
    row_options: dict[str, Any] | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    muon_lr: float | None = None,
    encoder_needed: bool = True,
) -> ModelOptimizer:
    """The optimizer of a whole model: one torch optimizer, for Hugging Face's Trainer and any other loop.

    Args:
        model: a module that holds a `PrefixMem` or `PrefixMemory` somewhere, or is one.
        lr: learning rate of the model.
        encoder_lr_multiple: the encoder's learning rate, tables and W_out, over the model's; the paper takes 5.
        rows: optimizer of the tables trained with grad="sparse" or "fused"; with "dense" they go to AdamW too.
        row_options: its arguments beside the learning rate.
        betas, eps: of AdamW.
        weight_decay: of AdamW and Muon, for parameters of two dimensions and more; tables take `row_options`.
        muon_lr: if given, torch.optim.Muon (torch 2.9 or newer) at this rate for the model's matrices but embeddings
            and the output layer.
        encoder_needed: False takes a model without an encoder too, for comparisons.

    Raises:
        TypeError, ValueError: an argument is not as stated, or the model holds no encoder.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give a torch module")
    if not (isinstance(rows, type) and issubclass(rows, RowOptimizer)):
        raise TypeError(f"rows = {rows!r}; give a class of prefixmem_fast.optim, such as RowWiseAdagrad")
    for name, value in (("lr", lr), ("encoder_lr_multiple", encoder_lr_multiple)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"{name} = {value!r} is not a finite number of 0 or more")
    if muon_lr is not None and not hasattr(torch.optim, "Muon"):
        raise ValueError(f"muon_lr = {muon_lr!r} needs torch 2.9 or newer, this is {torch.__version__}; leave it out")
    if encoder_needed and not any(isinstance(module, PrefixMemory) for module in model.modules()):
        raise ValueError(f"model, a {type(model).__name__}, holds no PrefixMem; attach one, or use torch.optim.AdamW")
    memories = [module for module in model.modules() if isinstance(module, PrefixMemory)]
    tables = _trainable(memory.weight for memory in memories if memory.grad != "dense")
    encoders = [module for module in model.modules() if isinstance(module, (PrefixMem, PrefixMemory, SIDTransformer))]
    taken = {id(table) for table in tables}
    encoder = [p for p in _trainable(p for e in encoders for p in e.parameters()) if id(p) not in taken]
    taken |= {id(p) for p in encoder}
    rest = [p for p in _trainable(model.parameters()) if id(p) not in taken]

    hidden = _hidden_matrices(model, rest) if muon_lr is not None else []
    rest = [p for p in rest if all(p is not q for q in hidden)]

    encoder_lr = lr * encoder_lr_multiple
    groups = [
        {"params": group, "lr": rate, "weight_decay": weight_decay if decayed else 0.0}
        for parameters, rate in ((encoder, encoder_lr), (rest, lr))
        for decayed in (True, False)
        if (group := [p for p in parameters if (p.dim() >= 2) == decayed])
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if tables:
        optimizers.append(rows(tables, encoder_lr, **(row_options or {})))
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr, betas, eps))
    if hidden:
        optimizers.append(torch.optim.Muon(hidden, muon_lr, weight_decay))
    return ModelOptimizer(*optimizers)


def _hidden_matrices(model: nn.Module, among: list[nn.Parameter]) -> list[nn.Parameter]:
    """Matrices that map hidden states to hidden states."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embeddings |= {id(p) for p in head.parameters()} if head is not None else set()
    return [p for p in among if p.dim() == 2 and id(p) not in embeddings]


def _trainable(parameters) -> list[nn.Parameter]:
    return list(dict.fromkeys(p for p in parameters if p.requires_grad))


class ModelOptimizer(torch.optim.Optimizer):
    """Several optimizers as one: their groups and their state, in one state_dict, under one schedule.

    Args:
        optimizers: the optimizers, at least one.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self._optimizers = list(optimizers)
        if not self._optimizers:
            raise ValueError("the model has no parameter that requires a gradient")
        self._sizes = [len(optimizer.param_groups) for optimizer in self._optimizers]
        super().__init__([group for optimizer in self._optimizers for group in optimizer.param_groups], {})
        self._share()

    def _share(self) -> None:
        """The optimizers work on this optimizer's groups and state: a schedule or a loaded state reaches all."""
        start = 0
        for optimizer, size in zip(self._optimizers, self._sizes, strict=True):
            optimizer.param_groups = self.param_groups[start : start + size]
            optimizer.state = self.state
            start += size

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self._optimizers:
            optimizer.step()
        return loss

    def release(self) -> None:
        """Let go of the tables, see `RowOptimizer.release`."""
        for optimizer in self._optimizers:
            if isinstance(optimizer, RowOptimizer):
                optimizer.release()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        restore_state(self, state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()
