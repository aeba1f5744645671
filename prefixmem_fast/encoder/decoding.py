"""The encoder one token at a time, for engines that keep their own KV cache.

Orders do not depend on the level, so within a SID S_l = S_{l-1} + e_l: a step reads the H rows of order l alone
(prefix mode; the other modes read a level's orders anew). The sums are those of `token_memory`, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from .._dtypes import accumulator
from ..operation.backends import choose_backend, functions_of
from ..operation.interface import PrefixState
from ..sid import SIDVocabulary
from .host_tables import copy_across
from .prefixmem import PrefixMem
from .projection import Encoded
from .quantized import QuantizedMemory

_ID_DTYPES = (torch.int32, torch.int64)


class DecodingState:
    """Where each sequence of a batch stands within a SID.

    On a GPU a step is one kernel and the projection, on tensors of fixed shapes and addresses, as CUDA graphs need it.
    With tables in the host's memory the state is there too, and tokens and S cross in each step. Of cross-item orders
    the state is the last tokens of each sequence, and a step reads every window that ends in them.

    Args:
        encoder: only its forward is used; nothing is differentiated.
        vocabulary: which token ids are which codes.
        batch: number of sequences B.

    Attributes:
        head: of the last prefill or step, what tables with `output_slot` add to the last hidden states, in the shape
            of m; None without any.

    Raises:
        TypeError, ValueError: the vocabulary's codebooks are not the encoder's, `batch` is no number of sequences, or
            the tables are divided over processes.
    """

    def __init__(self, encoder: PrefixMem, vocabulary: SIDVocabulary, batch: int) -> None:
        spec, memory = encoder.config.spec, encoder.memory
        memory.check_whole("DecodingState")
        weight = memory.values if isinstance(memory, QuantizedMemory) else memory.weight
        vocabulary.check_codebooks(spec)
        if _checks.integer("batch", batch) < 0:
            raise ValueError(f"batch = {batch} is negative; give the number of sequences")
        self.encoder, self.vocabulary = encoder, vocabulary
        self.head: Tensor | None = None
        windows = encoder if spec.history else encoder.cross_item
        self._windows = None if windows is None else _RecentTokens(windows, vocabulary, batch)
        self._table = vocabulary.token_table(weight.device)
        self._functions = functions_of(choose_backend(encoder.memory.backend, weight=weight))
        self._is_active = torch.zeros(spec.levels + 1, dtype=torch.bool)
        self._is_active[list(spec.active_levels)] = True
        copies = self._functions.state_copies(weight, spec)
        self._state = PrefixState(
            codes=torch.full((copies, batch, spec.levels), -1, device=weight.device),
            level=torch.zeros((copies, batch), dtype=torch.int64, device=weight.device),
            total=torch.zeros(
                (batch, spec.heads, weight.shape[1]), dtype=accumulator(weight.dtype), device=weight.device
            ),
        )

    @property
    def codes(self) -> Tensor:
        """int64 ``[B, L]``: the codes of the SID under way, then -1."""
        return self._state.codes[0]

    @property
    def level(self) -> Tensor:
        """int64 ``[B]``: how many they are; 0 after text. Orders within an item alone move it."""
        return self._state.level[0]

    @property
    def total(self) -> Tensor:
        """``[B, H, w]``: S, where that level is active, in float32 (float64 for a float64 table)."""
        return self._state.total

    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> Tensor:
        """Read a prompt ``[B, T]`` from its beginning; returns m of its tokens, ``[B, T, hidden_size]``."""
        _checks.tensor("input_ids", input_ids, _ID_DTYPES, 2, "[B, T]")
        if len(input_ids) != len(self.level):
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}; give a prompt a sequence, [{len(self.level)}, T]"
            )
        self._state.codes.fill_(-1)
        self._state.level.zero_()
        self._state.total.zero_()
        if self._windows is not None:
            self._windows.read(input_ids)
        if not self.encoder.config.spec.history:
            # A SID that goes on after the prompt began at most L tokens before its end.
            for tokens in input_ids[:, -self.encoder.config.levels :].unbind(1):
                self._step(tokens)
        m, self.head = self.encoder.encode_stream(input_ids, self.vocabulary)
        return m

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Read one token of each sequence, ``[B]``; returns its m, ``[B, hidden_size]``."""
        _checks.tensor("tokens", tokens, _ID_DTYPES, 1, "[B]")
        if tokens.shape != self.level.shape:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}; give one token a sequence, [{len(self.level)}]")
        if self.encoder.config.spec.history:
            encoded = self._windows.step(tokens)
        else:
            encoded = self._project(self._step(tokens))
            encoded = encoded if self._windows is None else encoded + self._windows.step(tokens)
        m, self.head = encoded
        return m

    def _project(self, S: Tensor) -> Encoded:
        """On a CPU W_out is left out where no token is at an active level; a GPU would have to wait to know."""
        if S.device.type == "cpu" and not bool(self._is_active[self._state.level[0]].any()):
            empty = self.encoder.project(S[:0])
            return Encoded(*(None if m is None else m.new_zeros(len(S), m.shape[1]) for m in empty))
        return self.encoder.project(S)

    def _step(self, tokens: Tensor) -> Tensor:
        memory, spec = self.encoder.memory, self.encoder.config.spec
        if isinstance(memory, QuantizedMemory):
            table, dtype = memory.table, memory.dtype
            return self._functions.quantized_decoding_step(tokens, self._table, self._state, table, spec, dtype)
        here = tokens if memory.tables == "device" else copy_across(tokens, memory.weight.device)
        S = self._functions.decoding_step(here, self._table, self._state, memory.weight, spec)
        return S if here is tokens else copy_across(S, tokens.device)

    def reorder(self, beams: Tensor) -> None:
        """Follow a beam search: sequence i goes on from sequence ``beams[i]``; another length changes the batch."""
        _checks.tensor("beams", beams, _ID_DTYPES, 1, "[B]")
        if self._windows is not None:
            self._windows.reorder(beams)
        if self.encoder.memory.tables != "device":
            beams = copy_across(beams, self._state.level.device)
        moved = PrefixState(
            codes=self._state.codes.index_select(1, beams),
            level=self._state.level.index_select(1, beams),
            total=self._state.total.index_select(0, beams),
        )
        if moved.level.shape != self._state.level.shape:
            self._state = moved
            return
        for held, tensor in zip(self._state, moved, strict=True):  # at the same addresses
            held.copy_(tensor)


class _RecentTokens:
    """The tokens of each sequence that the next one's windows may begin in."""

    def __init__(self, encoder: PrefixMem, vocabulary: SIDVocabulary, batch: int) -> None:
        self.encoder, self.vocabulary = encoder, vocabulary
        device = encoder.out_proj.weight.device
        self.tokens = torch.full((batch, encoder.config.lookback + 1), -1, device=device)  # [B, W]

    def read(self, prompt: Tensor) -> None:
        """Begin with the last tokens of a prompt ``[B, T]``."""
        self.tokens.fill_(-1)
        count = min(prompt.shape[1], self.tokens.shape[1])
        if count:
            self.tokens[:, -count:] = prompt[:, -count:]

    def step(self, tokens: Tensor) -> Encoded:
        """What is added at one more token of each sequence, ``[B, hidden_size]``."""
        self.tokens.copy_(torch.cat([self.tokens[:, 1:], tokens[:, None].to(self.tokens.device)], 1))
        encoder, total = self.encoder, None
        while encoder is not None:
            encoded = encoder.project(encoder.read_tokens(self.tokens, self.vocabulary, new_tokens=1)[:, 0])
            total = encoded if total is None else total + encoded
            encoder = encoder.cross_item
        return total

    def reorder(self, beams: Tensor) -> None:
        moved = self.tokens.index_select(0, beams.to(self.tokens.device))
        if moved.shape == self.tokens.shape:
            self.tokens.copy_(moved)
        else:
            self.tokens = moved
