"""Semantic ID vocabulary: which token id stands for which code of which level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class SIDVocabulary:
    """Maps token ids to (level, code) and back. Every id it does not know is text.

    Attributes:
        codebook_sizes: K_1 .. K_L.
        table: int32 ``[V, 2]`` on the CPU, (level, code) of the ids 0 .. V - 1; level 0 is text.
    """

    def __init__(self, table: Tensor, codebook_sizes: Sequence[int]) -> None:
        self.table = table
        self.codebook_sizes = tuple(codebook_sizes)
        self._ids = {(level, code): i for i, (level, code) in enumerate(table.tolist()) if level > 0}
        self._on_device: dict[torch.device, Tensor] = {}

    @classmethod
    def from_table(cls, tokens: Mapping[int, tuple[int, int]], codebook_sizes: Sequence[int]) -> SIDVocabulary:
        """A vocabulary from an explicit table ``{token_id: (level, code)}``; levels count from 1, codes from 0.

        Codes that never occur may be missing.

        Raises:
            ValueError: an id is negative, a level or code is out of range, or two ids share one (level, code).
        """
        sizes = tuple(int(size) for size in codebook_sizes)
        table = torch.zeros((max(tokens, default=-1) + 1, 2), dtype=torch.int32)
        owner: dict[tuple[int, int], int] = {}
        for token, (level, code) in tokens.items():
            if token < 0:
                raise ValueError(f"token id {token} is negative; ids count from 0")
            if not 1 <= level <= len(sizes):
                raise ValueError(f"token id {token} has level {level}; allowed are 1..{len(sizes)}")
            if not 0 <= code < sizes[level - 1]:
                raise ValueError(f"token id {token} has code {code}; level {level} allows 0..{sizes[level - 1] - 1}")
            if (level, code) in owner:
                raise ValueError(f"token ids {owner[level, code]} and {token} both mean level {level}, code {code}")
            owner[level, code] = token
            table[token, 0], table[token, 1] = level, code
        return cls(table, sizes)

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
        if device not in self._on_device:
            self._on_device[device] = self.table.to(device)
        return self._on_device[device]
