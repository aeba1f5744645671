"""The files that a run reads: where they are, and the SHA-256 of their contents.

config.yaml keeps them under `inputs`. Whoever goes on with the run or evaluates it so reads the same contents, from any
working directory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..._files import sha256_of
from ..._inputs import shown
from .config import RunConfig

DATA = ("items", "interactions", "text")
INPUTS = (*DATA, "model", "tokenizer", "encoder")


def inputs_of(config: RunConfig, out: Path) -> dict[str, list[dict[str, str]]]:
    """For each option that names files: their places and their digests. Names of hubs and of presets are left out."""
    found = {name: [_entry(place, out) for place in _places(config, name)] for name in INPUTS}
    return {name: entries for name, entries in found.items() if entries}


def check_outside(config: RunConfig, out: Path) -> None:
    """Refuse a run whose folder holds what it reads, or lies in it, where it would change the contents.

    Raises:
        ValueError: one of the files or folders lies in `out`, or `out` in one of the folders.
    """
    for name in INPUTS:
        for place in _places(config, name):
            if Path(place).resolve().is_relative_to(out.resolve()):
                raise ValueError(f"{name} = {place} lies in out = {out}; give another folder for the run")
            if out.resolve().is_relative_to(Path(place).resolve()):
                raise ValueError(f"out = {out} lies in {name} = {place}; give another folder for the run")


def check_options(config: RunConfig, stored: RunConfig, inputs: dict[str, Any], out: Path) -> None:
    """Refuse to go on with a run under other options; a file may have another place with the same contents.

    Raises:
        ValueError: an option differs.
    """
    for name, value in config.to_dict().items():
        before = getattr(stored, name)
        if value == before:
            continue
        digests = [entry.get("sha256") for entry in inputs.get(name, [])]
        places = _places(config, name)
        if digests and [_digest(place) for place in places] == digests:
            continue
        raise ValueError(
            f"{name} = {shown(value)}, and the run in {out} was started with {shown(before)}; a resumed run keeps its "
            "options"
        )


def check_revision(inputs: dict[str, Any], revision: str | None, name: str) -> None:
    """Keep the revision of a model from a hub, or compare it with the one that is kept.

    Raises:
        ValueError: it is another.
    """
    if revision is None:
        return
    entries = inputs.setdefault("model", [{"path": name, "revision": revision}])
    before = entries[0].get("revision", revision)
    if revision != before:
        raise ValueError(
            f"model = {name!r} has the revision {revision} now, and the run was started with {before}; bring that one "
            "into the cache, or train anew"
        )


def located(config: RunConfig, inputs: dict[str, Any], out: Path, names: Sequence[str] = INPUTS) -> RunConfig:
    """The options with the places at which the files of a run are now, their contents compared.

    They are looked for where they were, at the same place relative to the run's folder, and at the place that the
    options name from the working directory.

    Raises:
        FileNotFoundError: a file is at none of these places.
        ValueError: it has other contents; both digests are given.
    """
    changes: dict[str, Any] = {}
    for name in names:
        entries = [entry for entry in inputs.get(name, []) if "sha256" in entry]
        if entries:
            given = _places(config, name)
            places = given if len(given) == len(entries) else [None] * len(entries)
            found = [_find(name, entry, place, out) for entry, place in zip(entries, places, strict=True)]
            changes[name] = found if name == "interactions" else found[0]
    return config.replace(**changes)


def _find(name: str, entry: dict[str, str], given: str | None, out: Path) -> str:
    places = dict.fromkeys(
        str(place) for place in (entry["absolute"], out / entry["from_run"], given, entry["path"]) if place
    )
    other = {}
    for place in places:
        if _can_be_read(place):
            digest = _digest(place)
            if digest == entry["sha256"]:
                return place
            other[place] = digest
    if other:
        place, digest = next(iter(other.items()))
        raise ValueError(
            f"{name} {place} is not what the run in {out} was trained with: its SHA-256 is {digest}, that of the run's "
            f"is {entry['sha256']}; bring the old contents back, or train anew"
        )
    raise FileNotFoundError(f"{name} is at none of {', '.join(places)}; bring it to one of these places")


def _places(config: RunConfig, name: str) -> list[str]:
    """What an option names that is on this machine."""
    from .backbone import PRESETS

    value = getattr(config, name)
    if isinstance(value, str) and name == "model" and value in PRESETS:
        return []
    values = value if isinstance(value, list) else [value]
    return [place for place in values if isinstance(place, str) and _can_be_read(place)]


def _can_be_read(place: str) -> bool:
    """Whether it is a file or a folder, and no pipe or device."""
    return os.path.isfile(place) or os.path.isdir(place)


def _entry(place: str, out: Path) -> dict[str, str]:
    absolute = os.path.abspath(place)
    return {
        "path": place,
        "absolute": absolute,
        "from_run": os.path.relpath(os.path.realpath(place), out.resolve()),
        "sha256": _digest(place),
    }


def _digest(place: str | Path) -> str:
    """Of a file's contents; of a folder's files, those that are hidden aside, with their names."""
    place = Path(place)
    if not place.is_dir():
        return sha256_of(place)
    digest = hashlib.sha256()
    for file in sorted(place.rglob("*")):
        name = file.relative_to(place)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name.as_posix()}\0{sha256_of(file)}\n".encode())
    return digest.hexdigest()
