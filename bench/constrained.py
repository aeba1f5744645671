"""One step of trie-constrained beam search: SIDLogitsProcessor beside prefix_allowed_tokens_fn of transformers.

    python -m bench.constrained [--quick] [--out FILE]

A step masks the scores of 64 sequences x 20 beams over 12,000 items, at each of four depths in turn. The Python
functions are the two met in the field: a dict of prefixes, and a trie of nested dicts (LC-Rec and its kin), both called
by transformers' PrefixConstrainedLogitsProcessor for every beam. One whose allowed set differs from the others' is
reported as wrong and gets no time. Rows are appended to FILE as JSON Lines.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PrefixConstrainedLogitsProcessor

from bench.measure import append_rows, now, provenance, quantiles
from prefixmem_fast import Catalogue, SIDLogitsProcessor, SIDTrie, SIDVocabulary

LEVELS, CODES, PROMPT, EOS = 4, 256, 40, 2
FIRST_ID = 100


def catalogue(items: int) -> Catalogue:
    """Distinct random SIDs, level 1 and 2 with Zipf popularity, so that the trie branches as real ones do."""
    generator = torch.Generator().manual_seed(0)
    chance = torch.arange(1, CODES + 1, dtype=torch.float64) ** -1.0
    draws = [torch.multinomial(chance, 4 * items, replacement=True, generator=generator) for _ in range(2)]
    draws += [torch.randint(0, CODES, (4 * items,), generator=generator) for _ in range(LEVELS - 2)]
    codes = torch.stack(draws, 1).unique(dim=0)
    codes = codes[torch.randperm(len(codes), generator=generator)[:items]]
    return Catalogue(map(str, range(len(codes))), codes, (CODES,) * LEVELS)


def dict_of_prefixes(tokens: list[list[int]]) -> Callable[[int, Tensor], list[int]]:
    children: dict[tuple[int, ...], dict[int, None]] = {}
    for row in tokens:
        for depth, token in enumerate(row):
            children.setdefault(tuple(row[:depth]), {})[token] = None
    allowed = {prefix: list(tokens) for prefix, tokens in children.items()}
    return lambda batch, sentence: allowed.get(tuple(sentence.tolist()[PROMPT:]), [EOS])


def nested_dicts(tokens: list[list[int]]) -> Callable[[int, Tensor], list[int]]:
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


def run(items: int, beams: int, sequences: int, vocabulary_size: int, repeats: int, device: str) -> list[dict]:
    known = catalogue(items)
    ids = {FIRST_ID + l * CODES + code: (l + 1, code) for l in range(LEVELS) for code in range(CODES)}
    vocabulary = SIDVocabulary.from_table(ids, (CODES,) * LEVELS)
    trie = SIDTrie(known, vocabulary)
    tokens = vocabulary.encode(known.codes)
    count = sequences * beams
    providers = {
        "SIDLogitsProcessor": SIDLogitsProcessor(trie, PROMPT, EOS),
        "prefix_allowed_tokens_fn, dict of prefixes": PrefixConstrainedLogitsProcessor(
            dict_of_prefixes(tokens.tolist()), beams
        ),
        "prefix_allowed_tokens_fn, nested dicts": PrefixConstrainedLogitsProcessor(
            nested_dicts(tokens.tolist()), beams
        ),
    }
    chosen = tokens[torch.randint(0, len(tokens), (count,), generator=torch.Generator().manual_seed(1))]
    prompts = torch.full((count, PROMPT), 5)
    steps = [torch.cat([prompts, chosen[:, :depth]], 1).to(device) for depth in range(LEVELS)]
    scores = torch.randn(count, vocabulary_size, device=device).log_softmax(-1)

    expected = [providers["SIDLogitsProcessor"](step, scores).isfinite() for step in steps]
    times: dict[str, list[float]] = {}
    for name, provider in providers.items():
        same = all(torch.equal(provider(s, scores).isfinite(), e) for s, e in zip(steps, expected, strict=True))
        if same:
            times[name] = []
    for _ in tqdm(range(repeats), desc=f"{vocabulary_size:,} tokens", leave=False, disable=None):
        for name, seconds in times.items():
            start = now(device)
            for step in steps:
                providers[name](step, scores)
            seconds.append((now(device) - start) / len(steps))
    workload = {
        "items": len(known), "prefixes": list(trie.prefixes), "sequences": sequences, "beams": beams,
        "vocabulary_size": vocabulary_size, "device": device,
    }  # fmt: skip
    wrong = {"skipped": "WRONG: its allowed set differs; not timed"}
    return [
        {"benchmark": "constrained step", "provider": name, **workload,
         **(quantiles(times[name]) if name in times else wrong)}
        for name in providers
    ]  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small workload, to see that all of it runs")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each provider (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="append the rows to this file, as JSON Lines")
    options = parser.parse_args()
    if options.repeats < 2:
        parser.error(f"--repeats = {options.repeats}; give 2 or more")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    items, beams, sequences = (500, 4, 4) if options.quick else (12_000, 20, 64)
    found = provenance()
    print(f"{items:,} items, {beams} beams, {sequences} sequences; milliseconds a step")
    for vocabulary_size in (2_048,) if options.quick else (2_048, 32_128, 151_936):
        rows = run(items, beams, sequences, vocabulary_size, options.repeats, device)
        for row in rows:
            print(
                f"{vocabulary_size:>9,} tokens  {row['provider']:<46}" + row.get("skipped", f"{row.get('ms', 0):9.2f}")
            )
        if options.out:
            append_rows(options.out, rows, found)


if __name__ == "__main__":
    main()
