"""The encoder one token at a time, for engines that keep their own KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from ..sid import SIDVocabulary
from .prefixmem import PrefixMem

_ID_DTYPES = (torch.int32, torch.int64)


class DecodingState:
    """The last tokens of each sequence of a batch, and m of the newest.

    A step is `PrefixMem.encode_window` of them. On a GPU it works on tensors of fixed shapes and addresses, as CUDA
    graphs need it. With tables in the host's memory tokens and S cross in each step.

    Args:
        encoder: only its forward is used; nothing is differentiated.
        vocabulary: which token ids are which codes.
        batch: number of sequences B.

    Attributes:
        tokens: int64 ``[B, lookback + 1]``, the last tokens of each sequence, -1 before its first.
        head: of the last prefill or step, what tables with `output_slot` add to the last hidden states, in the shape
            of m; None without any.

    Raises:
        TypeError, ValueError: the vocabulary's codebooks are not the encoder's, `batch` is no number of sequences, or
            the tables are divided over processes.
    """

    def __init__(self, encoder: PrefixMem, vocabulary: SIDVocabulary, batch: int) -> None:
        encoder.memory.check_whole("DecodingState")
        vocabulary.check_codebooks(encoder.config.spec)
        if _checks.integer("batch", batch) < 0:
            raise ValueError(f"batch = {batch} is negative; give the number of sequences")
        self.encoder, self.vocabulary = encoder, vocabulary
        self.head: Tensor | None = None
        device = encoder.out_proj.weight.device
        self.tokens = torch.full((batch, encoder.config.lookback + 1), -1, device=device)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> Tensor:
        """Read a prompt ``[B, T]`` from its beginning; returns m of its tokens, ``[B, T, hidden_size]``."""
        _checks.tensor("input_ids", input_ids, _ID_DTYPES, 2, "[B, T]")
        if len(input_ids) != len(self.tokens):
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}; give a prompt a sequence, [{len(self.tokens)}, T]"
            )
        self.tokens.fill_(-1)
        kept = min(input_ids.shape[1], self.tokens.shape[1])
        if kept:
            self.tokens[:, -kept:] = input_ids[:, -kept:]
        m, self.head = self.encoder.encode_stream(input_ids, self.vocabulary)
        return m

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Read one token of each sequence, ``[B]``; returns its m, ``[B, hidden_size]``."""
        _checks.tensor("tokens", tokens, _ID_DTYPES, 1, "[B]")
        if len(tokens) != len(self.tokens):
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}; give one token a sequence, [{len(self.tokens)}]")
        self.tokens.copy_(torch.cat([self.tokens[:, 1:], tokens[:, None].to(self.tokens.device)], 1))
        m, self.head = self.encoder.encode_last(self.tokens, self.vocabulary)
        return m

    def reorder(self, beams: Tensor) -> None:
        """Follow a beam search: sequence i goes on from sequence ``beams[i]``; another length changes the batch."""
        _checks.tensor("beams", beams, _ID_DTYPES, 1, "[B]")
        moved = self.tokens.index_select(0, beams.to(self.tokens.device))
        if moved.shape == self.tokens.shape:  # at the same addresses
            self.tokens.copy_(moved)
        else:
            self.tokens = moved
