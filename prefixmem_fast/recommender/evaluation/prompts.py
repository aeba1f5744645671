"""Next-item examples as prompts: histories of Semantic IDs, batched by equal length, so that nothing is padded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..data import Examples, Tokens


@dataclass
class Prompts:
    """A batch.

    Attributes:
        rows: int64 ``[B]``, numbers of its examples.
        input_ids: int64 ``[B, T]``; for a causal LM the start token and the history, else the history.
        targets: token ids of the SID that comes next, int64 ``[B, L]``.
    """

    rows: np.ndarray
    input_ids: Tensor
    targets: Tensor


def prompts_of(
    examples: Examples, tokens: Tokens, *, encoder_decoder: bool, device: torch.device, max_tokens: int = 4096
) -> Iterator[Prompts]:
    """Batches of examples with histories of one length.

    Args:
        encoder_decoder: whether they are for an encoder-decoder.
        max_tokens: of a batch.
    """
    lengths = np.array([len(history) for history in examples.histories], dtype=np.int64)
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        step = max(max_tokens // ((int(length) + 1) * tokens.levels), 1)
        for chunk in (rows[i : i + step] for i in range(0, len(rows), step)):
            items = np.stack([examples.histories[i] for i in chunk])  # [B, length]
            ids = tokens.sids[items].reshape(len(chunk), -1)
            if not encoder_decoder and tokens.start is not None:
                ids = np.concatenate([np.full((len(chunk), 1), tokens.start), ids], 1)
            targets = tokens.sids[examples.targets[chunk]]
            yield Prompts(chunk, torch.from_numpy(ids).to(device), torch.from_numpy(targets).to(device))


def is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))
