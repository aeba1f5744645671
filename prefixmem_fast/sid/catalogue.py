"""The catalogue: which item has which Semantic ID, read from the index files of the field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import _checks
from .._inputs import check_unique, clipped, input_file, shown
from .formats import TokenFormat, recognise
from .index_files import SUFFIXES, check_levels, read_index, split_tokens, without_ends


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
        check_unique(self.items)
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
                f"item {shown(self.items[i])} has code {int(self.codes[i, l])} at level {l + 1}; allowed are "
                f"0..{self.codebook_sizes[l] - 1}"
            )

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        codebook_sizes: Sequence[int] | None = None,
        token_format: str | None = None,
        layout: str | None = None,
    ) -> Catalogue:
        """Read an index file.

        Args:
            path: JSON ``{"item": ["<a_1>", "<b_2>", ...]}``, with the tokens in one string or with codes in place of
                tokens; an integer array ``[items, L]`` or ``[L, items]`` in .npy or .pt, whose items are named by their
                row; or Parquet with a column of items and one of codes or tokens. `index_files` lists them.
            codebook_sizes: K_1 .. K_L, where they are more than the codes show.
            token_format: template of the tokens of an index; recognised among the known ones unless given.
            layout: of an array: "items-first" for ``[items, L]``, "levels-first" for ``[L, items]``. None takes the
                longer side for that of the items, and refuses a square.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no regular file or not an index; the message names the item, the level and the token.
        """
        path = input_file("index", path, SUFFIXES)
        try:
            content = read_index(path, layout)
            if isinstance(content, tuple):
                return cls(*content, codebook_sizes)
            return cls.from_tokens(content, codebook_sizes=codebook_sizes, token_format=token_format)
        except Exception as error:  # damaged files fail in as many ways as there are readers
            raise ValueError(f"index {path}: {clipped(error)}") from error

    @classmethod
    def from_tokens(
        cls,
        index: Mapping[str, Sequence[str] | str],
        *,
        codebook_sizes: Sequence[int] | None = None,
        token_format: str | None = None,
    ) -> Catalogue:
        """A catalogue from ``{"item": ["<a_1>", "<b_2>", ...]}``, or ``{"item": "<a_1><b_2>..."}``.

        Raises:
            TypeError, ValueError: a token is not one of its level; the message names item, level and token.
        """
        if not isinstance(index, Mapping):
            raise TypeError(f'the index is a {type(index).__name__}; give {{"item": ["<a_1>", "<b_2>", ...]}}')
        if not index:
            raise ValueError('the index is empty; give {"item": ["<a_1>", "<b_2>", ...]}')
        index = {item: _tokens_of(item, sid) if isinstance(sid, str) else sid for item, sid in index.items()}
        for item, tokens in index.items():
            if not isinstance(tokens, Sequence):
                raise TypeError(f"item {shown(item)} has {shown(tokens)}; give a list of tokens, one a level")
        index = {item: without_ends(tokens) for item, tokens in index.items()}
        for item, tokens in index.items():
            check_levels(item, index)
            for level, token in enumerate(tokens, start=1):
                if not isinstance(token, str):
                    raise TypeError(f"item {shown(item)}, level {level}: {shown(token)} is not a token; give a string")
        everything = dict.fromkeys(token for tokens in index.values() for token in tokens)
        form = TokenFormat(token_format, codebook_sizes) if token_format else recognise(everything, codebook_sizes)
        codes = []
        for item, tokens in index.items():
            row = []
            for level, token in enumerate(tokens, start=1):
                entry = form.read(token)
                if entry is None:
                    raise ValueError(
                        f"item {shown(item)}, level {level}: token {shown(token)} is not of the form {form.template}"
                    )
                if entry[0] != level:
                    raise ValueError(
                        f"item {shown(item)}, level {level}: token {shown(token)} is one of level {entry[0]}; "
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


def _tokens_of(item: str, sid: str) -> list[str]:
    try:
        return split_tokens(sid)
    except ValueError as error:
        raise ValueError(f"item {shown(item)}: {error}") from None
