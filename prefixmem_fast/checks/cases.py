"""Random configurations with their inputs: specs of every kind, damaged SIDs, token streams, tables of every dtype."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from .._choices import MODES
from .._dtypes import CODE_DTYPES, TABLE_DTYPES
from ..addressing import AddressSpec


@dataclass(frozen=True)
class Case:
    """One random configuration with its inputs."""

    spec: AddressSpec
    codes: Tensor  # [M, L]
    input_ids: Tensor  # [B, T]
    token_table: Tensor  # [V, 2]
    segment_ids: Tensor | None
    weight: Tensor  # [R, w]

    def __str__(self) -> str:
        s = self.spec
        return (
            f"AddressSpec({s.codebook_sizes}, {s.max_order}, {s.heads}, {s.table_rows}, {s.mode!r}, "
            f"{s.addressing!r}, {s.active_levels}, seed={s.seed}), width {self.weight.shape[1]}, "
            f"{self.weight.dtype}, codes {self.codes.dtype} {tuple(self.codes.shape)}, "
            f"input_ids {tuple(self.input_ids.shape)}{', packed' if self.segment_ids is not None else ''}"
        )


def random_spec(rng: random.Random) -> AddressSpec:
    """Small sizes of every kind: one level to six, one-row tables, mixed codebooks, exact and hashed orders."""
    levels, orders = rng.randint(1, 6), rng.randint(1, 5)
    largest = rng.choice((2, 5, 12, 300, 70_000, 3_000_000_000))
    sizes = [rng.randint(1, largest) for _ in range(levels)]
    rows = rng.choice((1, 7, 64, 500))
    return AddressSpec(
        codebook_sizes=sizes,
        max_order=orders,
        heads=rng.randint(1, 5),
        table_rows=rng.choice((rows, [rng.randint(1, rows) for _ in range(orders)])),
        mode=rng.choice(MODES),
        addressing=rng.choice(("auto", "hash")),
        active_levels=sorted(rng.sample(range(1, levels + 1), rng.randint(1, levels))),
        seed=rng.randrange(1 << 32),
    )


def random_codes(rng: random.Random, spec: AddressSpec, sids: int, invalid: float) -> list[list[int]]:
    """SIDs with duplicates and shared prefixes; a share `invalid` of them is cut or damaged."""
    pool = [[rng.randrange(size) for size in spec.codebook_sizes] for _ in range(max(sids // 3, 1))]
    result = []
    for _ in range(sids):
        sid, other, keep = rng.choice(pool), rng.choice(pool), rng.randint(0, spec.levels)
        sid = sid[:keep] + other[keep:]
        if rng.random() < invalid:
            cut = rng.randrange(spec.levels)
            sid = [*sid[:cut], rng.choice((-1, -(1 << 14), spec.codebook_sizes[cut])), *sid[cut + 1 :]]
        result.append(sid)
    return result


def random_tokens(rng: random.Random, spec: AddressSpec, shape: tuple[int, int]) -> tuple[list[list[int]], list]:
    """Rows of whole SIDs, cut SIDs, text and noise, over a shuffled vocabulary: input ids and the token table."""
    entries = [(0, 0), (0, 0), (0, 0)]
    by_level: list[list[int]] = []
    for level, size in enumerate(spec.codebook_sizes, 1):
        codes = rng.sample(range(min(size, 1 << 30)), min(3, size))
        by_level.append(list(range(len(entries), len(entries) + len(codes))))
        entries += [(level, code) for code in codes]
    shuffled = list(range(len(entries)))
    rng.shuffle(shuffled)
    table = [[0, 0] for _ in entries]
    for place, entry in zip(shuffled, entries, strict=True):
        table[place] = list(entry)

    rows = []
    for _ in range(shape[0]):
        row: list[int] = []
        while len(row) < shape[1]:
            kind = rng.random()
            if kind < 0.6:
                row += [shuffled[rng.choice(ids)] for ids in by_level]
            elif kind < 0.8:
                row += [shuffled[rng.choice(ids)] for ids in by_level[: rng.randint(1, spec.levels)]]
            else:
                row.append(rng.choice((rng.randrange(len(entries)), -100, len(entries) + 5)))
        cut = rng.randint(0, len(row) - shape[1])
        rows.append(row[cut : cut + shape[1]])
    return rows, table


def random_case(rng: random.Random, device: str) -> Case:
    spec = random_spec(rng)
    codes = torch.tensor(
        random_codes(rng, spec, rng.choice((0, 1, 5, 33, 70)), rng.choice((0.0, 0.3))), dtype=torch.int64
    ).reshape(-1, spec.levels)
    widest = codes.abs().max().item() if codes.numel() else 0
    allowed = [d for d in CODE_DTYPES if widest <= torch.iinfo(d).max]
    shape = rng.choice(((0, 4), (1, 1), (2, 37), (3, 20)))
    ids, table = random_tokens(rng, spec, shape)
    segments = torch.tensor(
        [sorted(rng.randrange(3) for _ in range(shape[1])) for _ in range(shape[0])], dtype=torch.int64
    ).reshape(shape)
    generator = torch.Generator().manual_seed(rng.randrange(1 << 32))
    width = rng.choice((1, 3, 8, 20, 64))
    weight = torch.randn(spec.total_rows, width, generator=generator, dtype=torch.float64)
    return Case(
        spec,
        codes.to(device, rng.choice(allowed)),
        torch.tensor(ids, dtype=rng.choice((torch.int32, torch.int64))).reshape(shape).to(device),
        torch.tensor(table, dtype=torch.int32, device=device),
        segments.to(device) if rng.random() < 0.5 else None,
        weight.to(device, rng.choice(TABLE_DTYPES)),
    )
