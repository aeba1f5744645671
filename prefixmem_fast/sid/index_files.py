"""What index files of the field hold: an array of codes, tokens by item, or codes by item.

JSON      {"item": ["<a_1>", "<b_2>", ...]} as of LC-Rec, MiniOneRec and MIMIGenRec's id2sid.json;
          {"item": "<a_1><b_2>..."} with the tokens in one string; {"item": [1, 2, ...]} with codes from 0
.npy      integers [items, L] or [L, items]
.pt       the same as a tensor, or a dict as in JSON. GRID writes [L, items], and float32 [items, L] before it numbers
          items that share a SID; sid_gr reads [L, items]
Parquet   a column of item ids and one of codes or tokens, as OpenOneRec's pid and sid
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks
from .._choices import LAYOUTS
from .._files import read_json
from .._inputs import check_unique, clipped, shown
from .._parquet import parquet_file
from .arrays import read_npy, read_pt

SUFFIXES = (".json", ".npy", ".pt", ".parquet")
ITEM = ("item_id", "item", "pid", "iid", "item_asin", "parent_asin")
SID = ("sid", "sids", "codes", "semantic_id", "semantic_ids")
_EXPECTED = "integers [items, L] or [L, items]"
_AROUND = ("<|sid_begin|>", "<|sid_end|>")  # stand before and after a whole SID, and for no code


def read_index(path: Path, layout: str | None) -> tuple[Sequence[str], Tensor] | Mapping[str, Any]:
    """What an index file holds.

    Args:
        layout: of an array, "items-first" for ``[items, L]`` and "levels-first" for ``[L, items]``. None takes the
            longer side for that of the items.

    Returns:
        names of items and integer codes ``[items, L]``; or tokens by item, which are still to be read.

    Raises:
        ValueError: the file holds something else.
    """
    if layout is not None:
        _checks.choice("layout", layout, LAYOUTS)
    suffix = path.suffix.lower()
    content = _READERS[suffix](path)
    if isinstance(content, Tensor):
        codes = items_first(_whole(content), layout)
        return [str(row) for row in range(len(codes))], codes
    if layout is not None:
        raise ValueError(f"layout = {layout!r} is of an array, and it holds none; leave it out")
    if isinstance(content, tuple):
        return content
    return codes_by_item(content) if isinstance(content, Mapping) and _holds_codes(content) else content


def items_first(codes: Tensor, layout: str | None) -> Tensor:
    """An array as ``[items, L]``; see `read_index`."""
    if codes.dim() != 2:
        raise ValueError(f"it has shape {tuple(codes.shape)}; {_EXPECTED} were expected")
    rows, columns = codes.shape
    if layout is None and rows == columns and rows > 1:
        raise ValueError(
            f"its shape is {rows} x {columns}, and either side may count the items; say layout = "
            f"{' or '.join(map(repr, LAYOUTS))}"
        )
    return codes.T if layout == "levels-first" or (layout is None and columns > rows) else codes


def _whole(codes: Tensor) -> Tensor:
    """Codes as integers: GRID has them as float32 before it numbers items that share a SID."""
    if codes.dtype not in (torch.float32, torch.float64):
        return codes
    whole = codes.detach().to(torch.int64)
    if not torch.equal(whole.to(codes.dtype), codes):
        raise ValueError(f"it holds {codes.dtype} that are no whole numbers; {_EXPECTED} were expected")
    return whole


def _holds_codes(content: Mapping[str, Any]) -> bool:
    first = next(iter(content.values()), None)
    return isinstance(first, list) and bool(first) and isinstance(first[0], int)


def codes_by_item(index: Mapping[str, Any]) -> tuple[list[str], Tensor]:
    """Names and codes ``[items, L]`` of ``{"item": [c_1, c_2, ...]}``, codes from 0."""
    for item, codes in index.items():
        if not isinstance(codes, list):
            raise ValueError(f"item {shown(item)} has {shown(codes)}; a list of codes, one a level, was expected")
        check_levels(item, index)
        for level, code in enumerate(codes, start=1):
            if isinstance(code, bool) or not isinstance(code, int) or not 0 <= code < 1 << 31:
                raise ValueError(
                    f"item {shown(item)}, level {level}: {shown(code)} is no code; a whole number of 0..2^31 - 1, as "
                    "at the other items, was expected"
                )
    return list(index), torch.tensor(list(index.values()))


def check_levels(item: str, index: Mapping[str, Sequence[Any]]) -> None:
    """Refuse an item that has not as many levels as the first one."""
    first = next(iter(index))
    if len(index[item]) != len(index[first]):
        raise ValueError(
            f"item {shown(item)} has {len(index[item])} levels and item {shown(first)} has {len(index[first])}"
        )


def split_tokens(sid: str) -> list[str]:
    """The tokens of a SID that is one string, such as ``<a_1><b_2>``.

    Raises:
        ValueError: there is something beside tokens in angle brackets.
    """
    tokens = re.findall(r"<[^<>]*>", sid)
    if not tokens or "".join(tokens) != re.sub(r"\s+", "", sid):
        raise ValueError(f"{shown(sid)} is no Semantic ID; a list of tokens, or <a_1><b_2>..., was expected")
    return tokens


def without_ends(tokens: Sequence[Any]) -> list[Any]:
    """The tokens of a SID without those around a whole one."""
    return [token for token in tokens if token not in _AROUND]


def _read_parquet(path: Path) -> tuple[Sequence[str], Tensor] | Mapping[str, Any]:
    with parquet_file(path) as file:
        columns = file.schema_arrow.names
        item, sid = _column(columns, ITEM, "items"), _column(columns, SID, "Semantic IDs")
        table = file.read(columns=[item, sid]).combine_chunks()
        names = [_name(value, row) for row, value in enumerate(table[item].to_pylist())]
        if not names:
            raise ValueError("it has no row; one an item was expected")
        codes = _codes_of(table[sid], sid)
        values = None if codes is not None else table[sid].to_pylist()
    if codes is not None:
        return names, codes
    check_unique(names)  # a mapping would hide it
    return dict(zip(names, values, strict=True))


def _codes_of(column: Any, name: str) -> Tensor | None:
    """A column of lists of whole numbers as codes ``[items, L]``; None where it holds something else."""
    import pyarrow

    kind = column.type
    if not (pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind)):
        return None
    if not pyarrow.types.is_integer(kind.value_type):
        return None
    lists = column.to_pylist()
    levels = None if lists[0] is None else len(lists[0])
    for row, codes in enumerate(lists):
        if codes is None or len(codes) != levels or None in codes:
            raise ValueError(f"row {row}: {name} = {shown(codes)}; as many codes as in row 0 were expected")
    return torch.from_numpy(np.array(lists, dtype=np.int64).reshape(len(lists), levels))


def _name(value: Any, row: int) -> str:
    if isinstance(value, float) and value.is_integer():  # as pandas writes it where one is missing elsewhere
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise ValueError(f"row {row}: item {shown(value)} is neither a name nor a whole number")
    return str(value)


def _column(columns: Sequence[str], names: tuple[str, ...], what: str) -> str:
    found = [name for name in names if name in columns]
    if not found:
        raise ValueError(
            f"no column for the {what}; one of {', '.join(names)} was expected, found {clipped(', '.join(columns))}"
        )
    if list(columns).count(found[0]) > 1:
        raise ValueError(f"column {shown(found[0])} is there twice; name each column once")
    return found[0]


_READERS = {
    ".json": lambda path: read_json(path, kind="item", most=None),
    ".npy": lambda path: read_npy(path, "iu", _EXPECTED),
    ".pt": lambda path: read_pt(path, _EXPECTED),
    ".parquet": _read_parquet,
}
