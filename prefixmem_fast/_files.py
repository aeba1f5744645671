"""Files on disk: written whole or not at all, known by their contents, and read with suspicion."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from ._inputs import unique_keys

LOCK_SECONDS = 60.0  # the longest wait for others who write into a folder
LOCK_QUIET_SECONDS = 5.0  # of it, before a warning
MOST_TEXT_BYTES = 1 << 28  # of a JSON file: a vocabulary of millions of tokens fits


def write_file(file: Path, write: Callable[[str], object]) -> None:
    """Have `write(path)` fill a file in a temporary folder beside `file`, then rename it.

    A reader sees the old file or the new, after a loss of power too. A process that is killed leaves the folder
    ``.NAME.tmp-xxxxxxxx``, and in it whatever `write` made. An error comes before the rename alone; where the folder
    cannot be flushed after it, the file is in place all the same.
    """
    folder = tempfile.mkdtemp(dir=file.parent, prefix=f".{file.name}.tmp-")
    try:
        temporary = Path(folder) / file.name
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777
        write(str(temporary))
        os.chmod(temporary, mode)  # of a plain new file, whatever `write` makes of it
        flush(temporary)
        os.replace(temporary, file)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        flush(file.parent)


def check_writable(folder: Path) -> None:
    """Raises OSError where no file can be made in a folder, or the folder itself cannot."""
    present = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not present.is_dir():
        raise NotADirectoryError(f"{present} is no folder, so {folder} cannot be made")
    try:
        with tempfile.TemporaryFile(dir=present):
            pass
    except OSError as error:
        raise type(error)(error.errno, f"nothing can be written to {present}: {error.strerror}") from None


def write_text(file: Path, text: str) -> None:
    """`write_file` of a text, in UTF-8."""
    write_file(file, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def remove_leftovers(folder: Path, names: str) -> None:
    """Remove what a killed `write_file` of a file in `folder` has left; nobody else may be writing there.

    Args:
        names: a regular expression of the files' names.
    """
    for name in os.listdir(folder):
        match, path = re.fullmatch(rf"\.({names})\.tmp-[a-z0-9_]{{8}}", name), folder / name
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        for inner in os.listdir(path):
            if inner == match[1] or re.fullmatch(r"\.tmp[A-Za-z0-9]{6}", inner):  # the latter is of safetensors
                (path / inner).unlink(missing_ok=True)
        if not os.listdir(path):
            path.rmdir()


def flush_folder(folder: Path) -> None:
    """`flush` of all files in a folder, and of the folders."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def flush(path: Path) -> None:
    """Have a file or a folder on the disk itself."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def size_of(file: Path) -> int:
    """The bytes of a regular file, or of one that a link leads to.

    Raises:
        ValueError: it is something else; opening a pipe would wait for ever.
        OSError: it is not there, or cannot be reached.
    """
    found = os.stat(file)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no regular file; give a folder of plain files, or of links to some")
    return found.st_size


def read_json(file: Path, kind: str = "key", most: int | None = MOST_TEXT_BYTES) -> Any:
    """What a JSON file holds.

    Args:
        kind: what the keys of its objects are called in errors.
        most: bytes that it may have; None for any number.

    Raises:
        ValueError: it is no regular file, above `most`, not JSON in UTF-8, nested too deeply, or holds a NaN or one key
            twice.
        OSError: it cannot be read.
    """
    size = size_of(file)
    if most is not None and size > most:
        raise ValueError(f"it has {size} bytes; allowed are {most}")
    try:
        text = file.read_text(encoding="utf-8-sig")
        return json.loads(text, object_pairs_hook=partial(unique_keys, kind=kind), parse_constant=_constant)
    except RecursionError:
        raise ValueError("it is not JSON (nested too deeply)") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"it is not JSON ({error})") from None
    except ValueError as error:  # a key that is there twice, a NaN, or a number of thousands of digits
        raise ValueError(f"it is not as expected ({error})") from None


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """One process or thread at a time; another one waits. False where the system has no such lock for a folder.

    Raises:
        TimeoutError: somebody else has held the folder for `LOCK_SECONDS`.
    """
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield False
        return
    try:
        start, warned = time.monotonic(), False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
                break
            except BlockingIOError:
                waited = time.monotonic() - start
            except OSError:  # some network file systems
                held = False
                break
            if waited >= LOCK_SECONDS:
                raise TimeoutError(
                    f"another process holds {folder}: it could not be written into for {LOCK_SECONDS:g} s; wait for "
                    "that process or end it, and try again"
                )
            if waited >= LOCK_QUIET_SECONDS and not warned:
                warned = True
                warnings.warn(
                    f"another process holds {folder}; waiting until {LOCK_SECONDS:g} s have passed", stacklevel=3
                )
            time.sleep(0.02)
        try:
            yield held
        finally:
            if held:
                fcntl.flock(handle, fcntl.LOCK_UN)  # a forked child may keep the handle open
    finally:
        os.close(handle)


def sha256_of(file: str | Path) -> str:
    """The SHA-256 of a file's contents, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
