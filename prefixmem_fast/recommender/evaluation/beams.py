"""Beam search for the Semantic ID that comes next, with the history read once and shared by all beams.

`generate` keeps a copy of the history's keys for each beam and moves it whenever beams change places. Here the tokens
of all beams stand in one row behind one copy of the history, as a tree that only grows:

    history | c1 c1' c1'' ... | c2 c2' c2'' ... | ...        a mask lets a token see the history and its own prefix

Encoder-decoders and models with a sliding window go through `generate`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...huggingface.hooks import NAME, unwrapped
from ...huggingface.kv_cache import cache_argument, cache_returned
from ...sid.trie import SIDTrie
from .prompts import is_encoder_decoder


@dataclass
class Beams:
    """What a search found, best first.

    Attributes:
        tokens: int64 ``[B, K, L]``, the SIDs as token ids.
        scores: float32 ``[B, K]``, their log-probabilities; -inf where a catalogue has fewer than K.
    """

    tokens: Tensor
    scores: Tensor


@torch.no_grad()
def beam_search(
    model: nn.Module,
    input_ids: Tensor,
    levels: int,
    num_beams: int,
    trie: SIDTrie | None = None,
    kept: list[Beams] | None = None,
) -> Beams:
    """The `num_beams` most likely SIDs after each history, as beam search finds them.

    Args:
        model: of transformers, in eval mode, with an encoder attached or without.
        input_ids: int64 ``[B, T]``, no padding, ending between SIDs.
        levels: L, or the tokens of a SID where others stand around its codes.
        trie: if given, beams stay among the prefixes of its catalogue; the probabilities are those of the whole
            vocabulary all the same.
        kept: if given, the beams of each level are appended, prefixes ``[B, K, l]``; encoder-decoders and models with
            a sliding window are searched once a level for it.

    Returns:
        one search a row of `input_ids`.
    """
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    sliding = getattr(text, "use_sliding_window", True) and getattr(text, "sliding_window", None)
    if is_encoder_decoder(model) or sliding:
        for level in range(1, levels) if kept is not None else ():
            kept.append(_by_generate(model, input_ids, level, num_beams, trie))
        found = _by_generate(model, input_ids, levels, num_beams, trie)
        if kept is not None:
            kept.append(found)
        return found
    batch, length = input_ids.shape
    encoder = getattr(model, NAME, None)
    reads = None if encoder is None else unwrapped(encoder).config
    context = 0 if reads is None else reads.history * reads.levels  # tokens of the items before the next one
    out = model(input_ids=input_ids, use_cache=True, logits_to_keep=1)
    cache, logits = cache_returned(out), out.logits[:, -1:]
    cache_name = next(name for module in model.modules() if (name := cache_argument(module)))
    beams = Beams(input_ids.new_empty(batch, 1, 0), logits.new_zeros(batch, 1, dtype=torch.float32))
    nodes = input_ids.new_zeros(batch, 1)
    sees = torch.ones(batch, 1, 0, dtype=torch.bool, device=input_ids.device)  # which tokens of the tree a beam holds
    for level in range(levels):
        if level:
            count = beams.tokens.shape[1]
            own = torch.eye(count, dtype=torch.bool, device=sees.device).expand(batch, -1, -1)
            sees = torch.cat([sees, own], -1)  # [B, K, tokens of the tree]
            logits = model(
                inputs_embeds=_embed(model, beams.tokens, input_ids[:, length - min(length, context) :]),
                **{cache_name: cache},
                attention_mask=_mask(sees, length, logits),
                position_ids=torch.full((batch, count), length + level - 1, device=sees.device),
                use_cache=True,
            ).logits
        beams, nodes, beam = _grow(beams, logits, nodes, num_beams, trie)
        sees = sees.gather(1, beam[..., None].expand(-1, -1, sees.shape[2]))
        if kept is not None:
            kept.append(beams)
    return beams


def _embed(model: nn.Module, tokens: Tensor, before: Tensor) -> Tensor:
    """Input embeddings ``[B, K, d]`` of the last tokens of beams ``[B, K, l]``, with what an encoder adds to them.

    Args:
        before: the last tokens of each history, ``[B, W]``: as many as cross-item orders may need, else none.
    """
    attachment = getattr(model, "prefixmem_attachment", None)
    if attachment is None:
        return model.get_input_embeddings()(tokens[..., -1])
    return attachment.embed_beams(torch.cat([before[:, None].expand(-1, tokens.shape[1], -1), tokens], -1))


def _mask(sees: Tensor, length: int, like: Tensor) -> Tensor:
    """``[B, 1, K, length + tree]``: 0 where a token may look, else the lowest number."""
    sees = torch.cat([sees.new_ones(*sees.shape[:2], length), sees], -1)
    mask = torch.zeros(sees.shape, dtype=like.dtype, device=like.device).masked_fill_(
        ~sees, torch.finfo(like.dtype).min
    )
    return mask[:, None]


def _grow(
    beams: Beams, logits: Tensor, nodes: Tensor, num_beams: int, trie: SIDTrie | None
) -> tuple[Beams, Tensor, Tensor]:
    """The best continuations of beams ``[B, K]`` by one token, from logits ``[B, K, V]``; nodes; what each goes on."""
    _, count, size = logits.shape
    scores = beams.scores[..., None] + logits.float().log_softmax(-1)  # [B, K, V]
    if trie is not None:
        allowed = trie.allowed(nodes.flatten(), size)
        allowed_scores = scores.flatten()[allowed]
        scores = torch.full_like(scores, -torch.inf)
        scores.view(-1)[allowed] = allowed_scores
    best, chosen = scores.flatten(1).topk(min(num_beams, count * size))
    beam, token = chosen // size, chosen % size
    prefix = beams.tokens.gather(1, beam[..., None].expand(-1, -1, beams.tokens.shape[2]))
    grown = Beams(torch.cat([prefix, token[..., None]], -1), best)
    if trie is not None:
        nodes = trie.child(nodes.gather(1, beam).flatten(), token.flatten()).view_as(token)
    return grown, nodes, beam


def _by_generate(model: nn.Module, input_ids: Tensor, levels: int, num_beams: int, trie: SIDTrie | None) -> Beams:
    """The same by `generate`, in which no token ends a sequence before all levels are there."""
    from ...huggingface.constrained import SIDLogitsProcessor, generation_arguments

    prompt = 1 if is_encoder_decoder(model) else input_ids.shape[1]
    reuse = num_beams > 1  # greedy search keeps the scores as they are returned
    processors = [] if trie is None else [SIDLogitsProcessor(trie, prompt, trie.text_token, reuse_scores=reuse)]
    search = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        **generation_arguments(
            model,
            num_beams=num_beams,
            num_return_sequences=num_beams,
            max_new_tokens=levels,
            length_penalty=0.0,
            eos_token_id=None,
            output_scores=True,
            output_logits=num_beams == 1,
            return_dict_in_generate=True,
        ),
        logits_processor=processors,
    )
    if num_beams == 1:  # greedy: no scores of sequences
        logp = torch.stack(search.logits, 1).float().log_softmax(-1)  # [B, L, V]
        tokens = search.sequences[:, prompt:]
        scores = logp.gather(2, tokens[..., None]).squeeze(2).sum(1, keepdim=True)
        return Beams(tokens[:, None], scores)
    scores = search.sequences_scores.view(len(input_ids), num_beams).float()
    scores = scores.masked_fill(scores < -1e8, -torch.inf)  # what transformers fills missing beams with
    return Beams(search.sequences[:, prompt:].reshape(len(input_ids), num_beams, levels), scores)
