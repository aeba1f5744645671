"""Semantic ID vocabulary: which token id stands for which code of which level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .spec import integer, integers

# 2 GiB of table; the largest vocabularies have a few million ids.
_MOST_IDS = 1 << 28


class SIDVocabulary:
    """Maps token ids to (level, code) and back. Every id it does not know is text.

    Attributes:
        codebook_sizes: K_1 .. K_L.
        table: int32 ``[V, 2]`` on the CPU, (level, code) of the ids 0 .. V - 1; level 0 is text.
    """

    def __init__(self, ids: Mapping[tuple[int, int], int], codebook_sizes: Sequence[int]) -> None:
        """`ids` maps (level, code) to token ids and is taken as it is; `from_table` checks what users give."""
        self.codebook_sizes = tuple(codebook_sizes)
        self.table = torch.zeros((max(ids.values(), default=-1) + 1, 2), dtype=torch.int32)
        if ids:
            self.table[list(ids.values())] = torch.tensor(list(ids), dtype=torch.int32)
        self._ids = dict(ids)
        self._on_device: dict[torch.device, Tensor] = {}

    @classmethod
    def from_table(cls, tokens: Mapping[int, tuple[int, int]], codebook_sizes: Sequence[int]) -> SIDVocabulary:
        """A vocabulary from an explicit table ``{token_id: (level, code)}``; levels count from 1, codes from 0.

        Codes that never occur may be missing.

        Raises:
            TypeError: something is not an integer, a pair or a mapping.
            ValueError: an id, level or code is out of range, or two ids share one (level, code).
        """
        sizes = integers("codebook_sizes", codebook_sizes)
        if not sizes or min(sizes) < 1 or max(sizes) > 1 << 31:
            raise ValueError(f"codebook_sizes = {sizes}; give one size of 1..2^31 a level")
        if not isinstance(tokens, Mapping):
            raise TypeError(f"tokens is a {type(tokens).__name__}; give a dict {{token_id: (level, code)}}")
        owner: dict[tuple[int, int], int] = {}
        for token, entry in tokens.items():
            token = integer("token id", token)
            if not 0 <= token < _MOST_IDS:
                raise ValueError(f"token id {token} is outside 0..{_MOST_IDS - 1}")
            entry = integers(f"the entry of token id {token}", entry)
            if len(entry) != 2:
                raise ValueError(f"token id {token} has the entry {entry}; give (level, code)")
            level, code = entry
            if not 1 <= level <= len(sizes):
                raise ValueError(f"token id {token} has level {level}; allowed are 1..{len(sizes)}")
            if not 0 <= code < sizes[level - 1]:
                raise ValueError(f"token id {token} has code {code}; level {level} allows 0..{sizes[level - 1] - 1}")
            if entry in owner:
                raise ValueError(f"token ids {owner[entry]} and {token} both mean level {level}, code {code}")
            owner[entry] = token
        return cls(owner, sizes)

    def __len__(self) -> int:
        """Number of SID tokens."""
        return len(self._ids)

    def token_id(self, level: int, code: int) -> int:
        """Token id of a code.

        Raises:
            KeyError: no token stands for it.
        """
        try:
            return self._ids[level, code]
        except KeyError:
            raise KeyError(f"no token stands for level {level}, code {code}") from None

    def token_table(self, device: torch.device | str) -> Tensor:
        """`table` on a device; copied there once."""
        device = torch.device(device)
        if device == self.table.device:
            return self.table
        if device not in self._on_device:
            with torch.inference_mode(False):  # a first call while serving must not spoil a later training step
                table = self.table.to(device)
            if type(table) is not Tensor:
                return table  # a fake of a tracer is not kept
            self._on_device[device] = table
        return self._on_device[device]
