"""What an item is called: the text beside its Semantic ID."""

from __future__ import annotations

from pathlib import Path

from ..._files import read_json
from ..._inputs import clipped, input_file, shown
from ...sid.catalogue import Catalogue


def load_item_text(path: str | Path, catalogue: Catalogue, field: str = "title") -> list[str]:
    """Read the text of each item; empty where the file has none.

    Args:
        path: JSON, ``{"item": "text"}`` or ``{"item": {"title": "text", ...}}``.
        catalogue: the items.
        field: which entry of an item to read.

    Returns:
        one text an item, in the catalogue's order, on one line.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it is no regular file, not as stated, or has text for no item; the message gives file and key.
    """
    path = input_file("text", path, (".json",))
    try:
        content = read_json(path, most=None)
    except ValueError as error:
        raise ValueError(f"text {path}: {clipped(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f'text {path}: it holds a {type(content).__name__}; {{"item": "text"}} was expected')
    texts = []
    for item in catalogue.items:
        entry = content.get(item, "")
        text = (entry.get(field) or "") if isinstance(entry, dict) else entry
        if not isinstance(text, str):
            raise ValueError(
                f"text {path}: key {shown(item)} has {shown(text)}; a string, or an object with {field!r}, was expected"
            )
        texts.append(" ".join(text.split()))
    if not any(texts):
        raise ValueError(
            f"text {path}: no item of the index has a {field!r} in it; check text_field and the item names"
        )
    return texts
