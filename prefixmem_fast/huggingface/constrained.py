"""Generation that names items: a logits processor over the trie of a catalogue, and beam search with it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList

from ..sid import SIDTrie

# Set by generate_items itself.
_RESERVED = frozenset(
    ("max_new_tokens", "max_length", "length_penalty", "output_scores", "return_dict_in_generate", "generation_config")
)
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


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
        reuse_scores: the returned tensor is overwritten by the next call, which saves filling N x V numbers a step.
            Beam search allows it, as it copies the scores that it keeps; `sample` and greedy search do not.

    Raises:
        ValueError: `eos_token_id` is the token of a code.
    """

    supports_continuous_batching = False

    def __init__(self, trie: SIDTrie, prompt_length: int, eos_token_id: int, *, reuse_scores: bool = False) -> None:
        if trie.vocabulary.is_code(eos_token_id):
            raise ValueError(f"eos_token_id = {eos_token_id} is the token of a code; end with another")
        self.trie, self.prompt_length, self.eos_token_id = trie, prompt_length, eos_token_id
        self.reuse_scores = reuse_scores
        self._prompts: tuple[Tensor, Tensor] | None = None  # ends of the last prompts, and their nodes
        self._returned: tuple[Tensor, Tensor, int] | None = None  # the last scores, where finite, their version

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Mask the scores of tokens that no item goes on with.

        Args:
            input_ids: int64 ``[N, T]``, prompts and what has been generated.
            scores: float ``[N, V]`` of the next token; not changed.

        Returns:
            float ``[N, V]`` of the dtype of `scores`, -inf at all tokens that are not allowed.

        Raises:
            ValueError: the trie or `eos_token_id` has token ids of V or more.
        """
        nodes = self.trie.follow(
            self._nodes_of_prompts(input_ids[:, : self.prompt_length]), input_ids[:, self.prompt_length :]
        )
        allowed, allowed_scores = self.trie.allowed_scores(nodes, scores, self.eos_token_id)
        masked = self._all_masked(scores)
        masked.view(-1).scatter_(0, allowed, allowed_scores)
        if self.reuse_scores and not (masked.is_inference() or masked.requires_grad):
            self._returned = masked, allowed, masked._version
        return masked

    def _nodes_of_prompts(self, prompts: Tensor) -> Tensor:
        """Where prompts end; looked up again where they are those of the last call, as they are in a search."""
        tail = prompts[:, max(prompts.shape[1] - self.trie.depth, 0) :]
        if self._prompts is None or tail.device != self._prompts[0].device or not torch.equal(tail, self._prompts[0]):
            self._prompts = tail.clone(), self.trie.enter(prompts)
        return self._prompts[1]

    def _all_masked(self, scores: Tensor) -> Tensor:
        """-inf ``[N, V]``: with `reuse_scores` the last result, in which only the finite entries are masked again."""
        if self._returned is not None:
            masked, finite, version = self._returned
            same_kind = (masked.shape, masked.dtype, masked.device) == (scores.shape, scores.dtype, scores.device)
            if same_kind and masked._version == version:  # else a processor after this one wrote into it
                masked.view(-1).index_fill_(0, finite, -torch.inf)
                return masked
        return torch.full(scores.shape, -torch.inf, dtype=scores.dtype, device=scores.device)


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
    reserved = sorted(_RESERVED.intersection(generation))
    if reserved:
        raise ValueError(f"{reserved[0]} is set by the search over the trie; leave it out, or call generate yourself")
    decoder_only = not getattr(model.config, "is_encoder_decoder", False)
    _check_inputs(inputs, decoder_only)
    eos = generation.get("eos_token_id", model.generation_config.eos_token_id)
    eos = eos[0] if isinstance(eos, (list, tuple)) else eos
    if eos is None:
        raise ValueError("the model's generation config has no eos_token_id; give eos_token_id")
    prompt = inputs["input_ids"] if decoder_only else inputs.get("decoder_input_ids")
    prompt_length = 1 if prompt is None else prompt.shape[1]
    constraint = SIDLogitsProcessor(trie, prompt_length, eos, reuse_scores=True)
    processors = [*generation.pop("logits_processor", ()), constraint]
    search = model.generate(
        **inputs,
        **generation_arguments(
            model,
            num_beams=num_beams,
            num_return_sequences=count,
            max_new_tokens=trie.depth,
            length_penalty=0.0,  # a score is then the sum of log-probabilities
            output_scores=True,
            return_dict_in_generate=True,
            **generation,
        ),
        logits_processor=LogitsProcessorList(processors),
    )
    nodes = trie.walk(search.sequences, prompt_length)
    # Where the catalogue has too few SIDs, transformers fills beams with others that it scores at -1e9.
    real = trie.is_leaf(nodes) & (search.sequences_scores > -1e8)
    nodes = torch.where(real, nodes, -1)
    items = trie.items_of(nodes)
    return GeneratedItems(
        items=[items[i : i + count] for i in range(0, len(items), count)],
        scores=search.sequences_scores.masked_fill(~real, -torch.inf).view(-1, count),
        sids=trie.sids_of(nodes).view(-1, count, trie.levels),
        sequences=search.sequences,
    )


def _check_inputs(inputs: Mapping[str, Tensor], decoder_only: bool) -> None:
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise TypeError(
            'inputs holds no input_ids [B, T]; give what tokenizer(texts, return_tensors="pt", padding=True) returned'
        )
    prompts = {"input_ids": ids, "decoder_input_ids": inputs.get("decoder_input_ids")}
    for name, prompt in prompts.items():
        if isinstance(prompt, Tensor) and not prompt.numel():
            raise ValueError(
                f"inputs has {name} of shape {tuple(prompt.shape)}; give one prompt or more, each of a token or more"
            )
    mask = inputs.get("attention_mask")
    if decoder_only and mask is not None and mask.shape[1] and not bool(mask[:, -1].all()):
        raise ValueError('inputs is padded on the right; a decoder goes on at the end: tokenizer.padding_side = "left"')


def generation_arguments(model: nn.Module, **settings: Any) -> dict[str, Any]:
    """Arguments of `model.generate` under which `settings` hold, the model's special tokens, and else the defaults.

    Args:
        model: whose generation config is left out of account, special tokens aside; nothing in it is changed.
        settings: further arguments of `generate`, of its generation config or not.
    """
    special = {name: getattr(model.generation_config, name) for name in _SPECIAL_TOKENS}
    if "use_model_defaults" in inspect.signature(GenerationMixin.generate).parameters:  # transformers 4
        return {"generation_config": GenerationConfig(**special), "use_model_defaults": False, **settings}
    config = _CompleteConfig(**special)
    others = config.update(**settings)
    return {"generation_config": config, **others}


class _CompleteConfig(GenerationConfig):
    """A generation config whose unset entries stay unset.

    `generate` of transformers 5 has no argument for it: it fills them from the model's config, by this method alone.
    """

    def update(self, *, allow_custom_entries: bool = False, **settings: Any) -> dict[str, Any]:
        return {} if allow_custom_entries else super().update(**settings)
