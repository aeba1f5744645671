"""The encoder one token at a time, for engines that keep their own KV cache.

Orders do not depend on the level, so within a SID S_l = S_{l-1} + e_l: a step reads the H rows of order l alone
(prefix mode; the other modes read a level's orders anew). The sums are those of `token_memory`, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..operation.backends import resolve
from ..operation.operators import prefix_rows
from ..operation.reference import accumulator, order_rows, prefix_length, token_codes, token_entries
from ..sid import SIDVocabulary
from .modules import PrefixMem


class DecodingState:
    """Where each sequence of a batch stands within a SID.

    On a GPU a step is one kernel and the projection, on tensors of fixed shapes and addresses, as CUDA graphs need it.

    Args:
        encoder: only its forward is used; nothing is differentiated.
        vocabulary: which token ids are which codes.
        batch: number of sequences B.

    Raises:
        ValueError: the vocabulary's codebooks are not the encoder's, or `batch` is negative.
    """

    def __init__(self, encoder: PrefixMem, vocabulary: SIDVocabulary, batch: int) -> None:
        spec, weight = encoder.config.spec, encoder.memory.weight
        vocabulary.check_codebooks(spec)
        if batch < 0:
            raise ValueError(f"batch = {batch} is negative; give the number of sequences")
        self.encoder, self.vocabulary = encoder, vocabulary
        self._table = vocabulary.token_table(weight.device)
        self._backend = resolve(encoder.memory.backend, weight=weight)
        copies = 1  # of codes and levels: the kernel's column tiles keep one each
        if self._backend == "triton":
            from ..kernels.decode import column_tiles

            copies = column_tiles(weight, spec)
        self._codes = torch.full((copies, batch, spec.levels), -1, device=weight.device)
        self._level = torch.zeros((copies, batch), dtype=torch.int64, device=weight.device)
        self._total = torch.zeros(
            (batch, spec.heads, weight.shape[1]), dtype=accumulator(weight.dtype), device=weight.device
        )

    @property
    def codes(self) -> Tensor:
        """int64 ``[B, L]``: the codes of the SID under way, then -1."""
        return self._codes[0]

    @property
    def level(self) -> Tensor:
        """int64 ``[B]``: how many they are; 0 after text."""
        return self._level[0]

    @property
    def total(self) -> Tensor:
        """``[B, H, w]``: S, where that level is active, in float32 (float64 for a float64 table)."""
        return self._total

    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> Tensor:
        """Read a prompt ``[B, T]`` from its beginning; returns m of its tokens, ``[B, T, hidden_size]``."""
        spec = self.encoder.config.spec
        codes, level = token_codes(input_ids, self._table, spec)
        self._codes.copy_(codes[:, -1] if codes.shape[1] else -1)
        self._level.copy_(level[:, -1] if level.shape[1] else 0)
        self._total.zero_()
        for step in range(1, spec.levels + 1):
            self._add_orders(torch.where(self.level >= step, step, 0))
        return self.encoder.encode_tokens(input_ids, self.vocabulary)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Read one token of each sequence, ``[B]``; returns its m, ``[B, hidden_size]``."""
        if tokens.shape != self.level.shape:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}; give one token a sequence, [{len(self.level)}]")
        weight, spec = self.encoder.memory.weight, self.encoder.config.spec
        if self._backend == "triton":
            from ..kernels.decode import token_step

            with torch.cuda.device_of(weight):
                state = (self._codes, self._level, self._total)
                S = token_step(tokens.contiguous(), self._table, weight.contiguous(), *state, spec)
        else:
            S = self._step(tokens)
        return self.encoder.out_proj(S)

    def _step(self, tokens: Tensor) -> Tensor:
        """S ``[B, H * w]``, in PyTorch; the definition of the kernel."""
        spec = self.encoder.config.spec
        level, code = token_entries(tokens, self._table)
        level = torch.where((level == 1) | (level == self.level + 1), level, 0)
        before = torch.where((level > 1)[:, None], self.codes, -1)
        levels = torch.arange(1, spec.levels + 1, device=level.device)
        self._codes.copy_(torch.where(levels == level[:, None], code[:, None], before))
        self._level.copy_(level)
        self._total.masked_fill_((level <= 1)[:, None, None], 0)
        self._add_orders(level)
        active = (level[:, None] == level.new_tensor(spec.active_levels)).any(1)
        S = torch.where(active[:, None, None], self._total, 0)
        return S.to(self.encoder.memory.weight.dtype).flatten(1)

    def _add_orders(self, level: Tensor) -> None:
        """Add what level ``[B]`` brings to the sums of the level before; 0 brings nothing."""
        spec, weight = self.encoder.config.spec, self.encoder.memory.weight
        if spec.mode == "prefix":
            rows = self._rows_of_order(level.clamp(1, spec.max_order))
            new = (level > 0) & (level <= spec.max_order)
        else:
            rows = prefix_rows(self.codes, spec, backend=self._backend)  # [B, L, N, H]
            rows = rows.take_along_dim((level.clamp(min=1) - 1)[:, None, None, None], 1).squeeze(1)  # [B, N, H]
            self._total.masked_fill_((level > 0)[:, None, None], 0)
            new = level > 0
        for row in rows.unbind(1):
            read = weight[row.clamp(min=0)].to(self._total.dtype)
            self._total.add_(torch.where(((row >= 0) & new[:, None])[..., None], read, 0))

    def _rows_of_order(self, order: Tensor) -> Tensor:
        """Rows ``[B, 1, H]`` of one order ``[B]`` a sequence, -1 where the prefix has ended; equal at every level."""
        spec = self.encoder.config.spec
        length = prefix_length(self.codes, spec)
        codes = torch.where(torch.arange(spec.levels, device=order.device) < length[:, None], self.codes, 0)
        rows = [order_rows(codes[:, :n], n, spec) for n in range(1, min(spec.max_order, spec.levels) + 1)]
        rows = torch.stack(rows, 1).take_along_dim((order - 1)[:, None, None], 1)
        return torch.where((length >= order)[:, None, None], rows, -1)

    def reorder(self, beams: Tensor) -> None:
        """Follow a beam search: sequence i goes on from sequence ``beams[i]``; another length changes the batch."""
        for name, dim in (("_codes", 1), ("_level", 1), ("_total", 0)):
            held = getattr(self, name)
            moved = held.index_select(dim, beams)
            setattr(self, name, held.copy_(moved) if moved.shape == held.shape else moved)
