"""The row-wise optimizers in plain PyTorch: the definitions that the kernels are held against.

A rule takes the touched rows w ``[U, W]``, their gradient g ``[U, W]`` and their state, all float32 (float64 for a
float64 table), and returns the new rows and the new state. Rows that the batch does not touch keep their value and
their state. t counts the steps of the table, this one included.

    all            w <- w - lr * weight_decay * w             decoupled, on touched rows, before the rest
    sgd            w <- w - lr * g
    row_adagrad    s <- s + mean(g^2)                         one scalar a row
                   w <- w - lr * g / (sqrt(s) + eps)
    row_adam       m <- beta1 * m + (1 - beta1) * g
                   v <- beta2 * v + (1 - beta2) * mean(g^2)   one scalar a row
                   w <- w - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
    lazy_adam      the same with v <- beta2 * v + (1 - beta2) * g^2, one scalar an element

Adam: Kingma and Ba, arXiv 1412.6980; decoupled decay: Loshchilov and Hutter, arXiv 1711.05101; Adagrad: Duchi et al.,
JMLR 12 (2011); one scalar a row: Gupta et al., arXiv 1412.5735.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .._dtypes import accumulator
from .rounding import random_bits, stochastic_round


class Hyper(NamedTuple):
    """The numbers of one step; a rule finds correction_i = 1 - beta_i^t filled in."""

    lr: float | Tensor
    weight_decay: float
    eps: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    correction1: float | Tensor = 1.0
    correction2: float | Tensor = 1.0


def sgd(w: Tensor, g: Tensor, hyper: Hyper) -> tuple[Tensor]:
    return (w - hyper.lr * g,)


def row_adagrad(w: Tensor, g: Tensor, s: Tensor, hyper: Hyper) -> tuple[Tensor, Tensor]:
    s = s + g.square().mean(1)
    return w - (hyper.lr / (s.sqrt() + hyper.eps))[:, None] * g, s


def row_adam(w: Tensor, g: Tensor, m: Tensor | None, v: Tensor, hyper: Hyper) -> tuple[Tensor, Tensor | None, Tensor]:
    """m is None where beta1 is 0: g takes its place and nothing is kept."""
    m, mean = _first_moment(g, m, hyper)
    v = hyper.beta2 * v + (1 - hyper.beta2) * g.square().mean(1)
    return w - (hyper.lr / ((v / hyper.correction2).sqrt() + hyper.eps))[:, None] * mean, m, v


def lazy_adam(w: Tensor, g: Tensor, m: Tensor | None, v: Tensor, hyper: Hyper) -> tuple[Tensor, Tensor | None, Tensor]:
    m, mean = _first_moment(g, m, hyper)
    v = hyper.beta2 * v + (1 - hyper.beta2) * g.square()
    return w - hyper.lr / ((v / hyper.correction2).sqrt() + hyper.eps) * mean, m, v


def _first_moment(g: Tensor, m: Tensor | None, hyper: Hyper) -> tuple[Tensor | None, Tensor]:
    if m is None:
        return None, g
    m = hyper.beta1 * m + (1 - hyper.beta1) * g
    return m, m / hyper.correction1


def decay(w: Tensor, hyper: Hyper) -> Tensor:
    return w * (1 - hyper.lr * hyper.weight_decay) if hyper.weight_decay else w


class Rule(NamedTuple):
    """A rule and the state that it keeps: names in the order of its arguments, "element" or "row" for each."""

    update: Callable[..., tuple[Tensor | None, ...]]
    state: dict[str, str]


RULES = {
    "sgd": Rule(sgd, {}),
    "row_adagrad": Rule(row_adagrad, {"sum": "row"}),
    "row_adam": Rule(row_adam, {"exp_avg": "element", "exp_avg_sq": "row"}),
    "lazy_adam": Rule(lazy_adam, {"exp_avg": "element", "exp_avg_sq": "element"}),
}


def gather_rows(table: Tensor, rows: Tensor) -> Tensor:
    return table[rows]


@dataclass
class RowUpdate:
    """One step of one table: the rule, its numbers and its state, ready to be applied to rows.

    Attributes:
        weight: the table ``[R, w]``.
        rule: a name of `RULES`.
        state: the rule's state tensors ``[R]`` or ``[R, w]`` in its order; None for a first moment that is not kept.
        step: int64, 0-dimensional, on the table's device; counts this step already.
        hyper: the numbers of the step but its corrections; lr is a float, or a tensor on the table's device.
        seed: of stochastic rounding; None to round to nearest.
        squares: None, or a list to which sums of the squared gradient are added, 1-dimensional.
    """

    weight: Tensor
    rule: str
    state: list[Tensor | None]
    step: Tensor
    hyper: Hyper
    seed: int | None = None
    squares: list[Tensor] | None = None

    @cached_property
    def corrected(self) -> Hyper:
        """The numbers of the step with Adam's corrections, from the step on its device: nothing waits for it."""
        if "exp_avg_sq" not in RULES[self.rule].state:
            return self.hyper
        t, dtype = self.step.double(), accumulator(self.weight.dtype)
        correction1, correction2 = ((1 - beta**t).to(dtype) for beta in (self.hyper.beta1, self.hyper.beta2))
        return self.hyper._replace(correction1=correction1, correction2=correction2)

    def apply(self, rows: Tensor, sums: Tensor, read: Callable[[Tensor, Tensor], Tensor] = gather_rows) -> None:
        """Update `rows` int64 ``[U]``, each once, with the sums ``[U, w]`` of their gradients.

        Args:
            read: gives table[rows]; a backend has a faster one.
        """
        weight, hyper, dtype = self.weight.detach(), self.corrected, accumulator(self.weight.dtype)
        if self.squares is not None:
            self.squares.append(torch.linalg.vector_norm(sums).square()[None])
        w = decay(read(weight, rows).to(dtype), hyper)
        kept = [None if s is None else read(s, rows) if s.dim() == 2 else s[rows] for s in self.state]
        w, *new = RULES[self.rule].update(w, sums.to(dtype), *kept, hyper)
        for state, values in zip(self.state, new, strict=True):
            if state is not None:
                state.index_copy_(0, rows, values)
        if self.seed is not None:
            w = stochastic_round(w, random_bits(self.seed, self.step, rows, w.shape[1]))
        weight.index_copy_(0, rows, w.to(weight.dtype))
