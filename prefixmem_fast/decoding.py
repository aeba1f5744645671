"""The encoder one token at a time, for engines that keep their own KV cache.

Orders do not depend on the level, so within a SID S_l = S_{l-1} + e_l: a step reads the H rows of order l alone
(prefix mode; the other modes read a level's orders anew). The sums are those of `token_memory`, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .modules import PrefixMem
from .ops import prefix_rows
from .reference import accumulator, token_codes
from .sid import SIDVocabulary


class DecodingState:
    """Where each sequence of a batch stands within a SID.

    A step is a fixed sequence of operators on tensors of fixed shapes and addresses, as CUDA graphs need it.

    Args:
        encoder: only its forward is used; nothing is differentiated.
        vocabulary: which token ids are which codes.
        batch: number of sequences B.

    Attributes:
        codes: int64 ``[B, L]``, the codes of the SID so far, then -1.
        level: int64 ``[B]``, how many they are; 0 after text.
        total: ``[B, H, w]``, S at that level, in the accumulator's dtype.
    """

    def __init__(self, encoder: PrefixMem, vocabulary: SIDVocabulary, batch: int) -> None:
        spec = encoder.config.spec
        if vocabulary.codebook_sizes != spec.codebook_sizes:
            raise ValueError(
                f"the vocabulary's codebook_sizes {vocabulary.codebook_sizes} differ from the encoder's "
                f"{spec.codebook_sizes}; build both from the same Semantic IDs"
            )
        weight = encoder.memory.weight
        self.encoder, self.vocabulary = encoder, vocabulary
        text = torch.zeros(1, 2, dtype=torch.int32, device=weight.device)
        self._table = torch.cat([vocabulary.token_table(weight.device), text])  # ids past the end are text
        self._levels = torch.arange(1, spec.levels + 1, device=weight.device)
        self._active = torch.zeros(spec.levels + 1, dtype=torch.bool, device=weight.device)
        self._active[list(spec.active_levels)] = True
        self.codes = torch.full((batch, spec.levels), -1, device=weight.device)
        self.level = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        self.total = torch.zeros(
            (batch, spec.heads, weight.shape[1]), dtype=accumulator(weight.dtype), device=weight.device
        )

    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> Tensor:
        """Read a prompt ``[B, T]`` from its beginning; returns m of its tokens, ``[B, T, hidden_size]``."""
        spec = self.encoder.config.spec
        codes, level = token_codes(input_ids, self._table[:-1], spec)
        self.codes.copy_(codes[:, -1] if codes.shape[1] else -1)
        self.level.copy_(level[:, -1] if level.shape[1] else 0)
        self.total.zero_()
        for step in range(1, spec.levels + 1):
            self._add_orders(torch.where(self.level >= step, step, 0))
        return self.encoder.encode_tokens(input_ids, self.vocabulary)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Read one token of each sequence, ``[B]``; returns its m, ``[B, hidden_size]``."""
        known = (tokens >= 0) & (tokens < len(self._table))
        level, code = self._table[torch.where(known, tokens, -1).long()].long().unbind(-1)
        goes_on = (level == 1) | ((level > 1) & (level == self.level + 1))
        level = torch.where(goes_on, level, 0)
        codes = torch.where((level > 1)[:, None], self.codes, -1)
        self.codes.copy_(torch.where(self._levels == level[:, None], code[:, None], codes))
        self.total.masked_fill_((level <= 1)[:, None, None], 0)
        self.level.copy_(level)
        self._add_orders(level)
        S = self.total.to(self.encoder.memory.weight.dtype).flatten(1)
        return self.encoder.out_proj(torch.where(self._active[level][:, None], S, 0))

    def _add_orders(self, level: Tensor) -> None:
        """Add what level ``[B]`` brings to the sums of the level before; 0 brings nothing."""
        spec, weight = self.encoder.config.spec, self.encoder.memory.weight
        rows = prefix_rows(self.codes, spec)  # [B, L, N, H]
        rows = rows.take_along_dim((level.clamp(min=1) - 1)[:, None, None, None], 1).squeeze(1)  # [B, N, H]
        if spec.mode == "prefix":
            order = level.clamp(1, spec.max_order)
            rows = rows.take_along_dim((order - 1)[:, None, None], 1)  # [B, 1, H]
            new = (level > 0) & (level <= spec.max_order)
        else:
            self.total.masked_fill_((level > 0)[:, None, None], 0)
            new = level > 0
        for row in rows.unbind(1):
            read = weight[row.clamp(min=0)].to(self.total.dtype)
            self.total.add_(torch.where(((row >= 0) & new[:, None])[..., None], read, 0))

    def reorder(self, beams: Tensor) -> None:
        """Follow a beam search: sequence i goes on from sequence ``beams[i]``; another length changes the batch."""
        for name in ("codes", "level", "total"):
            held = getattr(self, name)
            moved = held.index_select(0, beams)
            setattr(self, name, held.copy_(moved) if len(moved) == len(held) else moved)
