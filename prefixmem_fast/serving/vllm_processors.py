"""The logits processor of vLLM that keeps every request among the items of a catalogue, for both model runners.

The trie is read from the path in the engine's `additional_config`: the engine's workers are other processes. A request
with ``extra_args={"prefixmem_free": True}`` is left alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..sid import SIDTrie
from .item_logits import nodes_of_rows, only_items
from .vllm import FREE, settings_of

try:  # vLLM takes subclasses of its own classes alone
    from vllm.v1.sample.logits_processor.interface import LogitsProcessor as ProcessorV1
except ImportError:
    ProcessorV1 = object
try:
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as ProcessorV2
except ImportError:
    ProcessorV2 = object
_BASES = tuple(dict.fromkeys((ProcessorV1, ProcessorV2)))


class ItemsOnly(*_BASES):
    """Log-probabilities of the tokens that go on with an item, and -inf elsewhere; after a whole SID the end follows.

    vLLM makes it as ``(vllm_config, device, is_pin_memory)`` on V1 and as ``(vllm_config, req_states)`` on V2.
    """

    def __init__(self, vllm_config: Any, state: Any, is_pin_memory: bool | None = None) -> None:
        settings = settings_of(vllm_config)
        self.trie, self.end = SIDTrie.load(settings["trie"]), int(settings["end"])
        self._requests: dict[int, tuple[list[int], list[int]]] = {}  # of V1: prompt and output of each place
        self._states = state if is_pin_memory is None else None  # of V2
        self._free: set[int] = set()  # slots of V2 whose requests are left alone

    def is_argmax_invariant(self) -> bool:
        return False

    # V1: requests have places in the batch, which change.

    def update_state(self, batch_update: Any) -> None:
        if batch_update is None:
            return
        for place in batch_update.removed:
            self._requests.pop(place, None)
        for place, params, prompt, output in batch_update.added:
            self._requests.pop(place, None)
            if not _is_free(params):
                self._requests[place] = prompt or [], output
        for one, other, direction in batch_update.moved:
            moved, displaced = self._requests.pop(one, None), self._requests.pop(other, None)
            if moved is not None:
                self._requests[other] = moved
            if displaced is not None and direction.name == "SWAP":
                self._requests[one] = displaced

    # V2: requests have slots, which stay.

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        free = _is_free(sampling_params)
        (self._free.add if free else self._free.discard)(req_idx)
        return not free

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        rows, nodes = self._nodes_v1(logits) if ctx is None else self._nodes_v2(ctx)
        if len(rows):
            logits[rows] = only_items(logits[rows], self.trie, nodes, self.end).to(logits.dtype)
        return logits

    def _nodes_v1(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        places, depth = sorted(place for place in self._requests if place < len(logits)), self.trie.depth
        prompts, generated, counts = [], [], []
        for prompt, output in map(self._requests.__getitem__, places):
            tail, first = prompt[max(len(prompt) - depth + 1, 0) :], output[:depth]
            prompts.append([-1] * (depth - 1 - len(tail)) + tail)
            generated.append(first + [-1] * (depth - len(first)))
            counts.append(len(first))
        on = {"dtype": torch.int64, "device": logits.device}
        prompts = torch.tensor(prompts, **on).view(len(places), depth - 1)
        generated = torch.tensor(generated, **on).view(len(places), depth)
        return torch.tensor(places, **on), nodes_of_rows(self.trie, prompts, generated, torch.tensor(counts, **on))

    def _nodes_v2(self, ctx: Any) -> tuple[Tensor, Tensor]:
        depth, states = self.trie.depth, self._states
        slots = ctx.expanded_idx_mapping.long()
        rows = torch.arange(len(slots), device=slots.device)
        if self._free:
            free = torch.tensor(sorted(self._free), device=slots.device)
            rows = rows[~torch.isin(slots, free)]
        slots, last = slots[rows], ctx.pos[rows].long()
        tokens, prompt = states.all_token_ids.gpu, states.prompt_len.gpu[slots].long()
        place = prompt[:, None] + torch.arange(1 - depth, depth, device=slots.device)  # [N, 2 * depth - 1]
        found = tokens[slots[:, None], place.clamp(0, tokens.shape[1] - 1)].long()
        found = torch.where(place == last[:, None], ctx.input_ids[rows].long()[:, None], found)
        found = torch.where((place >= 0) & (place <= last[:, None]), found, -1)
        before, generated = found[:, : depth - 1], found[:, depth - 1 :]
        return rows, nodes_of_rows(self.trie, before, generated, last + 1 - prompt)


def _is_free(params: Any) -> bool:
    return bool((getattr(params, "extra_args", None) or {}).get(FREE))
