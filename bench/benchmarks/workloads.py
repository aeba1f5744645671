"""Batches of Semantic IDs, the tables they read, and the fewest bytes that a step over them moves."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from prefixmem_fast import AddressSpec, Catalogue, SIDVocabulary, prefix_rows
from prefixmem_fast.recommender.data import load_interactions

from ..real_data import checked_folder
from ..registry import Floor

LEVELS, CODES, ORDERS, HEADS, WIDTH = 5, 2048, 4, 4, 64  # the paper's shape
BATCHES = 4  # different batches in turn
DTYPES = ("float32", "bfloat16", "float16")
# Rows of random values, repeated: filling the largest tables with new ones would take minutes. Their number is odd, so
# an offset that wraps at a power of two reads other values.
BLOCK = (1 << 18) - 5
HISTORIES = ("beauty/mql4grec.index.json", "beauty/interactions.json")
SORT_BYTES = 52  # an entry of a radix sort of 32-bit keys in three passes, keys and places
FIRST_TOKEN = 100  # ids below are text


@dataclass(frozen=True)
class Workload:
    """A batch of SIDs and the hashed tables that it reads.

    Args:
        sids: M, Semantic IDs a batch.
        codes: "uniform"; "zipf 1.05", each code by that law; "histories", real ones one after another; "hot", half the
            batch is one SID and the rest uniform.
        table_rows: T, rows a table, every order hashed as in the paper.
        dtype: of tables, S and its gradient.
    """

    sids: int = 16_384
    codes: str = "uniform"
    table_rows: int = 200_000
    dtype: str = "float32"

    @cached_property
    def spec(self) -> AddressSpec:
        sizes = histories().codebook_sizes if self.codes == "histories" else (CODES,) * LEVELS
        active = (len(sizes) - 2, len(sizes) - 1)  # to predict the two deepest levels
        return AddressSpec(sizes, ORDERS, HEADS, self.table_rows, active_levels=active, addressing="hash")

    @property
    def torch_dtype(self) -> torch.dtype:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype = {self.dtype!r}; allowed are {', '.join(DTYPES)}")
        return getattr(torch, self.dtype)

    @property
    def table_bytes(self) -> int:
        return self.spec.total_rows * WIDTH * self.torch_dtype.itemsize

    def batches(self, device: str) -> list[Tensor]:
        """Codes int64 ``[M, L]``, different ones."""
        return [self._batch(seed).to(device) for seed in range(BATCHES)]

    def _batch(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.codes == "histories":
            codes = histories().codes
            places = torch.arange(self.sids) + seed * (len(codes) // BATCHES)
            return codes[places % len(codes)]
        if exponent := re.fullmatch(r"zipf (\d+\.?\d*)", self.codes):
            chance = torch.arange(1, CODES + 1, dtype=torch.float64) ** -float(exponent[1])
            drawn = torch.multinomial(chance, self.sids * LEVELS, replacement=True, generator=generator)
            return drawn.view(self.sids, LEVELS)
        if self.codes not in ("uniform", "hot"):
            raise ValueError(f"codes = {self.codes!r}; allowed are uniform, zipf <exponent>, histories and hot")
        drawn = torch.randint(0, CODES, (self.sids, LEVELS), generator=generator)
        if self.codes == "hot":
            drawn[::2] = drawn[0]
        return drawn

    def weight(self, device: str) -> Tensor:
        """The tables ``[R, w]``; the same values at every call."""
        total = self.spec.total_rows
        generator = torch.Generator(device).manual_seed(0)
        block = torch.randn(min(BLOCK, total), WIDTH, device=device, generator=generator).mul_(0.02)
        weight = torch.empty(total, WIDTH, device=device, dtype=self.torch_dtype)
        _ask_for_huge_pages(weight)
        for part in weight.split(BLOCK):
            part.copy_(block[: len(part)])
        return weight

    def gradient(self, device: str) -> Tensor:
        """dS ``[M, A, H * w]``."""
        generator = torch.Generator(device).manual_seed(1)
        shape = (self.sids, len(self.spec.active_levels), HEADS * WIDTH)
        return torch.randn(shape, device=device, generator=generator).to(self.torch_dtype)

    def reading(self, codes: Tensor) -> Floor:
        """Codes in, rows in, S out."""
        return self.rows_and(codes, codes.numel() * codes.itemsize + self._vector_bytes(codes))

    def training(self, codes: Tensor) -> Floor:
        """Codes and dS in, one sort of the SIDs, rows and a float32 number for each in and out."""
        fixed = codes.numel() * codes.itemsize + self._vector_bytes(codes) + SORT_BYTES * len(codes)
        return self.rows_and(codes, fixed, 2 * (self._row_bytes + 4))

    def dense_gradient(self, codes: Tensor) -> Floor:
        """Codes and dS in, every row of the gradient out once."""
        fixed = codes.numel() * codes.itemsize + self._vector_bytes(codes) + self.table_bytes
        return Floor(fixed, fixed)

    def rows_and(self, codes: Tensor, fixed: int, bytes_a_row: int | None = None) -> Floor:
        """The rows of a batch and `fixed` other bytes; a row is read once where no number is given."""
        each = self._row_bytes if bytes_a_row is None else bytes_a_row
        return Floor(*(fixed + rows * each for rows in touched(codes, self.spec)))

    @property
    def _row_bytes(self) -> int:
        return WIDTH * self.torch_dtype.itemsize

    def _vector_bytes(self, codes: Tensor) -> int:
        return len(codes) * len(self.spec.active_levels) * HEADS * self._row_bytes


def _ask_for_huge_pages(weight: Tensor) -> None:
    """As `PrefixMemory` does; for every contender, where the library that is measured knows how."""
    try:
        from prefixmem_fast._pages import ask_for_huge_pages
    except ImportError:
        return
    ask_for_huge_pages(weight)


def touched(codes: Tensor, spec: AddressSpec) -> tuple[int, int]:
    """Rows that a batch reads: distinct ones, and once a SID (prefix mode: every level reads the last one's)."""
    rows = prefix_rows(codes, spec)[:, spec.active_levels[-1] - 1]
    rows = rows[rows >= 0]
    return rows.unique().numel(), rows.numel()


def vocabulary_of(spec: AddressSpec) -> SIDVocabulary:
    """A token for every code, after the text."""
    ids, start = {}, FIRST_TOKEN
    for level, size in enumerate(spec.codebook_sizes, 1):
        ids.update({start + code: (level, code) for code in range(size)})
        start += size
    return SIDVocabulary.from_table(ids, spec.codebook_sizes)


def token_stream(codes: Tensor, vocabulary: SIDVocabulary, rows: int, text: int) -> Tensor:
    """SIDs ``[M, L]``, each after `text` tokens of text, as input_ids ``[rows, M / rows * (text + L)]``."""
    tokens = vocabulary.encode(codes.cpu())
    words = torch.arange(text).expand(len(tokens), text)
    return torch.cat([words, tokens], 1).view(rows, -1).to(codes.device)


class Histories(NamedTuple):
    codes: Tensor  # int64 [interactions, L], user after user
    codebook_sizes: tuple[int, ...]


@lru_cache(maxsize=1)
def histories() -> Histories:
    """The SIDs of real histories (Beauty), in the order in which users met them.

    Raises:
        FileNotFoundError, ValueError: as `real_data.checked_folder`.
    """
    index, interactions = (checked_folder(HISTORIES) / name for name in HISTORIES)
    catalogue = Catalogue.load(index)
    users = load_interactions(interactions, catalogue)
    items = torch.cat([torch.as_tensor(row) for row in users.items])
    return Histories(catalogue.codes[items], catalogue.codebook_sizes)


def no_histories() -> str | None:
    """Why there are no real histories, or None."""
    try:
        checked_folder(HISTORIES)
    except (FileNotFoundError, ValueError) as error:
        return f"no real histories: {error}"
    return None
