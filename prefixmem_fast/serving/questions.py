"""What clients send, checked before an engine sees it: each error is one line that says what to do."""

from __future__ import annotations

import json
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._inputs import clipped, shown
from .engine import Request, check_request
from .folder import load_catalogue, load_vocabulary, model_folder

_KEYS = ("history", "num_beams", "count")
_NAMED = 5  # unknown items that an error names


class Refused(Exception):
    """A question that is not answered, with the status that says why."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Question:
    """A search, and how many Semantic IDs of it are wanted."""

    request: Request
    count: int


class Items:
    """The items of a catalogue by name, and the codes that a model has tokens for.

    Args:
        folder, catalogue, token_format: of `read_served`.

    Raises:
        OSError, ValueError: as `read_served`, for what is read without transformers.
    """

    def __init__(self, folder: str | Path, catalogue: str | Path, token_format: str | None = None) -> None:
        path = model_folder(folder)
        self.vocabulary = load_vocabulary(path)
        self.catalogue = load_catalogue(catalogue, path, self.vocabulary, token_format)
        self._rows = {name: row for row, name in enumerate(self.catalogue.items)}
        self._sorted = sorted((name.casefold(), row) for name, row in self._rows.items())

    def __len__(self) -> int:
        return len(self.catalogue)

    def codes(self, row: int) -> tuple[int, ...]:
        return tuple(self.catalogue.codes[row].tolist())

    def beginning_with(self, prefix: str, most: int) -> list[dict[str, Any]]:
        """The first items, by name, that begin with a text in small or capital letters, with their Semantic IDs."""
        prefix = prefix.casefold()
        begin = bisect_left(self._sorted, (prefix,))
        rows = []
        for name, row in self._sorted[begin : begin + most]:
            if not name.startswith(prefix):
                break
            rows.append(row)
        return [self._shown(row) for row in rows]

    def example(self, most: int = 4) -> list[dict[str, Any]]:
        """A history to try: items that share the first code of the one in the catalogue's middle."""
        first = self.catalogue.codes[:, 0]
        rows = torch.nonzero(first == first[len(first) // 2]).squeeze(1)
        return [self._shown(int(row)) for row in rows[:: max(len(rows) // most, 1)][:most]]

    def _shown(self, row: int) -> dict[str, Any]:
        return {"name": self.catalogue.items[row], "sid": list(self.codes(row))}

    def read(self, body: bytes, limits: dict[str, int], num_beams: int) -> Question:
        """A question from the body of a request.

        Args:
            limits: of `Engine.describe`.
            num_beams: where the body has none.

        Raises:
            Refused: it is not JSON (400), or not a question that can be answered (422).
        """
        values = _read_json(body)
        if not isinstance(values, dict):
            raise Refused(400, f'the body is {shown(values)}; send an object, {{"history": ["item", ...]}}')
        unknown = sorted(set(values) - set(_KEYS))
        if unknown:
            raise Refused(422, f"{shown(unknown[0])} is no argument; allowed are {', '.join(_KEYS)}")
        if "history" not in values:
            raise Refused(422, 'history is missing; send the items that the user met, {"history": ["item", ...]}')
        beams = _whole("num_beams", values.get("num_beams", num_beams))
        count = _whole("count", values.get("count", beams))
        history = values["history"]
        if not isinstance(history, list):
            raise Refused(422, f"history = {shown(history)} is no list; send names of items, or lists of codes")
        try:
            check_request(Request(tuple(history), beams), limits)
        except ValueError as error:
            raise Refused(422, clipped(error)) from None
        if not 1 <= count <= beams:
            raise Refused(422, f"count = {count}; allowed are 1..{beams}, the number of beams")
        return Question(Request(self._history(history), beams), count)

    def _history(self, history: list[Any]) -> tuple[tuple[int, ...], ...]:
        known, unknown = [], []
        for place, item in enumerate(history):
            if isinstance(item, list):
                known.append(self._sid(place, item))
            elif not isinstance(item, str):
                raise Refused(422, f"history[{place}] = {shown(item)}; send the name of an item, or a list of codes")
            elif item in self._rows:
                known.append(self.codes(self._rows[item]))
            else:
                unknown.append(item)
        if unknown:
            named = ", ".join(shown(item) for item in unknown[:_NAMED])
            more = f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
            raise Refused(
                422, f"history has items that the catalogue does not: {named}{more}; GET /v1/items?prefix= lists names"
            )
        return tuple(known)

    def _sid(self, place: int, codes: list[Any]) -> tuple[int, ...]:
        sizes = self.vocabulary.codebook_sizes
        given = f"history[{place}] = {shown(codes)}"
        if len(codes) != len(sizes) or any(isinstance(code, bool) or not isinstance(code, int) for code in codes):
            raise Refused(
                422, f"{given}; send {len(sizes)} whole numbers, a code of each level, or the name of an item"
            )
        for level, (code, size) in enumerate(zip(codes, sizes, strict=True), 1):
            if not 0 <= code < size:
                raise Refused(422, f"{given}: level {level} allows 0..{size - 1}")
        try:
            self.vocabulary.encode(torch.tensor(codes))
        except ValueError:
            raise Refused(422, f"{given} has a code that the model has no token for; send codes of items") from None
        return tuple(codes)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refused(422, f"{name} = {shown(value)}; send a whole number")
    if abs(value) > 1 << 31:
        raise Refused(422, f"{name} = {shown(value)} is too large; leave it out, or send less")
    return value


def _read_json(body: bytes) -> Any:
    try:
        return json.loads(body.decode(), parse_constant=_constant)
    except RecursionError:
        reason = "nested too deeply"
    except UnicodeDecodeError:
        reason = "not UTF-8"
    except ValueError as error:
        reason = clipped(error, 100)
    raise Refused(400, f'the body is not JSON ({reason}); send {{"history": ["item", ...]}}')


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
