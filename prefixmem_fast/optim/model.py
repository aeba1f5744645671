"""One optimizer for a model with an encoder: rows of the tables one way, W_out and everything else by AdamW."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..encoder import PrefixMem, PrefixMemory, QuantizedMemory, SIDTransformer
from ..operation.table_state import table_state
from .rows import RowOptimizer, RowWiseAdagrad, WaitsForUpdates, check_state, is_table, restore_state


def for_model(
    model: nn.Module,
    lr: float = 1e-4,
    *,
    encoder_lr_multiple: float = 5.0,
    rows: type[RowOptimizer] = RowWiseAdagrad,
    row_options: dict[str, Any] | None = None,
    cross_item_lr: float | None = None,
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
        cross_item_lr: the learning rate of those tables of cross-item orders, where it is not the encoder's.
        betas, eps: of AdamW.
        weight_decay: of AdamW and Muon, for parameters of two dimensions and more; tables take `row_options`.
        muon_lr: if given, torch.optim.Muon (torch 2.9 or newer) at this rate for the model's matrices but embeddings
            and the output layer.
        encoder_needed: False takes a model without an encoder too, for comparisons.

    Raises:
        TypeError, ValueError: an argument is not as stated, or the model holds no encoder, or a quantized one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give a torch module")
    if not (isinstance(rows, type) and issubclass(rows, RowOptimizer)):
        raise TypeError(f"rows = {rows!r}; give a class of prefixmem_fast.optim, such as RowWiseAdagrad")
    rates = {"lr": lr, "encoder_lr_multiple": encoder_lr_multiple, "weight_decay": weight_decay}
    optional = {"muon_lr": muon_lr, "cross_item_lr": cross_item_lr}
    for name, value in {**rates, **{name: value for name, value in optional.items() if value is not None}}.items():
        _checks.not_negative(name, value)
    if muon_lr is not None and not hasattr(torch.optim, "Muon"):
        raise ValueError(f"muon_lr = {muon_lr!r} needs torch 2.9 or newer, this is {torch.__version__}; leave it out")
    if encoder_needed and not any(isinstance(module, PrefixMemory) for module in model.modules()):
        raise ValueError(f"model, a {type(model).__name__}, holds no PrefixMem; attach one, or use torch.optim.AdamW")
    memories = [module for module in model.modules() if isinstance(module, PrefixMemory)]
    if any(isinstance(memory, QuantizedMemory) for memory in memories):
        raise ValueError(
            f"model, a {type(model).__name__}, holds a quantized encoder, which is not trained; train the one that it "
            "was made from, then quantize() that"
        )
    apart = _trainable(memory.weight for memory in memories if memory.managed)
    tables = _trainable(memory.weight for memory in memories if memory.grad != "dense" and not memory.managed)
    across = _trainable(m.weight for m in memories if m.grad != "dense" and m.config.spec.history)
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

    def optimizer_of(tables: list[nn.Parameter]) -> RowOptimizer:
        taken = {id(table) for table in across}
        groups = [
            {"params": [table for table in tables if id(table) not in taken]},
            {"params": [table for table in tables if id(table) in taken], "lr": cross_item_lr},
        ]
        parameters = tables if cross_item_lr is None else [group for group in groups if group["params"]]
        return rows(parameters, **{"lr": encoder_lr, **(row_options or {})})

    if tables:
        optimizers.append(optimizer_of(tables))
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr, betas, eps))
    if hidden:
        optimizers.append(torch.optim.Muon(hidden, muon_lr, weight_decay))
    return ModelOptimizer(*optimizers, apart=optimizer_of(apart) if apart else None)


def _hidden_matrices(model: nn.Module, among: list[nn.Parameter]) -> list[nn.Parameter]:
    """Matrices that map hidden states to hidden states."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embeddings |= {id(p) for p in head.parameters()} if head is not None else set()
    return [p for p in among if p.dim() == 2 and id(p) not in embeddings]


def _trainable(parameters) -> list[nn.Parameter]:
    return list(dict.fromkeys(p for p in parameters if p.requires_grad))


class ModelOptimizer(WaitsForUpdates, torch.optim.Optimizer):
    """Several optimizers as one: their groups and their state, in one state_dict, under one schedule.

    Args:
        optimizers: the optimizers, at least one.
        apart: of tables that are none of the model's parameters (`distributed.replicate(managed=True)`). It steps with
            the others and its learning rates go up and down with that of the first group, but its groups are not among
            `param_groups`, which wrappers hold against the model's parameters.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer, apart: RowOptimizer | None = None) -> None:
        self._optimizers, self.apart = list(optimizers), apart
        if not self._optimizers:
            raise ValueError("the model has no parameter that requires a gradient")
        self._parts: list[int] = []  # which optimizer each group is of
        super().__init__([group for optimizer in self._optimizers for group in optimizer.param_groups], {})
        self._parts = [i for i, optimizer in enumerate(self._optimizers) for _ in optimizer.param_groups]
        self._first_lr = float(self.param_groups[0]["lr"])
        self._share()

    def _share(self) -> None:
        """The optimizers work on this optimizer's groups and state: a schedule or a loaded state reaches all."""
        for i, optimizer in enumerate(self._optimizers):
            optimizer.param_groups = [g for g, part in zip(self.param_groups, self._parts, strict=True) if part == i]
            optimizer.state = self.state
        if self.apart is not None:
            self.apart.follows = _Schedule(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters, such as layers that were frozen: they go to AdamW, with its options unless given.

        Raises:
            ValueError: one is a table trained with grad="sparse" or "fused", or in a group already.
        """
        if not self._parts:  # torch makes the first groups by this method too
            super().add_param_group(param_group)
            return
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group is a {type(param_group).__name__}; give a dict with params")
        if "params" not in param_group:
            raise ValueError(f"param_group has {', '.join(map(repr, param_group)) or 'nothing'} in it; give params")
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        for parameter in params:
            if is_table(parameter):
                raise ValueError(
                    f"params holds a table of shape {tuple(parameter.shape)} trained by rows, and AdamW takes dense "
                    "gradients; build the optimizer with for_model while the table requires a gradient"
                )
        if "lr" not in param_group and not any(isinstance(o, torch.optim.AdamW) for o in self._optimizers):
            raise ValueError("param_group has no lr, and there is no AdamW yet whose default it would take; give lr")
        kinds = [isinstance(optimizer, torch.optim.AdamW) for optimizer in self._optimizers]
        optimizer = self._optimizers[kinds.index(True)] if any(kinds) else torch.optim.AdamW(params)
        super().add_param_group({**optimizer.defaults, **param_group, "params": params})
        if not any(kinds):
            self._optimizers.append(optimizer)
            kinds.append(True)
        self._parts.append(kinds.index(True))
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self._all():
            optimizer.step()
        if self.apart is not None:
            self.apart.zero_grad()  # model.zero_grad(), which trainers call, does not reach its tables
        return loss

    def _all(self) -> list[torch.optim.Optimizer]:
        return [*self._optimizers, *([] if self.apart is None else [self.apart])]

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for optimizer in self._all():
            if isinstance(optimizer, RowOptimizer):
                optimizer.zero_grad(set_to_none)

    def release(self) -> None:
        """Let go of the tables, see `RowOptimizer.release`."""
        for optimizer in self._all():
            if isinstance(optimizer, RowOptimizer):
                optimizer.release()

    def state_dict(self) -> dict[str, Any]:
        """As every torch optimizer gives; with an entry "apart" where whole tables are apart.

        The state of divided ones is each rank's own: `distributed.save_tables` writes it.
        """
        state = super().state_dict()
        if self._is_apart_whole():
            state["apart"], state["first_lr"] = self.apart.state_dict(), self._first_lr
        return state

    def _is_apart_whole(self) -> bool:
        tables = [] if self.apart is None else [p for group in self.apart.param_groups for p in group["params"]]
        return bool(tables) and all(table_state(table).part is None for table in tables)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every torch optimizer. The state of divided tables stays: `distributed.load_tables` reads it.

        Raises:
            ValueError: the state is of another model's parameters or of another rule; nothing has been changed.
        """
        check_state(self, state_dict, [self._optimizers[part] for part in self._parts])
        if self._is_apart_whole() and "apart" in state_dict:
            self.apart.load_state_dict(state_dict["apart"])
            self._first_lr = state_dict["first_lr"]
        super().load_state_dict(state_dict)
        restore_state(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        own = {"_optimizers": self._optimizers, "_parts": self._parts, "apart": self.apart, "_first_lr": self._first_lr}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()


class _Schedule:
    """What a schedule has made of the learning rate of an optimizer's first group, as a factor."""

    def __init__(self, optimizer: ModelOptimizer) -> None:
        self._optimizer = weakref.ref(optimizer)

    def __call__(self) -> float:
        optimizer = self._optimizer()
        if optimizer is None or not optimizer._first_lr:
            return 1.0
        return float(optimizer.param_groups[0]["lr"]) / optimizer._first_lr
