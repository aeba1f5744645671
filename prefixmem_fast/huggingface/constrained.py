"""Generation that names items: a logits processor over the trie of a catalogue, and beam search with it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..sid import SIDTrie

# Set by generate_items itself.
_TAKEN = frozenset(
    ("max_new_tokens", "max_length", "length_penalty", "output_scores", "return_dict_in_generate", "generation_config")
)
# The generation config of a model is exchanged while it generates: threads take turns.
_TAKING_TURNS = threading.RLock()
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


class SIDLogitsProcessor(LogitsProcessor):
    """Allows the tokens that go on with the SID of an item, and nothing else, until the SID is whole.

    The prompt may end inside a SID; if no item has that prefix, it is text and a new SID begins. After a whole
    SID, `eos_token_id` follows at a score of 0: log-probability 0 in beam search, so ranks stay those of the SIDs.

    No result depends on the calls before, so beams may be reordered and calls repeated. Scores that other processors
    change before this one are ranked as they come: see `generate_items`, which switches the model's settings off.

    Args:
        trie: the items.
        prompt_length: tokens given to `generate`; 1 for an encoder-decoder without `decoder_input_ids`.
        eos_token_id: what follows a whole SID.
    """

    supports_continuous_batching = False

    def __init__(self, trie: SIDTrie, prompt_length: int, eos_token_id: int) -> None:
        if trie.vocabulary.is_code(eos_token_id):
            raise ValueError(f"eos_token_id = {eos_token_id} is the token of a code; end with another")
        self.trie, self.prompt_length, self.eos_token_id = trie, prompt_length, eos_token_id
        self._entered: tuple[Tensor, Tensor] | None = None  # ends of the last prompts, and their nodes
        self._last: tuple[Tensor, Tensor, int] | None = None  # returned last: scores, where finite, their version

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores ``[N, V]`` after tokens ``[N, T]``, with -inf at all tokens that are not allowed."""
        largest = max(self.trie.largest_token, self.eos_token_id)
        if largest >= scores.shape[1]:
            raise ValueError(f"the trie and eos_token_id reach token id {largest}, the scores {scores.shape[1] - 1}")
        nodes = self.trie.follow(self._enter(input_ids[:, : self.prompt_length]), input_ids[:, self.prompt_length :])
        place = self.trie.allowed(nodes, scores.shape[1])
        kept = torch.take(scores, place)
        over = ((nodes < 0) | self.trie.is_leaf(nodes)).nonzero().squeeze(1)  # a whole SID, or no prefix of one
        if len(over):
            place = torch.cat([place, over * scores.shape[1] + self.eos_token_id])
            kept = torch.cat([kept, kept.new_zeros(len(over))])
        masked = self._nothing_allowed(scores)
        masked.view(-1).scatter_(0, place, kept)
        if not masked.is_inference() and not torch.is_grad_enabled():
            self._last = masked, place, masked._version
        return masked

    def _enter(self, prompt: Tensor) -> Tensor:
        """Where prompts end; looked up again where they are those of the last call, as they are in a search."""
        tail = prompt[:, max(prompt.shape[1] - self.trie.depth, 0) :]
        if self._entered is None or tail.device != self._entered[0].device or not torch.equal(tail, self._entered[0]):
            self._entered = tail.clone(), self.trie.enter(prompt)
        return self._entered[1]

    def _nothing_allowed(self, scores: Tensor) -> Tensor:
        """-inf ``[N, V]``: what the last call returned, cleaned, where nobody holds it or has written to it.

        Beam search drops it at once, and filling N x V anew would cost more than all the rest.
        """
        last, self._last = self._last, None
        if last is not None:
            masked, place, version = last
            del last
            like = (masked.shape, masked.dtype, masked.device) == (scores.shape, scores.dtype, scores.device)
            probe = torch.empty(0)  # held as `masked` should be: by one variable
            if like and masked._version == version and _references(masked) == _references(probe):
                masked.view(-1).index_fill_(0, place, -torch.inf)
                return masked
        return torch.full(scores.shape, -torch.inf, dtype=scores.dtype, device=scores.device)


def _references(tensor: Tensor) -> tuple[int, int]:
    """How often a tensor and its memory are held."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    return sys.getrefcount(tensor), count(tensor.untyped_storage()._cdata) if count else id(tensor)


@dataclass
class GeneratedItems:
    """What `generate_items` found for B prompts.

    Attributes:
        items: K tuples for each prompt, the items that share a SID; empty where fewer than K SIDs were found.
        scores: float ``[B, K]``, log-probability of each SID after its prompt, descending; -inf where there is none.
        sids: int64 ``[B, K, L]``, codes; -1 where there is none.
        sequences: token ids ``[B * K, T]``, prompts included.
    """

    items: list[list[tuple[str, ...]]]
    scores: Tensor
    sids: Tensor
    sequences: Tensor


def generate_items(
    model: nn.Module,
    trie: SIDTrie,
    inputs: Mapping[str, Tensor],
    *,
    num_beams: int = 20,
    num_return_sequences: int | None = None,
    **generation: Any,
) -> GeneratedItems:
    """Beam search for the next item after each prompt, among the items of a catalogue.

    Settings of the model's generation config do not apply: sampling, penalties and length limits that a chat model
    brings make beams invalid or equal. Those in `generation` do.

    Args:
        model: a causal LM or encoder-decoder of transformers, with an encoder attached or without.
        trie: the items.
        inputs: of `generate`: input_ids ``[B, T]`` padded on the left, attention_mask; for an encoder-decoder,
            decoder_input_ids where it goes on with something.
        num_beams: beams of each prompt, 2 or more.
        num_return_sequences: K; `num_beams` unless given.
        generation: further arguments of `generate`; a `logits_processor` comes before the trie's.

    Raises:
        TypeError, ValueError: an argument is not as stated, or the model names no end-of-sequence token.
    """
    count = num_beams if num_return_sequences is None else num_return_sequences
    if num_beams < 2 or not 1 <= count <= num_beams:
        raise ValueError(
            f"num_beams = {num_beams}, num_return_sequences = {count}; give 2 or more beams and return 1..num_beams"
        )
    taken = sorted(_TAKEN.intersection(generation))
    if taken:
        raise ValueError(f"{taken[0]} is set by the search over the trie; leave it out, or call generate yourself")
    decoder_only = not getattr(model.config, "is_encoder_decoder", False)
    _check_inputs(inputs, decoder_only)
    eos = generation.get("eos_token_id", model.generation_config.eos_token_id)
    eos = eos[0] if isinstance(eos, (list, tuple)) else eos
    if eos is None:
        raise ValueError("the model's generation config has no eos_token_id; give eos_token_id")
    given = inputs["input_ids"] if decoder_only else inputs.get("decoder_input_ids")
    prompt_length = 1 if given is None else given.shape[1]
    processors = [*generation.pop("logits_processor", ()), SIDLogitsProcessor(trie, prompt_length, eos)]
    with neutral_generation(model):
        found = model.generate(
            **inputs,
            **{"do_sample": False, **generation},
            num_beams=num_beams,
            num_return_sequences=count,
            max_new_tokens=trie.depth,
            length_penalty=0.0,  # a score is then the sum of log-probabilities
            logits_processor=LogitsProcessorList(processors),
            output_scores=True,
            return_dict_in_generate=True,
        )
    nodes = trie.walk(found.sequences, prompt_length)
    # Where the catalogue has too few SIDs, transformers fills beams with others that it scores at -1e9.
    real = trie.is_leaf(nodes) & (found.sequences_scores > -1e8)
    nodes = torch.where(real, nodes, -1)
    items = trie.items_of(nodes)
    return GeneratedItems(
        items=[items[i : i + count] for i in range(0, len(items), count)],
        scores=found.sequences_scores.masked_fill(~real, -torch.inf).view(-1, count),
        sids=trie.sids_of(nodes).view(-1, count, trie.levels),
        sequences=found.sequences,
    )


def _check_inputs(inputs: Mapping[str, Tensor], decoder_only: bool) -> None:
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise TypeError(
            'inputs holds no input_ids [B, T]; give what tokenizer(texts, return_tensors="pt", padding=True) returned'
        )
    mask = inputs.get("attention_mask")
    if decoder_only and mask is not None and mask.shape[1] and not bool(mask[:, -1].all()):
        raise ValueError('inputs is padded on the right; a decoder goes on at the end: tokenizer.padding_side = "left"')


@contextmanager
def neutral_generation(model: nn.Module) -> Iterator[None]:
    """A generation config that says which tokens are special, and nothing else."""
    models = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    with _TAKING_TURNS:
        own = [each.__dict__.get("generation_config") for each in models]
        configs = [each.generation_config for each in models]
        try:
            for each, config in zip(models, configs, strict=True):
                each.generation_config = GenerationConfig(**{name: getattr(config, name) for name in _IDS})
            yield
        finally:
            for each, config in zip(models, own, strict=True):
                if config is not None:
                    each.generation_config = config
                else:
                    del each.generation_config
