"""A command again, in a process with another release of triton, which lies in a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
FOLDERS = ".venv-triton"  # a folder for each version, from `make triton-releases`


def folders_of(releases: str) -> tuple[Path, ...]:
    """`folder_of` of several, separated by commas; or one folder, whatever is in its name.

    Raises:
        ValueError: there is none of one of them, or none is named.
    """
    if releases.strip() and _holds_triton(Path(releases)):
        return (Path(releases),)
    named = [release for part in releases.split(",") if (release := part.strip())]
    if not named:
        raise ValueError(
            f"--triton = {releases!r} names no release; give folders, or versions under {FOLDERS}/, separated by commas"
        )
    return tuple({folder.resolve(): folder for folder in map(folder_of, named)}.values())


def folder_of(release: str) -> Path:
    """A folder that holds triton, given itself or as a version.

    Raises:
        ValueError: there is none.
    """
    for folder in (Path(release), Path(FOLDERS, release)):
        if _holds_triton(folder):
            return folder
    raise ValueError(
        f"--triton = {release!r} is neither a folder with triton in it nor a version under {FOLDERS}/; "
        f"make triton-releases, or pip install --no-deps --target {FOLDERS}/3.6.0 triton==3.6.0"
    )


def _holds_triton(folder: Path) -> bool:
    """Whether a whole triton is there: of an interrupted installation nothing but its folders may be."""
    try:
        return all((folder / "triton" / part / "__init__.py").is_file() for part in ("", "compiler"))
    except ValueError:  # a NUL in the name
        return False


def run_with(folder: Path, arguments: list[str]) -> int:
    """Run `prefixmem` with the triton of a folder, and with a compile cache of its own.

    Returns:
        its exit code.

    Raises:
        ValueError: nothing says where the cache could be.
    """
    folder = folder.resolve()
    cache = os.environ.get("TRITON_CACHE_DIR") or str(_home() / ".triton" / "cache")
    paths = [str(folder), os.environ.get("PYTHONPATH"), str(_PACKAGE.parent)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TRITON_CACHE_DIR": f"{cache}-{folder.name}",
    }
    return subprocess.run([sys.executable, "-m", "prefixmem_fast.cli", *arguments], env=environment).returncode


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        raise ValueError(
            "TRITON_CACHE_DIR is not set, and there is no home folder for triton's cache; set TRITON_CACHE_DIR to a "
            "folder that can be written"
        ) from None
