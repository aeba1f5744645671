"""Constrained search against lists of prefixes: which tokens may follow, and which items a search finds."""

from __future__ import annotations

import random

import torch

from .._environment import installed_version
from ..sid import Catalogue, SIDTrie, SIDVocabulary
from .cases import Case
from .report import Report

_ITEMS, _ROWS, _TEXT, _EOS = 20, 12, 3, 0


def check_trie(report: Report, case: Case, rng: random.Random) -> None:
    """The scores that the processor leaves, over prompts and tokens that end anywhere."""
    sizes = case.spec.codebook_sizes
    if max(sizes) > 1 << 31 or installed_version("transformers") is None:
        return
    from ..huggingface.constrained import SIDLogitsProcessor

    codes = [[rng.randrange(min(size, 4)) for size in sizes] for _ in range(rng.randint(1, _ITEMS))]
    trie, tokens_of = _trie(codes, sizes, rng)
    sids = [[tokens_of[entry] for entry in enumerate(row, 1)] for row in codes]
    width = trie.largest_token + 2
    prompts, generated = [], []
    for _ in range(_ROWS):
        sid, other = rng.choice(sids), rng.choice(sids)
        text = [rng.randrange(width) for _ in range(len(sizes))]
        prompts.append([*text, *rng.choice((sid, other, text))[: rng.randint(0, len(sizes))]])
        generated.append(rng.choice((sid, other[:1] + text, text)))
    length, new = min(map(len, prompts)), rng.randint(0, len(sizes))
    ids = torch.tensor([[*p[len(p) - length :], *g[:new]] for p, g in zip(prompts, generated, strict=True)])
    scores = torch.rand(len(ids), width) - 0.5
    found = SIDLogitsProcessor(trie, length, _EOS)(ids, scores)
    expected = torch.full_like(scores, -torch.inf)
    for row, allowed in enumerate(_allowed(ids[row].tolist(), length, sids) for row in range(len(ids))):
        for token in allowed:
            expected[row, token] = scores[row, token]
        if not allowed:
            expected[row, _EOS] = 0.0
    report.equal("tokens that the items allow", case, found, expected)


def check_search(report: Report, case: Case, rng: random.Random) -> None:
    """Beams as many as there are Semantic IDs, in a small model of random weights, against the score of each."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from ..huggingface.constrained import generate_items

    sizes = (3, 4, 5)
    codes = [[rng.randrange(size) for size in sizes] for _ in range(_ITEMS)]
    trie, tokens_of = _trie(codes, sizes, rng)
    width = trie.largest_token + 2
    state = torch.random.get_rng_state()
    torch.manual_seed(rng.randrange(1 << 32))
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32, "initializer_range": 0.5}
    special = {"bos_token_id": _EOS, "eos_token_id": _EOS, "pad_token_id": _EOS}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=width, **special, **shape)).eval()
    torch.random.set_rng_state(state)
    prompts = torch.tensor([[rng.randrange(1, width) for _ in range(4)] + [1] for _ in range(2)])
    distinct = sorted({tuple(row) for row in codes})
    found = generate_items(
        model, trie, {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}, num_beams=max(len(distinct), 2)
    )
    sids = torch.tensor([[tokens_of[entry] for entry in enumerate(row, 1)] for row in distinct])
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            whole = torch.cat([prompt.expand(len(sids), -1), sids], 1)
            logits = model(whole).logits[:, len(prompt) - 1 : -1].double().log_softmax(-1)
        scores = logits.gather(2, sids[..., None]).squeeze(2).sum(1)
        order = scores.argsort(descending=True)
        best = found.sids[row][: len(distinct)]
        report.equal("Semantic IDs of a search", case, best, torch.tensor(distinct)[order])
        # A score is a sum of three logarithms in float32, of at most some tens each.
        result, exact = found.scores[row][: len(distinct)].double(), scores[order]
        report.between("scores of a search", case, result, exact - 1e-4, exact + 1e-4)
        names = [tuple(f"item {i}" for i, code in enumerate(codes) if tuple(code) == distinct[k]) for k in order]
        if found.items[row][: len(distinct)] != names:
            report.mismatches.append(f"items of a search: {found.items[row]} in place of {names}")


def _trie(codes: list[list[int]], sizes: tuple[int, ...], rng: random.Random) -> tuple[SIDTrie, dict]:
    """A trie of items with these codes, and the token of each (level, code); tokens 0 to 2 are text."""
    entries = sorted({entry for row in codes for entry in enumerate(row, 1)})
    rng.shuffle(entries)
    tokens_of = {entry: token for token, entry in enumerate(entries, start=_TEXT)}
    vocabulary = SIDVocabulary.from_table({token: entry for entry, token in tokens_of.items()}, sizes)
    items = [f"item {i}" for i in range(len(codes))]
    return SIDTrie(Catalogue(items, torch.tensor(codes), sizes), vocabulary), tokens_of


def _allowed(ids: list[int], prompt: int, sids: list[list[int]]) -> set[int]:
    """The tokens that may follow: those that go on with a prefix of an item, which the prompt may have begun."""
    levels = len(sids[0])
    prefixes = {tuple(sid[:k]) for sid in sids for k in range(1, levels + 1)}
    begun = next((k for k in range(min(levels - 1, prompt), 0, -1) if tuple(ids[prompt - k : prompt]) in prefixes), 0)
    prefix = tuple(ids[prompt - begun : prompt])
    for token in ids[prompt:]:
        if len(prefix) == levels:
            return set()
        prefix = (*prefix, token)
        if prefix not in prefixes:
            return set()
    return {sid[len(prefix)] for sid in sids if tuple(sid[: len(prefix)]) == prefix and len(prefix) < levels}
