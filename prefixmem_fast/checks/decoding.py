"""`DecodingState` of every backend against the sums over the whole sequence."""

from __future__ import annotations

import random

import torch

from ..addressing import TokenStream
from ..encoder import DecodingState, PrefixMem, PrefixMemConfig
from ..operation import reference
from ..sid import SIDVocabulary
from .cases import Case
from .report import Report, exact_sums


def vocabulary_of(case: Case) -> SIDVocabulary | None:
    """Of the case's token table; None where no vocabulary has such codes."""
    if max(case.spec.codebook_sizes) > 1 << 31:
        return None
    entries = {i: tuple(entry) for i, entry in enumerate(case.token_table.tolist()) if entry[0]}
    return SIDVocabulary.from_table(entries, case.spec.codebook_sizes)


def check_decoding(report: Report, case: Case, backends: tuple[str, ...], rng: random.Random) -> None:
    """A prompt, then tokens one by one while beams move; W_out is the identity, so m is S."""
    vocabulary = vocabulary_of(case)
    if vocabulary is None or not case.input_ids.numel():
        return
    stream = TokenStream(case.input_ids, case.token_table, None)
    exact, bound = exact_sums(lambda weight: reference.forward(stream, weight, case.spec), case.weight)
    exact, bound = (t.view(*case.input_ids.shape, -1) for t in (exact, bound))
    batch, length = case.input_ids.shape
    prompt = rng.choice((0, rng.randrange(length + 1)))
    moves = [torch.tensor([rng.randrange(batch) for _ in range(batch)]) for _ in range(prompt, length)]
    width = case.spec.heads * case.weight.shape[1]
    for backend in ("reference", *backends):
        config = PrefixMemConfig(case.spec, width, width)
        encoder = PrefixMem(config, backend=backend, device=case.weight.device, dtype=case.weight.dtype)
        with torch.no_grad():
            encoder.memory.weight.copy_(case.weight)
            torch.nn.init.eye_(encoder.out_proj.weight)
        state = DecodingState(encoder, vocabulary, batch)
        state.prefill(case.input_ids.flip(0)[:, : rng.randrange(length + 1)])  # the next prompt begins afresh
        found = state.prefill(case.input_ids[:, :prompt])
        report.within(f"{backend} prefill", case, found, exact[:, :prompt], bound[:, :prompt])
        order = torch.arange(batch, device=case.input_ids.device)
        for t, move in enumerate(moves, start=prompt):
            found = state.step(case.input_ids[order, t])
            report.within(f"{backend} decoding step", case, found, exact[order, t], bound[order, t])
            state.reorder(move.to(order.device))
            order = order[move.to(order.device)]
