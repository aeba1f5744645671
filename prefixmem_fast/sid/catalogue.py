"""The catalogue: which item has which Semantic ID, read from the index files of the field."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks
from .formats import TokenFormat, recognise


class Catalogue:
    """Items and their Semantic IDs; several items may share one.

    Args:
        items: names of the items, each once.
        codes: integer ``[items, L]``, codes from 0.
        codebook_sizes: K_1 .. K_L; one more than the largest code of each level unless given.

    Attributes:
        items: tuple of str.
        codes: int64 ``[items, L]`` on the CPU.
        codebook_sizes: K_1 .. K_L.

    Raises:
        TypeError, ValueError: an argument is not as stated; the message names the item and the level.
    """

    def __init__(self, items: Iterable[str], codes: Tensor, codebook_sizes: Sequence[int] | None = None) -> None:
        self.items = tuple(str(item) for item in items)
        codes = torch.as_tensor(codes)
        if codes.dim() != 2 or codes.is_floating_point() or codes.dtype == torch.bool:
            raise ValueError(f"codes is {codes.dtype} {tuple(codes.shape)}; give integers [items, L]")
        if len(codes) != len(self.items):
            raise ValueError(f"{len(self.items)} items and {len(codes)} rows of codes; give one row an item")
        if not codes.numel():
            raise ValueError(f"codes has shape {tuple(codes.shape)}; give at least one item and one level")
        _check_unique(self.items)
        self.codes = codes.to("cpu", torch.int64)
        largest = self.codes.amax(0)
        self.codebook_sizes = _checks.codebook_sizes(
            [max(int(code) + 1, 1) for code in largest] if codebook_sizes is None else codebook_sizes
        )
        if len(self.codebook_sizes) != codes.shape[1]:
            raise ValueError(f"codebook_sizes has {len(self.codebook_sizes)} levels and codes has {codes.shape[1]}")
        wrong = ((self.codes < 0) | (self.codes >= torch.tensor(self.codebook_sizes))).nonzero()
        if len(wrong):
            i, l = wrong[0].tolist()
            raise ValueError(
                f"item {self.items[i]!r} has code {int(self.codes[i, l])} at level {l + 1}; allowed are "
                f"0..{self.codebook_sizes[l] - 1}"
            )

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        codebook_sizes: Sequence[int] | None = None,
        token_format: str | None = None,
    ) -> Catalogue:
        """Read an index file.

        Args:
            path: JSON ``{"item": ["<a_1>", "<b_2>", ...]}``, or an integer array ``[items, L]`` in .npy or .pt, whose
                items are named by their row.
            codebook_sizes: K_1 .. K_L, where they are more than the codes show.
            token_format: template of the tokens of a JSON index; recognised among the known ones unless given.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not an index; the message names the item, the level and the token.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"index {path} is not there; give a JSON, .npy or .pt file")
        try:
            if path.suffix == ".npy":
                content = torch.from_numpy(np.load(path, allow_pickle=False))
            elif path.suffix == ".pt":
                content = torch.load(path, map_location="cpu", weights_only=True)
            elif path.suffix == ".json":
                content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
            else:
                raise ValueError("its name ends neither in .json nor in .npy nor in .pt")
            if isinstance(content, Tensor):
                return cls(map(str, range(len(content))), content, codebook_sizes)
            return cls.from_tokens(content, codebook_sizes=codebook_sizes, token_format=token_format)
        except Exception as error:  # damaged files fail in as many ways as there are readers
            raise ValueError(f"index {path}: {error}") from error

    @classmethod
    def from_tokens(
        cls,
        index: Mapping[str, Sequence[str]],
        *,
        codebook_sizes: Sequence[int] | None = None,
        token_format: str | None = None,
    ) -> Catalogue:
        """A catalogue from ``{"item": ["<a_1>", "<b_2>", ...]}``.

        Raises:
            TypeError, ValueError: a token is not one of its level; the message names item, level and token.
        """
        if not isinstance(index, Mapping):
            raise TypeError(f'the index is a {type(index).__name__}; give {{"item": ["<a_1>", "<b_2>", ...]}}')
        if not index:
            raise ValueError('the index is empty; give {"item": ["<a_1>", "<b_2>", ...]}')
        levels = None
        for item, tokens in index.items():
            if isinstance(tokens, str) or not isinstance(tokens, Sequence):
                raise TypeError(f"item {item!r} has {tokens!r}; give a list of tokens, one a level")
            levels = len(tokens) if levels is None else levels
            if len(tokens) != levels:
                first = next(iter(index))
                raise ValueError(f"item {item!r} has {len(tokens)} levels and item {first!r} has {levels}")
            for level, token in enumerate(tokens, start=1):
                if not isinstance(token, str):
                    raise TypeError(f"item {item!r}, level {level}: {token!r} is not a token; give a string")
        everything = dict.fromkeys(token for tokens in index.values() for token in tokens)
        form = TokenFormat(token_format, codebook_sizes) if token_format else recognise(everything, codebook_sizes)
        codes = []
        for item, tokens in index.items():
            row = []
            for level, token in enumerate(tokens, start=1):
                entry = form.read(token)
                if entry is None:
                    raise ValueError(
                        f"item {item!r}, level {level}: token {token!r} is not of the form {form.template}"
                    )
                if entry[0] != level:
                    raise ValueError(
                        f"item {item!r}, level {level}: token {token!r} is one of level {entry[0]}; "
                        "each level has tokens of its own, in order"
                    )
                row.append(entry[1])
            codes.append(row)
        return cls(index, torch.tensor(codes), codebook_sizes)

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        distinct = len(self.codes.unique(dim=0))
        return f"Catalogue(items={len(self)}, codebook_sizes={self.codebook_sizes}, distinct_sids={distinct})"


def unique_keys(pairs: list[tuple[str, Any]], kind: str = "item") -> dict[str, Any]:
    """A JSON object whose keys, items or what else `kind` calls them, are each there once."""
    _check_unique([key for key, _ in pairs], kind)
    return dict(pairs)


def _check_unique(names: Sequence[str], kind: str = "item") -> None:
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise ValueError(f"{kind} {twice!r} is there twice; name each {kind} once")
