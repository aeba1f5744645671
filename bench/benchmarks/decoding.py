"""Decoding: one token a sequence at a time, as an engine with a KV cache feeds them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prefixmem_fast import AddressSpec, DecodingState, PrefixMem, PrefixMemConfig

from ..registry import Case, Contender, Mark, benchmark
from .providers import EagerTables, FusedTable, Ours, Provider
from .tables import differs
from .workloads import BATCHES, HEADS, WIDTH, Floor, Workload, vocabulary_of

HIDDEN = 1024


def workloads(device: str) -> list[dict[str, Any]]:
    table = {"table_rows": 200_000, "dtype": "float32"}
    if device == "cuda":
        table = {"table_rows": 2_000_000, "dtype": "bfloat16"}
    return [{"sequences": sequences, **table} for sequences in (64, 1, 16, 256)]


class Recomputed:
    """What a user writes: the codes of the SID so far are kept, and a step at an active level reads its prefix anew."""

    def __init__(self, provider: type[Provider], encoder: PrefixMem, sequences: int) -> None:
        spec, weight = encoder.config.spec, encoder.memory.weight.detach()
        self.encoder = encoder
        self.providers = {level: provider(_only(spec, level), weight) for level in spec.active_levels}
        self.codes = torch.zeros(sequences, spec.levels, dtype=torch.int64, device=weight.device)

    def step(self, level: int, codes: Tensor) -> Tensor:
        self.codes[:, level - 1] = codes
        if level not in self.providers:
            return self.encoder.out_proj.weight.new_zeros(len(codes), HIDDEN)
        S = self.providers[level].forward(self.codes)[:, 0]
        return self.encoder.out_proj(S.to(self.encoder.out_proj.weight.dtype))


def _only(spec: AddressSpec, level: int) -> AddressSpec:
    """The same rows, read at one level."""
    return AddressSpec.from_dict({**spec.to_dict(), "active_levels": [level]})


class Stepped:
    """The library's."""

    def __init__(self, encoder: PrefixMem, sequences: int) -> None:
        self.vocabulary = vocabulary_of(encoder.config.spec)
        self.state = DecodingState(encoder, self.vocabulary, sequences)
        zeros = torch.zeros(1, encoder.config.spec.levels, dtype=torch.int64)
        self.first = self.vocabulary.encode(zeros)[0].tolist()  # the token of code 0, by level

    def step(self, level: int, codes: Tensor) -> Tensor:
        return self.state.step(codes + self.first[level - 1])


class Encoded(Stepped):
    """The last tokens of each sequence encoded, and one kept: what needs no operation over windows."""

    def step(self, level: int, codes: Tensor) -> Tensor:
        tokens = self.state.tokens
        tokens.copy_(torch.cat([tokens[:, 1:], (codes + self.first[level - 1])[:, None]], 1))
        return self.state.encoder.encode_tokens(tokens, self.vocabulary, new_tokens=1)[:, 0]


class Graphed:
    """The steps of a whole SID captured in CUDA graphs, one a level, and replayed on other codes."""

    @torch.no_grad()
    def __init__(self, stepper: Recomputed | Stepped, levels: int, codes: Tensor) -> None:
        self.codes = codes.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles
            for level in range(1, levels + 1):
                stepper.step(level, self.codes)
        torch.cuda.current_stream().wait_stream(side)
        self.graphs = []
        for level in range(1, levels + 1):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                m = stepper.step(level, self.codes)
            self.graphs.append((graph, m))

    def step(self, level: int, codes: Tensor) -> Tensor:
        self.codes.copy_(codes)
        graph, m = self.graphs[level - 1]
        graph.replay()
        return m


@benchmark(workloads, {"sequences": 3, "table_rows": 500, "dtype": "float32"})
@torch.no_grad()
def decoding(device: str, sequences: int, table_rows: int, dtype: str) -> Case:
    """One decoding step: the memory and its projection for one new token a sequence, over the levels of a SID."""
    workload = Workload(sids=sequences, table_rows=table_rows, dtype=dtype)
    spec, batches = workload.spec, workload.batches(device)
    config = PrefixMemConfig(spec, HEADS * WIDTH, HIDDEN, output_init_std=0.02)
    encoder = PrefixMem(config, device="meta", dtype=workload.torch_dtype)
    encoder.memory.weight = torch.nn.Parameter(workload.weight(device))
    generator = torch.Generator(device).manual_seed(2)
    projection = torch.randn(HIDDEN, HEADS * WIDTH, device=device, generator=generator) * 0.02
    encoder.out_proj.weight = torch.nn.Parameter(projection.to(workload.torch_dtype))
    expected = encoder(batches[0])  # [B, L, hidden]

    @torch.no_grad()
    def step(stepper: Any, turn: int, mark: Mark) -> None:
        codes = batches[turn % BATCHES]
        for level in range(1, spec.levels + 1):
            stepper.step(level, codes[:, level - 1])
        mark("step")

    @torch.no_grad()
    def check(stepper: Any) -> str | None:
        steps = [stepper.step(level, batches[0][:, level - 1]).clone() for level in range(1, spec.levels + 1)]
        return differs(torch.stack(steps, 1), expected)

    plain: dict[str, Callable[[], Any]] = {
        f"{Ours.reads}, DecodingState": partial(Stepped, encoder, sequences),
        f"{Ours.reads}, the last L tokens encoded": partial(Encoded, encoder, sequences),
        "eager PyTorch, the prefix read anew": partial(Recomputed, EagerTables, encoder, sequences),
        "plain PyTorch, one fused table, the prefix read anew": partial(Recomputed, FusedTable, encoder, sequences),
    }
    contenders = []
    for name, make in plain.items():
        contenders.append(Contender(name, make))
        graphed = (lambda make=make: Graphed(make(), spec.levels, batches[0][:, 0])) if device == "cuda" else None
        contenders.append(Contender(f"{name}, CUDA graph", graphed, "needs a GPU"))
    # A step at an active level reads the last tokens with their level and code, their rows and W_out, and writes m.
    itemsize = workload.torch_dtype.itemsize
    rows = sum(min(level, spec.max_order) for level in spec.active_levels) * HEADS * WIDTH * itemsize * sequences
    projected = len(spec.active_levels) * (HEADS * WIDTH * HIDDEN + sequences * HIDDEN) * itemsize
    floor = sum(range(1, spec.levels + 1)) * sequences * 16 + rows + projected
    floors = {"step": Floor(floor / spec.levels, floor / spec.levels)}
    return Case(contenders, step, check, floors=floors, steps=spec.levels)
