"""A numbered stream of batches: number i is always the same, so a run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .sequences import Sequences

_BLOCK = 4096  # numbers whose kinds are drawn together
_BATCHES = 16  # batches that are drawn together


class SequenceStream(Dataset):
    """Kinds of sequences mixed by weight, in batches; each kind is gone through in a new random order again and again.

    Within 16 batches, sequences of like length stand in one, so that little is padded, and as many shorter ones as
    have the same number of tokens, so that every step weighs the same.

    Args:
        kinds: for each name its sequences and its weight, above 0.
        length: how many batches the stream has.
        batch_size: rows of a batch, on average.
        seed: of order, mixture and windows.
        pack: sequences a row; more than 1 needs kinds for decoders alone.
    """

    def __init__(
        self,
        kinds: Mapping[str, tuple[Sequences, float]],
        length: int,
        *,
        batch_size: int = 1,
        seed: int = 0,
        pack: int = 1,
    ) -> None:
        self.kinds = dict(kinds)
        self.sequences = [sequences for sequences, _ in kinds.values()]
        weights = np.array([weight for _, weight in kinds.values()], dtype=np.float64)
        self.weights = weights / weights.sum()
        self.length, self.batch_size, self.seed, self.pack = length, batch_size, seed, pack
        self._before = [np.zeros(len(self.sequences), dtype=np.int64)]  # of each kind, before each block
        self._block = lru_cache(maxsize=4)(self._draw_block)
        self._order = lru_cache(maxsize=2 * len(self.sequences))(self._draw_order)
        self._pool = lru_cache(maxsize=2)(self._draw_pool)

    def __reduce__(self) -> tuple[Any, ...]:  # caches of bound methods cannot be pickled for a DataLoader's workers
        make = partial(SequenceStream, batch_size=self.batch_size, seed=self.seed, pack=self.pack)
        return make, (self.kinds, self.length)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, batch: int) -> list[dict[str, Tensor]]:
        """Rows: input_ids and position_ids that start again with each packed sequence; or input_ids and labels."""
        if not 0 <= batch < self.length:
            raise IndexError(batch)
        pool, position = divmod(batch, _BATCHES)
        return [self._row(row) for row in self._pool(pool)[position]]

    def _row(self, sequences: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        if self.sequences[0].encoder_decoder:
            source, target = sequences[0]
            return {"input_ids": torch.tensor(source), "labels": torch.tensor(target)}
        return {
            "input_ids": torch.tensor([token for _, ids in sequences for token in ids]),
            "position_ids": torch.cat([torch.arange(len(ids)) for _, ids in sequences]),
        }

    def _draw_pool(self, pool: int) -> list[list[list[tuple[list[int], list[int]]]]]:
        """Batches of rows, drawn together: of like length within one, of as many tokens, in random order."""
        count = self.batch_size * _BATCHES
        rows = [
            [self._sequence(row * self.pack + i) for i in range(self.pack)]
            for row in range(pool * count, (pool + 1) * count)
        ]
        lengths = np.array([sum(len(source) + len(target) for source, target in row) for row in rows])
        order = np.argsort(lengths, kind="stable")
        tokens = lengths[order].cumsum()
        cuts = np.searchsorted(tokens, tokens[-1] * np.arange(1, _BATCHES) / _BATCHES, side="left") + 1
        # Lengths ascend, so batches can be empty at the end alone, where single rows are longer than a batch's share.
        cuts = np.minimum(cuts, count - np.arange(_BATCHES - 1, 0, -1))
        batches = [[rows[i] for i in part] for part in np.split(order, cuts)]
        return [batches[i] for i in np.random.default_rng([self.seed, 3, pool]).permutation(_BATCHES)]

    def _sequence(self, number: int) -> tuple[list[int], list[int]]:
        block, offset = divmod(number, _BLOCK)
        kind, visit = (int(drawn[offset]) for drawn in self._block(block))
        sequences = self.sequences[kind]
        turn, position = divmod(visit, len(sequences))
        return sequences.make(int(self._order(kind, turn)[position]), np.random.default_rng([self.seed, 2, number]))

    def _draw_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Kind of each number of a block, and how many of that kind came before it."""
        for i in range(len(self._before), block + 1):
            self._before.append(self._before[-1] + np.bincount(self._kinds(i - 1), minlength=len(self.sequences)))
        kinds = self._kinds(block)
        visits = np.empty_like(kinds)
        for kind, before in enumerate(self._before[block]):
            mine = kinds == kind
            visits[mine] = before + np.arange(mine.sum())
        return kinds, visits

    def _kinds(self, block: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 0, block]).choice(len(self.weights), size=_BLOCK, p=self.weights)

    def _draw_order(self, kind: int, turn: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 1, kind, turn]).permutation(len(self.sequences[kind]))
