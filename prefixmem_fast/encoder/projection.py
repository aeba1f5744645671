"""W_out, from the memory to the width of the model's embeddings, and which tokens it is needed for."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class OutputProjection(nn.Linear):
    """W_out: no bias, and a start near zero that also holds where a framework calls `reset_parameters`."""

    def __init__(self, config: Any, **factory: Any) -> None:
        self.init_std = config.output_init_std
        super().__init__(config.memory_dim, config.hidden_size, bias=False, **factory)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)


def last_tokens(x: Tensor, count: int) -> Tensor:
    """The last `count` of ``[B, T, d]``.

    Raises:
        ValueError: there are fewer.
    """
    if not 0 <= count <= x.shape[1]:
        raise ValueError(f"new_tokens = {count}; input_ids has {x.shape[1]} tokens, so give 0..{x.shape[1]}")
    return x[:, x.shape[1] - count :]
