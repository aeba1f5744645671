"""Releases of other packages, those tested and those installed, and the folder of a user's files."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# Each ran the tests of huggingface/, recommender/ and the command line; triton 3.9.0 ran those of the kernels.
TESTED = {
    "torch": ("2.13.0", "2.14.1"),
    "triton": ("3.8.0", "3.9.0"),
    "transformers": ("4.57.1", "5.23.0", "5.24.0"),
    "accelerate": ("1.15.0",),
    "peft": ("0.21.2",),
}


def installed_version(package: str) -> str | None:
    """The installed version of a distribution, without a local part such as ``+cu128``; None where it is absent."""
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return None


def cache_folder() -> Path | None:
    """Where this package keeps files of a user, as the XDG base directory specification says; None without a home."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():
        try:
            cache = Path.home() / ".cache"
        except RuntimeError:
            return None
    return cache / "prefixmem_fast" if cache.is_absolute() else None
