"""The control: as many memory rows and reads, and no information on the prefix.

Each time a SID is read, every level l takes the rows of a prefix drawn at random among those of the catalogue that end
in the same code c_l. So exactly the rows of real prefixes are read and trained, and the code itself is still known, but
what stood before it is not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prefixmem_fast import PrefixMem, SIDVocabulary, attach
from prefixmem_fast.addressing import TokenStream, token_codes
from prefixmem_fast.recommender.training.arms import build_encoder
from prefixmem_fast.recommender.training.config import RunConfig


class PermutedPrefixMem(PrefixMem):
    """A PrefixMem that reads the rows of exchanged prefixes.

    Args:
        encoder: what it is made from; its parameters are taken over.
        catalogue_codes: int64 ``[items, L]``.
    """

    def __init__(self, encoder: PrefixMem, catalogue_codes: Tensor) -> None:
        nn.Module.__init__(self)
        self.config, self.dropout = encoder.config, encoder.dropout
        self.memory, self.out_proj = encoder.memory, encoder.out_proj
        self._prefixes = [_by_last_code(catalogue_codes[:, : l + 1]) for l in range(self.config.levels)]

    def encode_tokens(
        self,
        input_ids: Tensor,
        vocabulary: SIDVocabulary,
        segment_ids: Tensor | None = None,
        *,
        new_tokens: int | None = None,
    ) -> Tensor:
        spec = self.config.spec
        codes, level = token_codes(
            TokenStream(input_ids, vocabulary.token_table(input_ids.device), segment_ids), spec.levels
        )
        if new_tokens is not None:
            codes, level = codes[:, codes.shape[1] - new_tokens :], level[:, level.shape[1] - new_tokens :]
        out = codes.new_zeros(*level.shape, self.config.memory_dim, dtype=self.memory.weight.dtype)
        for a, active in enumerate(spec.active_levels):
            here = level == active
            if bool(here.any()):
                out = out.masked_scatter(here[..., None], self.memory(self._exchange(codes[here], active))[:, a])
        return self.out_proj(self._drop(out))

    def _exchange(self, codes: Tensor, level: int) -> Tensor:
        prefixes, first, count = self._prefixes[level - 1]
        last = codes[:, level - 1]
        drawn = first[last] + (torch.rand(len(last)) * count[last]).long()
        return torch.cat([prefixes[drawn], codes[:, level:]], 1)


def _by_last_code(prefixes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct prefixes ``[P, l]`` ordered by their last code, and for each code its first place and their number."""
    distinct = prefixes.unique(dim=0)
    distinct = distinct[distinct[:, -1].argsort(stable=True)]
    count = torch.bincount(distinct[:, -1])
    return distinct, count.cumsum(0) - count, count


def add_permuted(model: nn.Module, config: RunConfig, vocabulary: SIDVocabulary, codes: Tensor) -> None:
    """In place of `arms.add_arm` of the library."""
    width = model.get_input_embeddings().weight.shape[1]
    attach(model, PermutedPrefixMem(build_encoder(config, vocabulary.codebook_sizes, width), codes), vocabulary)
