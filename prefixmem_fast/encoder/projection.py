"""W_out and W_head, from the memory to the width of the model, and which tokens they are needed for."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn


class Encoded(NamedTuple):
    """What an encoder adds to a model.

    Attributes:
        m: ``[.., hidden_size]``, to the input embeddings.
        head: the same to the last hidden states, of tables with `output_slot`; None without any.
    """

    m: Tensor
    head: Tensor | None = None

    def __add__(self, other: Encoded) -> Encoded:
        return Encoded(self.m + other.m, self.head).with_head(other.head)

    def with_head(self, head: Tensor | None) -> Encoded:
        """The same with `head` added to what goes to the last hidden states."""
        if head is None:
            return self
        return self._replace(head=head if self.head is None else self.head + head)


class OutputProjection(nn.Linear):
    """W_out or W_head: no bias, and a start near zero that also holds where a framework calls `reset_parameters`."""

    def __init__(self, config: Any, **factory: Any) -> None:
        self.init_std = config.output_init_std
        super().__init__(config.memory_dim, config.hidden_size, bias=False, **factory)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)


def has_head(encoder: nn.Module) -> bool:
    """Whether an encoder adds something to the last hidden states, by tables with `output_slot`."""
    return any(getattr(module, "head_proj", None) is not None for module in encoder.modules())


def last_tokens(x: Tensor, count: int) -> Tensor:
    """The last `count` of ``[B, T, d]``.

    Raises:
        ValueError: there are fewer.
    """
    if not 0 <= count <= x.shape[1]:
        raise ValueError(f"new_tokens = {count}; input_ids has {x.shape[1]} tokens, so give 0..{x.shape[1]}")
    return x[:, x.shape[1] - count :]
