"""Block sizes and warps: one table of them, and what `prefixmem tune` has chosen for a GPU in their place.

A choice is a JSON file in the user's cache folder, one for each GPU's name, release of Triton and release of this
package. It is read once, where a device is first used. Block sizes change the order of sums and so their last bits:
where the same bits are asked for, the defaults are in force.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import namedtuple
from pathlib import Path
from typing import Any, NamedTuple

from prefixmem_fast._environment import cache_folder, installed_version
from prefixmem_fast._files import check_writable, read_json, write_text
from prefixmem_fast._version import __version__


class Setting(NamedTuple):
    of: str  # the kernels that it is measured with
    default: int
    candidates: tuple[int, ...]
    reason: str  # for the default


SETTINGS = {
    "forward_bytes": Setting(
        "forward", 8192, (4096, 8192, 16384), "sums a program: 16 float32 a thread, two SIDs of 256 bfloat16 a warp"
    ),
    "forward_warps": Setting("forward", 4, (2, 4, 8), "a program's rows are in flight at once in at most 64 registers"),
    "walk_tiles": Setting("walk", 1, (1, 2), "sums that one warp holds: its lanes wait for no other warp"),
    "walk_blocks": Setting("walk", 2400, (1200, 2400, 4800), "blocks fill 132 multiprocessors of 9 warps twice"),
    "edge_bytes": Setting("edges", 16384, (4096, 8192, 16384), "partial sums that a program adds at once"),
    "edge_warps": Setting("edges", 2, (1, 2, 4), "few runs go over edges, so many small programs"),
    "merge_programs": Setting("merge", 3072, (1536, 3072, 6144), "as many programs as a large GPU holds at once"),
    "atomic_bytes": Setting("atomics", 4096, (2048, 4096), "every atomic keeps an address and a mask: twice spills"),
    "decode_bytes": Setting("decoding", 8192, (2048, 4096, 8192), "as forward"),
}
Settings = namedtuple("Settings", SETTINGS, defaults=[setting.default for setting in SETTINGS.values()])
DEFAULTS = Settings()


def off() -> bool:
    """Whether the environment asks for the defaults."""
    return os.environ.get("PREFIXMEM_TUNE", "").lower() in ("off", "0", "false", "no")


def file_of(gpu: str) -> Path | None:
    """Where the choice for a GPU of this name is kept; None where the user has no folder for it."""
    cache = cache_folder()
    if cache is None:
        return None
    name = "-".join([gpu, "triton", installed_version("triton") or "none", "prefixmem_fast", __version__])
    return cache / "tune" / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}.json"


def settings_for(gpu: str) -> Settings:
    """What was chosen for a GPU, or the defaults. A file that cannot be used is named in a warning."""
    file = file_of(gpu)
    if off() or file is None:
        return DEFAULTS
    try:
        return _read(file, gpu)
    except FileNotFoundError:
        return DEFAULTS
    except (OSError, ValueError) as error:
        warnings.warn(f"{file} is ignored: {error}; run prefixmem tune again, or delete it", stacklevel=2)
        return DEFAULTS


def check_store(gpu: str) -> Path:
    """The file that `store` will write.

    Raises:
        ValueError: it cannot be written; the message says which folder and what to do.
    """
    file = file_of(gpu)
    if file is None:
        raise ValueError("there is no home folder to keep the choice in; set XDG_CACHE_HOME to a folder")
    try:
        check_writable(file.parent)
        if file.is_dir():
            raise IsADirectoryError(f"{file} is a folder")
    except OSError:
        raise ValueError(f"{file} cannot be written; set XDG_CACHE_HOME to a folder that can") from None
    return file


def store(gpu: str, settings: Settings) -> Path:
    """Keep a choice for the next processes.

    Raises:
        OSError, ValueError: the file cannot be written.
    """
    file = check_store(gpu)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps({**_made_for(gpu), "settings": settings._asdict()}, indent=2) + "\n")
    return file


def _made_for(gpu: str) -> dict[str, Any]:
    return {"gpu": gpu, "triton": installed_version("triton"), "prefixmem_fast": __version__}


def _read(file: Path, gpu: str) -> Settings:
    found = read_json(file, most=1 << 16)
    if not isinstance(found, dict) or {name: found.get(name) for name in _made_for(gpu)} != _made_for(gpu):
        raise ValueError("it is not for this GPU and these releases of Triton and prefixmem_fast")
    values = found.get("settings")
    if not isinstance(values, dict) or set(values) != set(SETTINGS):
        raise ValueError(f"its settings are not {', '.join(SETTINGS)}")
    for name, value in values.items():
        if type(value) is not int or value not in SETTINGS[name].candidates:
            allowed = ", ".join(map(str, SETTINGS[name].candidates))
            raise ValueError(f"its {name} = {value!r} is unknown; allowed are {allowed}")
    return Settings(**values)
