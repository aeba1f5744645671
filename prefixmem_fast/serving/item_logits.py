"""Logits of an engine's step, masked so that every request goes on with an item of a catalogue."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sid import SIDTrie


def nodes_of_rows(trie: SIDTrie, prompts: Tensor, generated: Tensor, counts: Tensor) -> Tensor:
    """Where the search of each row stands: int64 ``[N]`` nodes of the trie, -1 where it has left it.

    Args:
        prompts: int64 ``[N, depth - 1]``, the ends of the prompts, -1 before their beginning.
        generated: int64 ``[N, depth]``, the first tokens that followed.
        counts: ``[N]``, how many of them there are.
    """
    nodes = trie.enter(prompts)
    for place, token in enumerate(generated.unbind(1)):
        nodes = torch.where(counts > place, trie.follow(nodes, token[:, None]), nodes)
    return nodes


def only_items(logits: Tensor, trie: SIDTrie, nodes: Tensor, end: int) -> Tensor:
    """Log-probabilities ``[N, V]`` over the whole vocabulary at the tokens that may follow, -inf at all others.

    They are what beam search adds up, and sampling among them is sampling among the allowed logits.

    Args:
        logits: float32 ``[N, V]``.
        nodes: int64 ``[N]``, from `nodes_of_rows`.
        end: the token id that follows a whole SID, at 0.
    """
    scores = logits.float().log_softmax(-1)
    allowed, kept = trie.allowed_scores(nodes, scores, end)
    masked = torch.full_like(scores, -torch.inf)
    masked.view(-1)[allowed] = kept
    return masked
