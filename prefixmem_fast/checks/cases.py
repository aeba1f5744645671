"""Configurations with their inputs: random ones of every kind, and fixed shapes with batches as training has them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .._choices import MODES
from .._dtypes import CODE_DTYPES, TABLE_DTYPES
from ..addressing import AddressSpec


@dataclass(frozen=True)
class Case:
    """One configuration with its inputs."""

    spec: AddressSpec
    codes: Tensor  # [M, L]
    input_ids: Tensor  # [B, T]
    token_table: Tensor  # [V, 2]
    segment_ids: Tensor | None
    weight: Tensor  # [R, w]
    batch: str = ""  # what its SIDs are, in words

    def __str__(self) -> str:
        s = self.spec
        return (
            f"AddressSpec({s.codebook_sizes}, {s.max_order}, {s.heads}, {s.table_rows}, {s.mode!r}, "
            f"{s.addressing!r}, {s.active_levels}, seed={s.seed}, history={s.history}), width {self.weight.shape[1]}, "
            f"{self.weight.dtype}, codes {self.codes.dtype} {tuple(self.codes.shape)}, "
            f"input_ids {tuple(self.input_ids.shape)}{', packed' if self.segment_ids is not None else ''}"
            f"{', ' * bool(self.batch)}{self.batch}"
        )


def random_spec(rng: random.Random) -> AddressSpec:
    """Small sizes of every kind: one level to six, one-row tables, mixed codebooks, exact, hashed and cross-item
    orders."""
    levels, orders = rng.randint(1, 6), rng.randint(1, 5)
    largest = rng.choice((2, 5, 12, 300, 70_000, 3_000_000_000))
    sizes = [rng.randint(1, largest) for _ in range(levels)]
    rows = rng.choice((1, 7, 64, 500))
    if rng.random() < 0.25:
        sizes = sizes[:4]
        levels = len(sizes)
        return AddressSpec(
            codebook_sizes=sizes,
            max_order=rng.choice((2 * levels - 1, levels, 2 * levels + 1)),
            heads=rng.randint(1, 3),
            table_rows=rows,
            mode="full",
            addressing=rng.choice(("auto", "hash")),
            active_levels=sorted(rng.sample(range(levels, 2 * levels), rng.randint(1, levels))),
            seed=rng.randrange(1 << 32),
            history=rng.choice((1, 1, 2, 3)),
        )
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
    sizes = spec.window_sizes
    pool = [[rng.randrange(size) for size in sizes] for _ in range(max(sids // 3, 1))]
    result = []
    for _ in range(sids):
        sid, other, keep = rng.choice(pool), rng.choice(pool), rng.randint(0, spec.levels)
        sid = sid[:keep] + other[keep:]
        if rng.random() < invalid:
            cut = rng.randrange(spec.levels)
            sid = [*sid[:cut], rng.choice((-1, -(1 << 14), sizes[cut])), *sid[cut + 1 :]]
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
            if kind < (0.85 if spec.history else 0.6):
                row += [shuffled[rng.choice(ids)] for ids in by_level]
            elif kind < (0.95 if spec.history else 0.8):
                row += [shuffled[rng.choice(ids)] for ids in by_level[: rng.randint(1, spec.item_levels)]]
            else:
                row.append(rng.choice((rng.randrange(len(entries)), -100, len(entries) + 5)))
        cut = rng.randint(0, len(row) - shape[1])
        rows.append(row[cut : cut + shape[1]])
    return rows, table


def random_case(rng: random.Random, device: str) -> Case:
    spec = random_spec(rng)
    codes = _some_codes(rng, spec)
    widest = codes.abs().max().item() if codes.numel() else 0
    allowed = [d for d in CODE_DTYPES if widest <= torch.iinfo(d).max]
    ids, table, segments = _some_tokens(rng, spec)
    generator = torch.Generator().manual_seed(rng.randrange(1 << 32))
    width = rng.choice((1, 3, 8, 20, 64))
    weight = torch.randn(spec.total_rows, width, generator=generator, dtype=torch.float64)
    return Case(
        spec,
        codes.to(device, rng.choice(allowed)),
        ids.to(device, rng.choice((torch.int32, torch.int64))),
        table.to(device),
        segments.to(device) if rng.random() < 0.5 else None,
        weight.to(device, rng.choice(TABLE_DTYPES)),
    )


def another_batch(rng: random.Random, case: Case) -> Case:
    """Other SIDs and tokens of the same configuration and dtypes: kernels that are compiled run again."""
    codes = _some_codes(rng, case.spec)
    codes[codes > torch.iinfo(case.codes.dtype).max] = -1
    ids, table, segments = _some_tokens(rng, case.spec)
    return replace(
        case,
        codes=codes.to(case.codes),
        input_ids=ids.to(case.input_ids),
        token_table=table.to(case.token_table),
        segment_ids=None if case.segment_ids is None else segments.to(case.segment_ids),
    )


def _some_codes(rng: random.Random, spec: AddressSpec) -> Tensor:
    sids = random_codes(rng, spec, rng.choice((0, 1, 5, 33, 70)), rng.choice((0.0, 0.3)))
    return torch.tensor(sids, dtype=torch.int64).reshape(-1, spec.levels)


def _some_tokens(rng: random.Random, spec: AddressSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Input ids, token table and segments."""
    shape = rng.choice(((0, 4), (1, 1), (2, 37), (3, 20)))
    ids, table = random_tokens(rng, spec, shape)
    segments = [sorted(rng.randrange(3) for _ in range(shape[1])) for _ in range(shape[0])]
    ids, segments = (torch.tensor(rows, dtype=torch.int64).reshape(shape) for rows in (ids, segments))
    return ids, torch.tensor(table, dtype=torch.int32), segments


class Shape(NamedTuple):
    """What is compiled once and then run over many batches; tables hold `rows` of each order and head."""

    sizes: tuple[int, ...]
    mode: str = "prefix"
    dtype: torch.dtype = torch.bfloat16
    codes: torch.dtype = torch.int64
    orders: int = 4
    heads: int = 4
    width: int = 64
    active: tuple[int, ...] = (3, 4)
    addressing: str = "hash"
    packed: bool = False
    history: int = 0

    def spec(self, rows: int) -> AddressSpec:
        if self.history:
            return AddressSpec.cross_item(self.sizes, history=self.history, heads=self.heads, table_rows=rows)
        return AddressSpec(
            self.sizes,
            self.orders,
            self.heads,
            rows,
            mode=self.mode,
            addressing=self.addressing,
            active_levels=self.active,
        )


_PAPER = (2048,) * 5
SHAPES = {
    "paper": Shape(_PAPER),
    "float32": Shape(_PAPER, dtype=torch.float32, codes=torch.int32, addressing="auto", packed=True),
    "suffix": Shape(_PAPER, "suffix", codes=torch.int16),
    "full": Shape(_PAPER, "full", packed=True),
    # Products of codes and primes take 63 bits.
    "wide": Shape((3_000_000_000, 70_000, 3_000_000_000), dtype=torch.float32, heads=2, orders=3, active=(1, 2, 3)),
    "odd": Shape(
        (300, 7, 5000, 31),
        dtype=torch.float16,
        codes=torch.int32,
        orders=3,
        heads=3,
        width=20,
        active=(1, 3, 4),
        packed=True,
    ),
    "cross-item": Shape(_PAPER, "full", packed=True, history=1),
    "float64": Shape(_PAPER, dtype=torch.float64, codes=torch.int16, orders=5, heads=2, width=33, active=(2, 5)),
}
KINDS = ("uniform", "zipf 1.05", "duplicates", "hot prefix", "ended", "invalid")
BATCH_SIZES = (1, 2, 31, 1000, 16_384, 65_536)
_MOST_IN_STREAM = 16_384  # the reference keeps every level of every token


def grid_of(name: str, seed: int, largest: int) -> list[tuple[int, str]]:
    """Sizes and kinds of a shape's batches: a middle one first, the others shuffled."""
    first = (min(1000, largest), "uniform")
    grid = [pair for pair in itertools.product(BATCH_SIZES, KINDS) if pair[0] <= largest and pair != first]
    random.Random(f"{name}/{seed}").shuffle(grid)
    return [first, *grid]


def batches_of(name: str, device: str, seed: int, largest: int) -> Iterator[Case]:
    """Every kind of batch at every size up to `largest`, of a shape of `SHAPES`; the weight is the same."""
    shape = SHAPES[name]
    spec = shape.spec(50_000 if device == "cuda" else 2_000)
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(spec.total_rows, shape.width, generator=generator, device=device).to(shape.dtype)
    for sids, kind in grid_of(name, seed, largest):
        codes = kind_of_codes(spec, kind, sids, shape.codes, generator)
        stream = _stream(spec, codes[:_MOST_IN_STREAM], shape.packed)
        yield Case(spec, codes.to(shape.codes), *stream, weight, f"{name}, {kind}")


def kind_of_codes(spec: AddressSpec, kind: str, sids: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Codes int64 ``[M, L]`` of one of KINDS, which fit `dtype`."""
    uniform = torch.rand(sids, spec.levels, generator=generator, device=generator.device, dtype=torch.float64)
    sizes = torch.tensor(spec.window_sizes, device=uniform.device)
    if kind == "zipf 1.05":  # the law's inverse, on real numbers
        drawn = (1 + uniform * ((sizes + 1.0) ** -0.05 - 1)) ** -20 - 1
    else:
        drawn = uniform * sizes
    codes = torch.minimum(drawn.long(), sizes - 1)
    if kind == "duplicates":
        codes = codes[:1].repeat(sids, 1)
    if kind == "hot prefix":
        codes[::2, :-1] = codes[:1, :-1].clone()
    if kind in ("ended", "invalid"):
        place = torch.randint(spec.levels + 1, (sids, 1), generator=generator, device=codes.device)
        level = torch.arange(spec.levels, device=codes.device)
        wrong = torch.minimum(sizes, sizes.new_tensor(torch.iinfo(dtype).max))
        wrong[::2] = -(1 << 14)
        codes = torch.where(level >= place, -1, codes) if kind == "ended" else torch.where(level == place, wrong, codes)
    return codes


def _stream(spec: AddressSpec, codes: Tensor, packed: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The SIDs as tokens, one of text before each, and none of the vocabulary in place of a code that is not valid.

    Of a window both items are there, one after the other.
    """
    sids, device = len(codes), codes.device
    first, firsts, entries, tokens = 3, [], [torch.zeros(3, 2, dtype=torch.int32)], [torch.zeros_like(codes[:, 0])]
    for level, size in enumerate(spec.codebook_sizes, 1):
        known = torch.arange(min(size, 2048), dtype=torch.int64)
        entry = known * (min(size, 1 << 30) // len(known))  # no vocabulary has codes past 2^31
        entries.append(torch.stack([torch.full_like(entry, level), entry], 1).int())
        firsts.append((first, len(known)))
        first += len(known)
    for place, size in enumerate(spec.window_sizes):
        (begin, count), code = firsts[place % spec.item_levels], codes[:, place]
        tokens.append(torch.where((code >= 0) & (code < size), begin + code % count, -100))
    rows = 8 if sids % 8 == 0 else 1
    ids = torch.stack(tokens, 1).view(rows, -1)
    segments = None
    if packed:  # a document of seven SIDs ends within the last of them
        segments = ((torch.arange(ids.shape[1], device=device) + 2) // (7 * len(tokens))).expand(rows, -1)
    return ids, torch.cat(entries).to(device), segments
