"""TF-L: given the true codes before it, is the most likely next token the code of level l? (arXiv 2606.00324)"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..data import Examples, Tokens
from .prompts import is_encoder_decoder, prompts_of


@dataclass
class TeacherForced:
    """What a model thinks of each level of each target.

    Attributes:
        rank: int64 ``[N, L]``, tokens before the true one: those more likely, and of equal ones those of smaller id; 0
            is a correct prediction.
        loss: float32 ``[N, L]``, cross-entropy in nats.
    """

    rank: np.ndarray
    loss: np.ndarray

    @property
    def accuracy(self) -> list[float]:
        """TF-L of each level."""
        return (self.rank == 0).mean(0).tolist()

    def reachable(self, top: int = 10) -> np.ndarray:
        """bool ``[N]``: the truth is within the `top` tokens at every level but the last."""
        return (self.rank[:, :-1] < top).all(1)


@torch.no_grad()
def teacher_forced(model: nn.Module, examples: Examples, tokens: Tokens, *, max_tokens: int = 8192) -> TeacherForced:
    """Score the target of each example, level by level, after its history and the true codes before.

    Args:
        model: a causal LM or encoder-decoder of transformers, with an encoder attached or without; put into eval mode
            while it is scored.
        examples: histories cut to what the model is to see.
        max_tokens: of a batch.
    """
    encoder_decoder, levels, device = is_encoder_decoder(model), tokens.levels, next(model.parameters()).device
    rank = np.zeros((len(examples), levels), dtype=np.int64)
    loss = np.zeros((len(examples), levels), dtype=np.float32)
    training = model.training
    model.eval()
    try:
        for batch in prompts_of(
            examples, tokens, encoder_decoder=encoder_decoder, device=device, max_tokens=max_tokens
        ):
            if encoder_decoder:
                logits = model(input_ids=batch.input_ids, labels=batch.targets).logits
            else:
                ids = torch.cat([batch.input_ids, batch.targets[:, :-1]], 1)
                logits = model(input_ids=ids, use_cache=False, logits_to_keep=levels).logits[:, -levels:]
            logp = logits.float().log_softmax(-1)
            true = logp.gather(-1, batch.targets[..., None])
            # Of equal tokens the first one is predicted, as argmax does it; NaN predicts nothing.
            before = torch.arange(logp.shape[-1], device=device) < batch.targets[..., None]
            rank[batch.rows] = (~(logp <= true) | (logp == true) & before).sum(-1).cpu().numpy()
            loss[batch.rows] = -true.squeeze(-1).cpu().numpy()
    finally:
        model.train(training)
    return TeacherForced(rank, loss)
