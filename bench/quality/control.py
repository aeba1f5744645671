"""The controls: as many memory rows and reads, and no information on what they are named after.

Each time a SID is read, every level l takes the rows of a prefix drawn at random among those of the catalogue that end
in the same code c_l. So exactly the rows of real prefixes are read and trained, and the code itself is still known, but
what stood before it is not. Cross-item orders take the rows of an item drawn at random among those that some item of
the same prefix followed in training; so the prefix is still known, and the item before is not.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from prefixmem_fast import PrefixMem, SIDVocabulary, attach
from prefixmem_fast.addressing import TokenStream, first_codes, lagged_windows, token_codes
from prefixmem_fast.recommender.data import Histories
from prefixmem_fast.recommender.training.arms import build_encoder
from prefixmem_fast.recommender.training.config import RunConfig


class _Permuted(PrefixMem):
    """A PrefixMem that reads rows of exchanged codes. It takes over the parameters of the one it is made from."""

    def __init__(self, encoder: PrefixMem) -> None:
        nn.Module.__init__(self)
        self.config, self.dropout = encoder.config, encoder.dropout
        for name in ("memory", "lag_weights", "out_proj", "head_proj", "cross_item"):
            setattr(self, name, getattr(encoder, name))


class PermutedPrefixMem(_Permuted):
    """Of other prefixes that end in the same code.

    Args:
        catalogue_codes: int64 ``[items, L]``.
    """

    def __init__(self, encoder: PrefixMem, catalogue_codes: Tensor) -> None:
        super().__init__(encoder)
        self._prefixes = [_by_last_code(catalogue_codes[:, : l + 1]) for l in range(self.config.levels)]

    def read_tokens(
        self,
        input_ids: Tensor,
        vocabulary: SIDVocabulary,
        segment_ids: Tensor | None = None,
        *,
        new_tokens: int | None = None,
    ) -> Tensor:
        spec = self.config.spec
        stream = TokenStream(input_ids, vocabulary.token_table(input_ids.device), segment_ids)
        codes, level = token_codes(stream, spec.levels)
        if new_tokens is not None:
            codes, level = codes[:, codes.shape[1] - new_tokens :], level[:, level.shape[1] - new_tokens :]
        places = [(level == active).flatten().nonzero().squeeze(1) for active in spec.active_levels]
        codes = codes.flatten(0, 1)
        read = torch.cat([self.exchange(codes[p], a) for p, a in zip(places, spec.active_levels, strict=True)])
        slot = torch.cat([torch.full_like(p, a) for a, p in enumerate(places)])
        S = self.memory(read)[torch.arange(len(read)), slot]  # one reading of the table, as fused updates need
        return S.new_zeros(level.numel(), S.shape[1]).index_copy(0, torch.cat(places), S).view(*level.shape, -1)

    def exchange(self, codes: Tensor, level: int) -> Tensor:
        prefixes, first, count = self._prefixes[level - 1]
        last = codes[:, level - 1]
        drawn = first[last] + (torch.rand(len(last)) * count[last]).long()
        return torch.cat([prefixes[drawn], codes[:, level:]], 1)


class PermutedCrossItem(_Permuted):
    """Of other items before.

    Args:
        catalogue_codes: int64 ``[items, L]``.
        train: its transitions from item to item are those that rows are drawn of.
    """

    def __init__(self, encoder: PrefixMem, catalogue_codes: Tensor, train: Histories) -> None:
        super().__init__(encoder)
        before, after = (
            catalogue_codes[torch.from_numpy(np.concatenate([items[part] for items in train.items]))]
            for part in (slice(None, -1), slice(1, None))
        )
        self._transitions = [_by_prefix(before, after[:, :l]) for l in range(self.config.levels)]

    def read_tokens(
        self,
        input_ids: Tensor,
        vocabulary: SIDVocabulary,
        segment_ids: Tensor | None = None,
        *,
        new_tokens: int | None = None,
    ) -> Tensor:
        stream = TokenStream(input_ids, vocabulary.token_table(input_ids.device), segment_ids)
        windows, place = lagged_windows(stream, self.config.spec, self.config.lags, new_tokens)
        active = self.config.spec.active_levels
        there = (windows[..., 0] >= 0).flatten().nonzero().squeeze(1)  # an item of its own for each level that is read
        codes = windows.flatten(0, 2)[there]
        read = torch.stack([self.exchange(codes, level) for level in active], 1)
        read = first_codes(read, self.config.spec, self.config.earlier_codes)
        S = self.memory(read)[:, torch.arange(len(active)), torch.arange(len(active))]  # [windows, A, memory_dim]
        S = S.new_zeros(windows.shape[:3].numel(), *S.shape[1:]).index_copy(0, there, S)
        return self.at_tokens(S.view(*windows.shape[:3], *S.shape[1:]), place)

    def exchange(self, codes: Tensor, level: int) -> Tensor:
        L = self.config.levels
        before, prefixes, first, count = self._transitions[level - L]
        own = _keys(codes[:, L:level])
        place = torch.searchsorted(prefixes, own).clamp(max=len(prefixes) - 1)
        drawn = before[first[place] + (torch.rand(len(own)) * count[place]).long()]
        drawn = torch.where(
            (prefixes[place] == own)[:, None], drawn, codes[:, :L]
        )  # no item of this prefix followed any
        return torch.cat([drawn, codes[:, L:]], 1)


def _keys(prefixes: Tensor) -> Tensor:
    """A number for each prefix ``[P, l]`` of codes below 2^15."""
    key = torch.zeros(len(prefixes), dtype=torch.int64)
    for code in prefixes.unbind(1):
        key = (key << 15) + code
    return key


def _by_prefix(before: Tensor, prefixes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Items before, ordered by the prefix that followed; the distinct prefixes, their first places and numbers."""
    key, order = _keys(prefixes).sort(stable=True)
    distinct, count = key.unique_consecutive(return_counts=True)
    return before[order], distinct, count.cumsum(0) - count, count


def _by_last_code(prefixes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct prefixes ``[P, l]`` ordered by their last code, and for each code its first place and their number."""
    distinct = prefixes.unique(dim=0)
    distinct = distinct[distinct[:, -1].argsort(stable=True)]
    count = torch.bincount(distinct[:, -1])
    return distinct, count.cumsum(0) - count, count


def add_permuted(
    model: nn.Module, config: RunConfig, vocabulary: SIDVocabulary, codes: Tensor, train: Histories
) -> None:
    """In place of `arms.add_arm` of the library: exchanged items before where cross-item orders are, else prefixes."""
    encoder = build_encoder(config, vocabulary.codebook_sizes, model.get_input_embeddings().weight.shape[1])
    if encoder.cross_item is None:
        encoder = PermutedPrefixMem(encoder, codes)
    else:
        part = encoder
        while part.cross_item is not None:
            part.cross_item = PermutedCrossItem(part.cross_item, codes, train)
            part = part.cross_item
    attach(model, encoder, vocabulary)
