"""What users give: regular files alone are opened, and an error shows no more than a line of a value."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80
_REPR.maxlevel = 3


def shown(value: Any) -> str:
    """`repr` of a value for an error, long strings and collections shortened."""
    return clipped(_REPR.repr(value), 200)


def clipped(text: Any, most: int = 400) -> str:
    """A text on one line, and its beginning where it is longer than `most` characters."""
    text = " ".join(str(text).split())
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def input_file(what: str, path: str | Path, suffixes: Sequence[str]) -> Path:
    """The path of a file that can be opened and read to its end.

    Args:
        what: names the file in errors: "index", "text", ...
        suffixes: what its name may end in, in small or capital letters; the first describes the file best.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a folder, a pipe or a device is there, or the name ends in something else.
    """
    path, kinds = Path(path), f"{', '.join(suffixes[:-1])} or {suffixes[-1]}" if len(suffixes) > 1 else suffixes[0]
    try:
        exists, folder, regular = path.exists(), path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:  # a name that is too long, or has a null character in it
        raise ValueError(f"{what} {shown(str(path))}: {clipped(error, 100)}; give a {kinds} file") from None
    if not exists:
        raise FileNotFoundError(f"{what} {path} is not there; give a {kinds} file")
    if folder:
        raise ValueError(f"{what} {path} is a folder; give a {kinds} file")
    if not regular:
        raise ValueError(f"{what} {path} is a pipe or a device, which cannot be read twice; give a {kinds} file")
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{what} {path}: its name ends in {path.suffix or 'no suffix'}; {kinds} was expected")
    return path


def unique_keys(pairs: Sequence[tuple[Any, Any]], kind: str = "key") -> dict[Any, Any]:
    """A mapping from a file whose keys, items or what else `kind` calls them, are each there once."""
    check_unique([key for key, _ in pairs], kind)
    return dict(pairs)


def check_unique(names: Sequence[str], kind: str = "item") -> None:
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise ValueError(f"{kind} {shown(twice)} is there twice; name each {kind} once")
