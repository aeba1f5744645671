"""Recall@K, NDCG@K and what else the beams of next-item searches tell (PrefixMem, arXiv 2606.00324)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ...sid.trie import SIDTrie
from ..data import Examples, Tokens
from .beams import beam_search
from .prompts import is_encoder_decoder, prompts_of

NOT_FOUND = np.iinfo(np.int64).max


@dataclass
class Retrieval:
    """What beam search found for N examples.

    Attributes:
        rank: int64 ``[N]``, items ranked above the true one; NOT_FOUND where the beams do not name it.
        sid_rank: int64 ``[N]``, SIDs ranked above the true item's: the same unless items share a SID.
        hits: float64 ``[N, L]``, share of the beams whose first l codes are the prefix of an item (SID hit rate).
        first_codes: int64 ``[N]``, distinct codes of level 1 among the beams.
    """

    rank: np.ndarray
    sid_rank: np.ndarray
    hits: np.ndarray
    first_codes: np.ndarray


def retrieve(
    model: nn.Module,
    examples: Examples,
    tokens: Tokens,
    trie: SIDTrie,
    *,
    num_beams: int = 20,
    constrained: bool = True,
    popularity: np.ndarray | None = None,
    max_tokens: int = 16384,
    progress: Callable[[int], object] | None = None,
) -> Retrieval:
    """Search the next SID after each history.

    Items that share a SID are ranked side by side, the more popular one first. A SID that no item has takes a place.

    Args:
        trie: the catalogue.
        constrained: whether beams stay among the prefixes of the catalogue.
        popularity: of each item, for ties; by default the catalogue's order decides.
        max_tokens: of a batch, beams included.
        progress: told how many examples are done, batch by batch.
    """
    levels, device = tokens.levels, next(model.parameters()).device
    shared = _SharedSIDs(tokens, trie, popularity)
    retrieval = Retrieval(
        np.full(len(examples), NOT_FOUND),
        np.full(len(examples), NOT_FOUND),
        np.zeros((len(examples), levels)),
        np.zeros(len(examples), np.int64),
    )
    encoder_decoder, training = is_encoder_decoder(model), model.training
    model.eval()
    longest = max(map(len, examples.histories), default=0) + 1
    share = longest / (longest + num_beams)  # of the history in a batch's tokens
    try:
        for batch in prompts_of(
            examples, tokens, encoder_decoder=encoder_decoder, device=device, max_tokens=int(max_tokens * share)
        ):
            beams = beam_search(model, batch.input_ids, levels, num_beams, trie if constrained else None)
            depth = _depth(beams.tokens, trie)  # [B, K]
            real = beams.scores > -torch.inf
            rows = batch.rows
            for l in range(levels):
                inside = ((depth > l) & real).sum(1) / real.sum(1).clamp(min=1)
                retrieval.hits[rows, l] = inside.cpu().numpy()
            first = torch.where(real, trie.vocabulary.decode(beams.tokens)[..., 0], -1).cpu()
            retrieval.first_codes[rows] = [len(set(row) - {-1}) for row in first.tolist()]
            ranks = shared.ranks(beams.tokens, real, examples.targets[rows])
            retrieval.rank[rows], retrieval.sid_rank[rows] = ranks
            if progress is not None:
                progress(len(rows))
    finally:
        model.train(training)
    return retrieval


def _depth(sids: Tensor, trie: SIDTrie) -> Tensor:
    """How many codes of SIDs ``[B, K, L]`` are the prefix of an item."""
    nodes, depth = torch.zeros_like(sids[..., 0]).flatten(), torch.zeros_like(sids[..., 0]).flatten()
    for token in sids.flatten(0, 1).unbind(1):
        nodes = trie.child(nodes, token)
        depth += nodes >= 0
    return depth.view(sids.shape[:2])


class _SharedSIDs:
    """Which items share a SID, and in which order they are ranked."""

    def __init__(self, tokens: Tokens, trie: SIDTrie, popularity: np.ndarray | None) -> None:
        self.trie = trie
        sids = torch.from_numpy(tokens.sids)
        leaf = trie.follow(torch.zeros(len(sids), dtype=torch.int64), sids).numpy()
        order = np.lexsort((np.arange(len(leaf)), -(np.zeros(len(leaf)) if popularity is None else popularity), leaf))
        starts = np.flatnonzero(np.r_[True, np.diff(leaf[order]) > 0])
        within = np.empty(len(leaf), dtype=np.int64)
        within[order] = np.arange(len(leaf)) - np.repeat(starts, np.diff(np.r_[starts, len(leaf)]))
        self.leaf, self.within = leaf, within
        self.sizes = np.bincount(leaf)  # items of each leaf

    def ranks(self, sids: Tensor, real: Tensor, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the items and of their SIDs."""
        nodes = self.trie.follow(torch.zeros_like(sids[..., 0]).flatten(), sids.flatten(0, 1))
        nodes = torch.where(real, nodes.view(real.shape), -2).cpu().numpy()  # [B, K]
        sizes = np.where(nodes >= 0, self.sizes[np.clip(nodes, 0, None)], nodes == -1)
        before = np.cumsum(sizes, 1) - sizes
        here = nodes == self.leaf[targets][:, None]
        beam = here.argmax(1)
        rank = before[np.arange(len(nodes)), beam] + self.within[targets]
        found = here.any(1)
        return np.where(found, rank, NOT_FOUND), np.where(found, beam, NOT_FOUND)


def recall(rank: np.ndarray, at: int) -> float:
    """Recall@K of one target an example: the share of ranks below K; NaN without examples."""
    return float((rank < at).mean()) if len(rank) else float("nan")


def ndcg(rank: np.ndarray, at: int) -> float:
    """NDCG@K of one target an example: the mean of 1 / log2(rank + 2) where the rank is below K."""
    if not len(rank):
        return float("nan")
    return float(np.where(rank < at, 1 / np.log2(np.minimum(rank, at) + 2.0), 0.0).mean())


def ranking_metrics(rank: np.ndarray, cutoffs: Sequence[int]) -> dict[str, float]:
    return {f"{name}@{k}": measure(rank, k) for k in cutoffs for name, measure in (("recall", recall), ("ndcg", ndcg))}
