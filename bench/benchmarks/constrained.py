"""A step of trie-constrained beam search: SIDLogitsProcessor beside prefix_allowed_tokens_fn of transformers.

A step masks the scores of the beams of all sequences over 12,000 items; one turn takes each depth in turn. The Python
functions are the two met in the field: a dict of prefixes, and a trie of nested dicts (LC-Rec and its kin), both called
by transformers' PrefixConstrainedLogitsProcessor for every beam.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prefixmem_fast import Catalogue, SIDTrie, SIDVocabulary

from ..registry import Case, Contender, Mark, benchmark

LEVELS, CODES, PROMPT, EOS = 4, 256, 40, 2
FIRST_ID = 100

Allowed = Callable[[int, Tensor], list[int]]


def workloads(device: str) -> list[dict[str, Any]]:
    shape = {"items": 12_000, "sequences": 64, "beams": 20}
    return [{"vocabulary": vocabulary, **shape} for vocabulary in (32_128, 2_048, 151_936)]


def catalogue(items: int) -> Catalogue:
    """Distinct random SIDs, level 1 and 2 with Zipf popularity, so that the trie branches as real ones do."""
    generator = torch.Generator().manual_seed(0)
    chance = torch.arange(1, CODES + 1, dtype=torch.float64) ** -1.0
    draws = [torch.multinomial(chance, 4 * items, replacement=True, generator=generator) for _ in range(2)]
    draws += [torch.randint(0, CODES, (4 * items,), generator=generator) for _ in range(LEVELS - 2)]
    codes = torch.stack(draws, 1).unique(dim=0)
    codes = codes[torch.randperm(len(codes), generator=generator)[:items]]
    return Catalogue(map(str, range(len(codes))), codes, (CODES,) * LEVELS)


def dict_of_prefixes(tokens: list[list[int]]) -> Allowed:
    children: dict[tuple[int, ...], dict[int, None]] = {}
    for row in tokens:
        for depth, token in enumerate(row):
            children.setdefault(tuple(row[:depth]), {})[token] = None
    allowed = {prefix: list(tokens) for prefix, tokens in children.items()}
    return lambda batch, sentence: allowed.get(tuple(sentence.tolist()[PROMPT:]), [EOS])


def nested_dicts(tokens: list[list[int]]) -> Allowed:
    root: dict = {}
    for row in tokens:
        node = root
        for token in row:
            node = node.setdefault(token, {})

    def allowed(batch: int, sentence: Tensor) -> list[int]:
        node = root
        for token in sentence.tolist()[PROMPT:]:
            node = node.get(token, {})
        return list(node) or [EOS]

    return allowed


@benchmark(workloads, {"vocabulary": 2_048, "items": 500, "sequences": 4, "beams": 4})
def constrained(device: str, vocabulary: int, items: int, sequences: int, beams: int) -> Case:
    """A step of beam search over the items of a catalogue: the mask of the scores."""
    from transformers import PrefixConstrainedLogitsProcessor

    from prefixmem_fast import SIDLogitsProcessor

    known = catalogue(items)
    ids = {FIRST_ID + l * CODES + code: (l + 1, code) for l in range(LEVELS) for code in range(CODES)}
    codes = SIDVocabulary.from_table(ids, (CODES,) * LEVELS)
    tokens = codes.encode(known.codes)
    count = sequences * beams
    chosen = tokens[torch.randint(0, len(tokens), (count,), generator=torch.Generator().manual_seed(1))]
    prompts = torch.full((count, PROMPT), 5)
    steps = [torch.cat([prompts, chosen[:, :depth]], 1).to(device) for depth in range(LEVELS)]
    scores = torch.randn(count, vocabulary, device=device).log_softmax(-1)
    allowed = dict_of_prefixes(tokens.tolist())
    expected = [_mask(allowed, prefix.cpu(), vocabulary) for prefix in steps]

    @torch.no_grad()
    def step(processor: Any, turn: int, mark: Mark) -> None:
        for prefix in steps:
            processor(prefix, scores)
        mark("step")

    @torch.no_grad()
    def check(processor: Any) -> str | None:
        masks = [processor(prefix, scores).isfinite().cpu() for prefix in steps]
        same = all(torch.equal(mask, right) for mask, right in zip(masks, expected, strict=True))
        return None if same else "its allowed set differs"

    def python(make: Callable[[list[list[int]]], Allowed]) -> Any:
        return PrefixConstrainedLogitsProcessor(make(tokens.tolist()), beams)

    processors = {
        "prefixmem_fast, SIDLogitsProcessor": lambda: SIDLogitsProcessor(
            SIDTrie(known, codes), PROMPT, EOS, reuse_scores=True
        ),
        "prefix_allowed_tokens_fn, dict of prefixes": partial(python, dict_of_prefixes),
        "prefix_allowed_tokens_fn, nested dicts": partial(python, nested_dicts),
    }
    return Case([Contender(name, make) for name, make in processors.items()], step, check, steps=LEVELS)


def _mask(allowed: Allowed, prefixes: Tensor, vocabulary: int) -> Tensor:
    mask = torch.zeros(len(prefixes), vocabulary, dtype=torch.bool)
    for i, prefix in enumerate(prefixes):
        mask[i, allowed(0, prefix)] = True
    return mask
