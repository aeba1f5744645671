"""A command again, in a process with another release of triton, which lies in a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
FOLDERS = ".venv-triton"  # a folder for each version, from `make triton-<version>`


def folder_of(release: str) -> Path:
    """A folder that holds triton, given itself or as a version.

    Raises:
        ValueError: there is none.
    """
    for folder in (Path(release), Path(FOLDERS, release)):
        if (folder / "triton" / "__init__.py").is_file():
            return folder
    raise ValueError(
        f"--triton = {release!r} is neither a folder with triton in it nor a version under {FOLDERS}/; "
        f"pip install --no-deps --target {FOLDERS}/3.6.0 triton==3.6.0"
    )


def run_with(folder: Path, arguments: list[str]) -> int:
    """Run `prefixmem` with the triton of a folder, and with a compile cache of its own.

    Returns:
        its exit code.
    """
    cache = os.environ.get("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
    paths = [str(folder.resolve()), os.environ.get("PYTHONPATH"), str(_PACKAGE.parent)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TRITON_CACHE_DIR": f"{cache}-{folder.name}",
    }
    return subprocess.run([sys.executable, "-m", "prefixmem_fast.cli", *arguments], env=environment).returncode
