"""Optimizers of memory tables: a step costs what the touched rows cost, whatever the size of the table.

With ``grad="sparse"`` they take the sparse ``weight.grad`` in `step()`. With ``grad="fused"`` the backward pass finds
the optimizer that holds the weight and has it update the rows there and then; `step()` then only ends the step.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._dtypes import accumulator
from .._pages import ask_for_huge_pages
from ..operation.backends import choose_backend, functions_of
from ..operation.rules import RULES, Hyper, RowUpdate
from ..operation.spent_gradient import FusedGradient
from ..operation.table_state import finish_updates, table_state

# Their state has the shape of the parameter, that of Adafactor and others has shapes of its own.
_OF_ELEMENTS = tuple(getattr(torch.optim, name) for name in ("AdamW", "Muon") if hasattr(torch.optim, name))


class WaitsForUpdates:
    """An optimizer whose `state` is read and replaced once no update of its tables is under way (`overlap=True`)."""

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        for group in self.__dict__.get("param_groups", ()):
            for parameter in group["params"]:
                finish_updates(parameter)
        return self.__dict__["state"]

    @state.setter
    def state(self, state: dict[Tensor, dict[str, Any]]) -> None:
        self.__dict__["state"] = state


class RowOptimizer(WaitsForUpdates, torch.optim.Optimizer):
    """What the optimizers below share. Parameters are tables ``[R, w]``, trained with grad="sparse" or "fused".

    A table has one optimizer at a time, since its backward pass may call it. `release` lets another one take over.

    Raises:
        ValueError, TypeError: an argument is not as stated.
        RuntimeError: another optimizer holds one of the tables.
    """

    rule: str

    def __init__(self, params: Iterable, defaults: dict[str, Any]) -> None:
        self.follows: Callable[[], float] | None = None  # a factor of its learning rates; another schedule's, say
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check_group(group)
        for weight in group["params"]:
            _check_table(weight, self)
        for weight in group["params"]:
            table_state(weight).optimizer = self

    def release(self) -> None:
        """Let go of the tables: another optimizer may be built over them, and this one does not step any more."""
        for group in self.param_groups:
            for weight in group["params"]:
                if table_state(weight).optimizer is self:
                    table_state(weight).optimizer = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the rows that ``weight.grad`` holds; tables that the backward pass has updated are only closed.

        An update that still runs (`overlap=True`) is not waited for: the step reads nothing of the table.

        Raises:
            TypeError: a gradient is dense, and not of zeros at a rate of zero, which make missing state alone.
            RuntimeError: `release` has let go of a table.
            Exception: what an update that ran beside the caller has raised.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                grad, state = weight.grad, weight.prefixmem_table  # there since the table is held
                if grad is None:
                    if state.unspent and state.exchange is not None:
                        raise RuntimeError(
                            f"the gradient of the table of shape {tuple(weight.shape)} is gone, and this step would "
                            "train nothing: what wraps the model (DeepSpeed does) or the training loop has cleared it "
                            "since the backward pass; give replicate managed=True, and step before zero_grad"
                        )
                    continue
                if state.optimizer is not self:
                    raise RuntimeError(
                        f"this {type(self).__name__} has let go of its table of shape {tuple(weight.shape)}; step with "
                        "the optimizer that holds it now"
                    )
                if isinstance(grad, FusedGradient):
                    weight.grad = None
                    if grad.updates is not None:
                        grad.updates.raise_failed()
                else:
                    self._step_sparse(weight, grad)
                    state.unspent = False  # what was computed has been applied
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of every torch optimizer; after a fused step there is nothing to do, and torch's own takes its time."""
        if any(weight.grad is not None for group in self.param_groups for weight in group["params"]):
            for group in self.param_groups:
                for weight in group["params"]:
                    weight.prefixmem_table.unspent = False
            super().zero_grad(set_to_none)

    @torch.no_grad()
    def _step_sparse(self, weight: Tensor, grad: Tensor) -> None:
        if not grad.is_sparse:
            if not (self._group_of(weight)["lr"] or grad.any()):
                self.start(weight)  # torch.distributed.checkpoint.state_dict makes state by such a step
                return
            raise TypeError(
                f"a table of shape {tuple(weight.shape)} has a dense gradient; {type(self).__name__} takes "
                'grad="sparse" or grad="fused": set it on the module, or train the table with torch.optim'
            )
        backend = table_state(weight).backend or choose_backend("auto", weight=weight)
        functions_of(backend).sparse_update(grad, self.begin(weight))
        torch.autograd.graph.increment_version(weight)

    def begin(self, weight: Tensor) -> RowUpdate:
        """Count a step of `weight` and give what is needed to apply it. No host synchronisation."""
        finish_updates(weight)
        group = self._group_of(weight)
        state = self.__dict__["state"][weight] or self.start(weight)  # without the other tables' wait
        if state["step"].device != weight.device:  # load_state_dict leaves it where the file had it
            state["step"] = state["step"].to(weight.device)
        state["step"] += 1
        lr = group["lr"]
        if not isinstance(lr, Tensor) or lr.device != weight.device:
            lr = float(lr)  # a tensor on the CPU, as schedules leave it: nothing to wait for
        if self.follows is not None:
            lr = lr * self.follows()
        seed = group["seed"] if weight.dtype == torch.bfloat16 and group["stochastic_rounding"] else None
        part = weight.prefixmem_table.part  # of a divided table, which draws other bits than the parts before it
        if part and seed is not None:
            seed = (seed + 0x9E3779B97F4A7C15 * part) % (1 << 63)
        return RowUpdate(
            weight,
            self.rule,
            [state.get(name) for name in RULES[self.rule].state],
            state["step"],
            Hyper(lr, group["weight_decay"], group.get("eps", 0.0), *group.get("betas", ())),
            seed,
        )

    def described(self, weight: Tensor) -> dict[str, Any]:
        """What has to be the same on all processes that train a table together; a rate on a GPU is not waited for."""
        group = {name: value for name, value in self._group_of(weight).items() if name != "params"}
        for name, value in group.items():
            if isinstance(value, Tensor):
                group[name] = value.tolist() if value.device.type == "cpu" else None
        if self.follows is not None and group["lr"] is not None:
            group["lr"] = group["lr"] * self.follows()
        group.pop("initial_lr", None)
        return {"optimizer": self.rule, **dict(sorted(group.items()))}

    def _group_of(self, weight: Tensor) -> dict[str, Any]:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter is weight:
                    return group
        raise KeyError("the table is in no group of the optimizer that holds it")

    def start(self, weight: Tensor) -> dict[str, Any]:
        """The state of a table, made here where there is none yet."""
        group, state = self._group_of(weight), self.__dict__["state"][weight]
        if state:
            return state
        dtype = accumulator(weight.dtype)
        state["step"] = torch.zeros((), dtype=torch.int64, device=weight.device)
        for name, kind in RULES[self.rule].state.items():
            if name == "exp_avg" and group["betas"][0] == 0:
                continue
            shape = weight.shape if kind == "element" else weight.shape[:1]
            start = group.get("initial_accumulator_value", 0.0) if name == "sum" else 0.0
            state[name] = torch.zeros(shape, dtype=dtype, device=weight.device)
            if kind == "row":  # the larger ones stay untouched where their rows do, and huge pages would not
                ask_for_huge_pages(state[name])
            if start:
                state[name].fill_(start)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every torch optimizer, but float32 state of a bfloat16 table stays float32.

        Raises:
            ValueError: the state is of another table or of another rule; nothing has been changed.
        """
        check_state(self, state_dict, [self] * len(self.param_groups))
        super().load_state_dict(state_dict)
        restore_state(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        held = [p for group in self.param_groups for p in group["params"] if table_state(p).optimizer is self]
        return {**super().__getstate__(), "held": held}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy holds the copies of the tables that this one held; a loaded state changes no holder."""
        state = dict(state)
        held = state.pop("held", ())
        self.follows = None
        super().__setstate__(state)
        for group in self.param_groups:
            for weight in group["params"]:
                table_state(weight)  # which a copy of a parameter has not
        for weight in held:
            if table_state(weight).optimizer is None:
                table_state(weight).optimizer = self


def is_table(parameter: Any) -> bool:
    """Whether it has been read with grad="sparse" or "fused", or one of the optimizers here holds it."""
    state = getattr(parameter, "prefixmem_table", None)
    return state is not None and (state.backend is not None or state.optimizer is not None)


def check_state(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], parts: list[torch.optim.Optimizer]
) -> None:
    """Hold a state_dict against the parameters of an optimizer.

    Args:
        parts: the optimizer that steps each group.

    Raises:
        ValueError: a state is of another shape, or of another rule.
    """
    for group, saved, part in zip(optimizer.param_groups, state_dict["param_groups"], parts, strict=False):
        for weight, i in zip(group["params"], saved["params"], strict=False):
            stored = state_dict["state"].get(i, {}).items()
            shapes = {name: tuple(value.shape) for name, value in stored if isinstance(value, Tensor)}
            if isinstance(part, RowOptimizer):
                _check_rows_state(weight, shapes, group, saved, part)
            elif isinstance(part, _OF_ELEMENTS) and any(s not in ((), tuple(weight.shape)) for s in shapes.values()):
                raise ValueError(
                    f"the state for the parameter of shape {tuple(weight.shape)} is of another one: it has {shapes}; "
                    "load the state that was saved with this model"
                )


def _check_rows_state(
    weight: Tensor, shapes: dict[str, tuple], group: dict[str, Any], saved: dict[str, Any], part: RowOptimizer
) -> None:
    wanted = {"step": ()}
    for name, kind in RULES[part.rule].state.items():
        if name != "exp_avg" or saved.get("betas", (1.0,))[0] != 0:
            wanted[name] = tuple(weight.shape if kind == "element" else weight.shape[:1])
    # Loading adds to torch's defaults what no group has.
    missing = [name for name in part.defaults if name in group and name not in saved]
    if missing or (shapes and shapes != wanted):
        found = f"its group lacks {', '.join(missing)}" if missing else f"it has {shapes}, and {wanted} is needed"
        raise ValueError(
            f"the state for the table of shape {tuple(weight.shape)} is of another table, or not of "
            f"{type(part).__name__}: {found}; load the state that was saved with this table and optimizer"
        )


def restore_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Give back the dtypes of row-wise state, which torch's load_state_dict casts to the parameter's."""
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    for i, weight in zip(ids, weights, strict=True):
        for name, value in state_dict["state"].get(i, {}).items():
            if isinstance(value, Tensor) and value.dtype != optimizer.state[weight][name].dtype:
                optimizer.state[weight][name] = value.to(weight.device, copy=True)


def _check_table(weight: Tensor, optimizer: RowOptimizer) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"params holds a {weight.dtype} of shape {tuple(weight.shape)}; row-wise optimizers take the "
            "tables of PrefixMemory, [R, w]; give the rest of a model to another optimizer, or the whole "
            "model to prefixmem_fast.optim.for_model"
        )
    if not weight.is_contiguous():
        raise ValueError(
            f"params holds a table of shape {tuple(weight.shape)} and strides {weight.stride()}; rows are updated in "
            "place, so give a contiguous one: torch.nn.Parameter(table.detach().contiguous())"
        )
    if table_state(weight).optimizer not in (None, optimizer):
        gc.collect()  # an optimizer that nobody holds may live on in a reference cycle, with its schedule
    holder = table_state(weight).optimizer
    if holder not in (None, optimizer):
        raise RuntimeError(
            f"a {type(holder).__name__} holds the table of shape {tuple(weight.shape)} already, and a table has one "
            "optimizer at a time; call its release() first, or drop it"
        )


def _check_group(group: dict[str, Any]) -> None:
    for name in ("lr", "weight_decay", "eps", "initial_accumulator_value"):
        value = group.get(name, 0.0)
        if isinstance(value, Tensor) and name == "lr":
            if value.numel() != 1:
                raise ValueError(f"lr is a tensor of shape {tuple(value.shape)}; give one number")
            value = value.item()
        _checks.not_negative(name, value)
    betas = group.get("betas", (0.0, 0.0))
    if len(betas) != 2 or not all(isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas = {betas!r}; give two numbers in [0, 1)")
    if not isinstance(group["stochastic_rounding"], bool):
        raise TypeError(f"stochastic_rounding = {group['stochastic_rounding']!r} is not a bool; give True or False")
    if not 0 <= _checks.integer("seed", group["seed"]) < 1 << 63:
        raise ValueError(f"seed = {group['seed']} is outside 0..2^63 - 1")


class SGD(RowOptimizer):
    """Stochastic gradient descent on the touched rows: ``w <- w - lr * g``.

    Args:
        params: tables of `PrefixMemory`, or groups of them.
        lr: learning rate; a tensor of one number lets a CUDA graph follow a schedule.
        weight_decay: decoupled, ``w <- w - lr * weight_decay * w`` first, on touched rows.
        stochastic_rounding: of bfloat16 tables; False rounds to nearest.
        seed: of stochastic rounding: the same seed gives the same bits.

    Raises:
        ValueError, TypeError: an argument is not as stated.
    """

    rule = "sgd"

    def __init__(self, params, lr=1e-2, *, weight_decay=0.0, stochastic_rounding=True, seed=0) -> None:
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "stochastic_rounding": stochastic_rounding, "seed": seed}
        )


class RowWiseAdagrad(RowOptimizer):
    """Adagrad with one scalar a row: ``s <- s + mean(g^2)``, ``w <- w - lr * g / (sqrt(s) + eps)``.

    State: 4 bytes a row. Arguments as for `SGD`, and:

    Args:
        eps: added to the root.
        initial_accumulator_value: what s starts from.
    """

    rule = "row_adagrad"

    def __init__(
        self,
        params,
        lr=1e-2,
        *,
        eps=1e-10,
        initial_accumulator_value=0.0,
        weight_decay=0.0,
        stochastic_rounding=True,
        seed=0,
    ) -> None:
        defaults = {
            "lr": lr,
            "eps": eps,
            "initial_accumulator_value": initial_accumulator_value,
            "weight_decay": weight_decay,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)


class _Adam(RowOptimizer):
    def __init__(
        self,
        params,
        lr=1e-3,
        *,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        stochastic_rounding=True,
        seed=0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)


class RowWiseAdam(_Adam):
    """Adam whose second moment is one scalar a row: ``v <- beta2 * v + (1 - beta2) * mean(g^2)``.

    State: a float32 first moment of the table's shape and 4 bytes a row; with ``betas=(0, ...)`` the 4 bytes alone.
    Moments of untouched rows stand still; bias is corrected by the steps of the table. Arguments as for `SGD`, and:

    Args:
        betas: decay of the two moments.
        eps: added to the root.
    """

    rule = "row_adam"


class LazyAdam(_Adam):
    """Adam on the touched rows alone, both moments in full, as torch.optim.SparseAdam, with Adam's place of eps.

    State: two float32 tables (one with ``betas=(0, ...)``). Arguments as for `RowWiseAdam`.
    """

    rule = "lazy_adam"
