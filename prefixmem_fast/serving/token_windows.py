"""The last tokens before each token of an engine's step, from what the engine keeps of its requests.

A step of an engine with continuous batching is one row of tokens, request after request: whole prompts, parts of them,
and single tokens. The encoder wants windows ``[n, W]`` that end in them. This is plain PyTorch, and a GPU waits for
nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def requests_of_tokens(query_start_loc: Tensor, tokens: int) -> Tensor:
    """Which request each of n tokens is of: int64 ``[n]``; tokens past the last request count to it.

    Args:
        query_start_loc: ``[R + 1]``, where the tokens of each request begin.
    """
    place = torch.arange(tokens, device=query_start_loc.device, dtype=query_start_loc.dtype)
    return torch.searchsorted(query_start_loc[1:-1].contiguous(), place, right=True)


def windows_of_step(
    input_ids: Tensor,
    positions: Tensor,
    query_start_loc: Tensor,
    slots: Tensor,
    all_tokens: Tensor,
    width: int,
) -> Tensor:
    """Windows of the tokens of a step, where the engine keeps every request's tokens in a row.

    Tokens of the step are read in the step itself: the newest of them may not stand in the row yet.

    Args:
        input_ids: ``[n]``, tokens of the step.
        positions: ``[n]``, where each stands in its request.
        query_start_loc: ``[R + 1]``, where the tokens of each request begin in the step.
        slots: ``[R]``, the row of each request in `all_tokens`.
        all_tokens: ``[rows, length]``.
        width: W.

    Returns:
        int64 ``[n, W]``, -1 before the beginning of a request.
    """
    n = len(input_ids)
    request = requests_of_tokens(query_start_loc, n)  # [n]
    begin = query_start_loc.long()[request]
    back = torch.arange(width - 1, -1, -1, device=input_ids.device)
    place = torch.arange(n, device=input_ids.device)[:, None] - back  # [n, W], in the step
    position = positions.long()[:, None] - back  # in the request
    earlier = all_tokens[slots.long()[request][:, None], position.clamp(0, all_tokens.shape[1] - 1)]
    tokens = torch.where(place >= begin[:, None], input_ids[place.clamp(min=0)], earlier)
    return torch.where(position >= 0, tokens, -1).long()


class TokenStore:
    """The tokens of a paged KV cache, laid out as its keys: what has keys there has its token here.

    A block that requests share, keep through preemption or find again in a prefix cache so carries its tokens.

    Args:
        slots: of the cache, ``blocks x block_size``.
        block_size: tokens a block, as the block tables count them.
    """

    def __init__(self, slots: int, block_size: int, device: torch.device) -> None:
        self.block_size, self._checked = block_size, False
        self._tokens = torch.full((slots + 1,), -1, dtype=torch.int64, device=device)  # the last one of padding

    def windows(
        self,
        input_ids: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        query_start_loc: Tensor,
        block_table: Tensor,
        width: int,
    ) -> Tensor:
        """Keep the tokens of a step, and return their windows int64 ``[n, W]``, -1 before the beginning.

        Args:
            input_ids, positions: ``[n]``, tokens of the step and where each stands in its request.
            slot_mapping: ``[n]``, the slot of each; -1 of padding.
            query_start_loc: ``[R + 1]``, where the tokens of each request begin in the step.
            block_table: ``[R, blocks]``, the blocks of each request.
            width: W.

        Raises:
            NotImplementedError: the slots are not those of the blocks.
        """
        if not self._checked:
            self._check(positions, slot_mapping, query_start_loc, block_table)
        padding = len(self._tokens) - 1
        self._tokens[torch.where(slot_mapping >= 0, slot_mapping, padding).long()] = input_ids.long()
        request = requests_of_tokens(query_start_loc, len(input_ids))[:, None]
        position = positions.long()[:, None] - torch.arange(width - 1, -1, -1, device=input_ids.device)
        block = (position.clamp(min=0) // self.block_size).clamp(max=block_table.shape[1] - 1)
        slot = block_table[request, block].long() * self.block_size + position % self.block_size
        return torch.where(position >= 0, self._tokens[slot.clamp(0, padding)], -1)

    def _check(self, positions: Tensor, slot_mapping: Tensor, query_start_loc: Tensor, block_table: Tensor) -> None:
        """Hold the first step's slots against its blocks: an engine may lay its cache out otherwise."""
        request = requests_of_tokens(query_start_loc, len(positions))
        block = block_table[request, (positions // self.block_size).clamp(max=block_table.shape[1] - 1)]
        expected = block.long() * self.block_size + positions % self.block_size
        real = slot_mapping >= 0
        if not torch.equal(slot_mapping[real].long(), expected[real]):
            raise NotImplementedError(
                f"the slots of this engine's KV cache are not those of its blocks of {self.block_size} tokens, so the "
                "tokens before a token cannot be found; take the V2 model runner (VLLM_USE_V2_MODEL_RUNNER=1), or "
                "another block_size"
            )
        self._checked = True
