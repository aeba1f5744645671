"""The folder of a run: one process at a time works in it, and it removes nothing that the run has not written.

run.json               says that the folder is a run's, and which command started it; made once, locked while it works
checkpoint-N/run.json  says the same of a checkpoint, and, once that is whole, the size and SHA-256 of each of its files
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..._files import check_writable, flush, flush_folder, read_json, remove_leftovers, sha256_of, write_text
from ..._version import __version__

MARKER = "run.json"
# What started a run, and the folder in it that it is for.
TRAIN, CLASSIFICATION = "train", "pretrain classification"
MODEL, ENCODER = "model", "encoder"
_FORMAT = "prefixmem run"


class RunFolder:
    """The folder of a run, locked by this process until `close`, or by nobody.

    Attributes:
        path: absolute.
        kind: "train", or "pretrain" and its method.
        run: identifies the run among others, wherever its folder is moved to.
        options: a digest of its options, kept with what is saved; None where they do not matter.
    """

    def __init__(self, path: Path, kind: str, run: str, lock: int | None = None) -> None:
        self.path, self.kind, self.run, self._lock = path, kind, run, lock
        self.options: str | None = None

    @classmethod
    def start(cls, path: str | Path, kind: str) -> RunFolder:
        """Make the folder, and mark it as a new run's.

        Raises:
            ValueError, OSError: it holds something already, or cannot be written.
        """
        check_new(path)
        path = Path(path).resolve()
        path.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(path / MARKER, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        except FileExistsError:
            raise ValueError(f"out = {path}: another run has just started in it; give another folder") from None
        _lock(lock, path)
        values = {"format": _FORMAT, "kind": kind, "run": uuid.uuid4().hex, "package_version": __version__}
        os.write(lock, (json.dumps(values, indent=1) + "\n").encode())
        os.fsync(lock)
        return cls(path, kind, values["run"], lock)

    @classmethod
    def resume(cls, path: str | Path, kind: str) -> RunFolder:
        """Lock the folder of a run to go on with it.

        Raises:
            ValueError, OSError: no run is there, another command started it, or another process works in it.
        """
        folder = cls.read(path)
        if folder.kind != kind:
            raise ValueError(
                f"out = {path} was started by prefixmem {command_of(folder.kind)}; go on with it by that command"
            )
        folder._lock = os.open(folder.path / MARKER, os.O_RDWR)
        _lock(folder._lock, folder.path)
        return folder

    @classmethod
    def read(cls, path: str | Path) -> RunFolder:
        """The folder of a run, as it stands.

        Raises:
            ValueError, OSError: no run is there, or its mark is damaged.
        """
        file = Path(path).resolve() / MARKER
        if not file.is_file():
            raise FileNotFoundError(f"{path} holds no run: {MARKER} is not there; give a folder of prefixmem train")
        values = marks_of(file.parent)
        if not isinstance(values.get("kind"), str):
            raise ValueError(f"{file} is damaged; it does not say what started the run")
        return cls(file.parent, values["kind"], values["run"])

    def close(self) -> None:
        """Let another process work in the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Checkpoints

    def begin_checkpoint(self, step: int) -> None:
        """Make the folder of a checkpoint; one that this run has written before is replaced.

        Raises:
            ValueError: something else has its name.
        """
        folder = self.path / f"checkpoint-{step}"
        if folder in dict(self._own()):
            self._remove(folder)
        if os.path.lexists(folder):
            raise ValueError(f"{folder} is there, and this run has not written it; move it away and resume the run")
        unmarked = self._unfinished(folder.name)
        unmarked.mkdir()
        self._mark(unmarked, {"step": step})
        os.rename(unmarked, folder)  # a kill leaves no folder of that name without a mark

    def end_checkpoint(self, step: int) -> None:
        """Say that a checkpoint is whole."""
        folder = self.path / f"checkpoint-{step}"
        self._mark(folder, {"step": step, "files": digests_of(folder)})

    def rotate(self, best: str | None, keep: int = 2) -> None:
        """Remove all checkpoints of this run but the newest `keep`, and the best one."""
        for folder in self._checkpoints()[keep:]:
            if best is None or folder.name != Path(best).name:
                self._remove(folder)

    def last_checkpoint(self) -> Path | None:
        """The newest whole checkpoint; a newer one that is damaged is named in a warning.

        Raises:
            ValueError: there are checkpoints, and none is sound.
        """
        problems = []
        for folder in self._checkpoints():
            self.check_options(folder)
            problem = self.problem_of(folder)
            if problem is None:
                if problems:
                    warnings.warn(f"{'; '.join(problems)}; going on from {folder.name}", stacklevel=2)
                return folder
            problems.append(problem)
        if problems:
            raise ValueError(f"{'; '.join(problems)}; no sound checkpoint is left, so start again in another folder")
        return None

    def check_options(self, saved: Path) -> None:
        """Hold the options against those with which a checkpoint or the product was saved.

        Raises:
            ValueError: they are others.
        """
        before = marks_of(saved).get("options")
        if None not in (before, self.options) and before != self.options:
            raise ValueError(f"the options in {self.path} have changed since {saved} was saved; give the old ones")

    def problem_of(self, checkpoint: Path) -> str | None:
        """What is wrong with the files of a checkpoint, or of the product, or None."""
        try:
            expected = marks_of(checkpoint).get("files")
        except (OSError, ValueError) as error:
            return str(error)
        if expected is None:
            return f"{checkpoint} is not whole"
        for name, digest in expected.items():
            file = checkpoint / name
            if not file.is_file():
                return f"{checkpoint} lacks {name}"
            if file.stat().st_size != digest["bytes"]:
                return f"{file} has {file.stat().st_size} bytes of {digest['bytes']}"
            if sha256_of(file) != digest["sha256"]:
                return f"{file} is damaged: its SHA-256 is another"
        return None

    def place(self, name: str, save: Callable[[Path], object], **more: str) -> None:
        """Have `save(folder)` write a folder, which gets its name when it is whole.

        Args:
            more: is kept in its mark.

        Raises:
            ValueError: something has that name.
        """
        temporary, target = self._unfinished(name), self.path / name
        if os.path.lexists(target):
            raise ValueError(f"{target} is there already; move it away and resume the run")
        save(temporary)
        self._mark(temporary, {"files": digests_of(temporary), **more})
        mode = (temporary / MARKER).stat().st_mode & 0o777  # safetensors writes for the owner alone
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(mode)
        flush_folder(temporary)
        os.rename(temporary, target)
        flush(self.path)

    def remove_unfinished(self) -> None:
        """Remove what a kill has left of a checkpoint, or of the final model, while it was being saved."""
        for folder, marks in self._own():
            if "files" not in marks:
                shutil.rmtree(folder)
        for folder in self.path.glob(self._unfinished("*").name):
            shutil.rmtree(folder)
        for folder in (self.path, *self._checkpoints()):
            remove_leftovers(folder, r"config\.yaml|curves\.json|run\.json")

    def _unfinished(self, name: str) -> Path:
        return self.path / f".{name}-{self.run}"

    def _checkpoints(self) -> list[Path]:
        """Those of this run, whole when they were written; the newest first."""
        whole = [folder for folder, marks in self._own() if "files" in marks]
        return sorted(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), reverse=True)

    def _own(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """The checkpoints of this run, whole or not, with their marks."""
        for folder in [*self.path.glob("checkpoint-*")]:
            if folder.is_symlink() or not folder.is_dir():
                continue
            try:
                marks = marks_of(folder)
            except (OSError, ValueError):
                continue
            if marks["run"] == self.run and folder.name == f"checkpoint-{marks.get('step')}":  # and is no copy
                yield folder, marks

    def _mark(self, folder: Path, more: dict[str, Any]) -> None:
        marks = {"format": _FORMAT, "run": self.run, "options": self.options, **more}
        write_text(folder / MARKER, json.dumps(marks, indent=1) + "\n")

    def _remove(self, folder: Path) -> None:
        """Remove what the run has written into a checkpoint; what others have put there stays, with the folder."""
        files = marks_of(folder).get("files")
        if files is None:
            shutil.rmtree(folder)
            return
        for name in files:
            if (folder / name).parent.resolve().is_relative_to(folder):  # and not where a link leads
                (folder / name).unlink(missing_ok=True)
        (folder / MARKER).unlink()
        for inner in sorted({parent for name in (MARKER, *files) for parent in Path(name).parents}, reverse=True):
            try:
                (folder / inner).rmdir()
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.ENOENT, errno.ENOTDIR):
                    raise


def check_new(path: str | Path) -> None:
    """Refuse a folder in which no run can start.

    Raises:
        ValueError, OSError: it holds something, is no folder, or cannot be written.
    """
    if not str(path):
        raise ValueError("out = '' names no folder; give one for the run")
    folder = Path(path)
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise ValueError(f"out = {str(path)!r} has bytes that are no text in its name; give another folder") from None
    if (folder / MARKER).is_file():
        RunFolder.read(folder)  # or says what is wrong with it
        raise ValueError(f"out = {path} holds a run already; --resume goes on with it, or give another folder")
    if folder.is_dir():
        held = sorted(file.name for file in folder.iterdir())
        if held:
            more = f" and {len(held) - 1} more" if len(held) > 1 else ""
            raise ValueError(f"out = {path} is not empty: {held[0]}{more} is in it; give an empty or a new folder")
    elif os.path.lexists(folder):
        raise NotADirectoryError(f"out = {path} is no folder; give an empty or a new one")
    check_writable(folder)


def digests_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file in a folder and the folders in it, by its path from there; marks are left out."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / MARKER)
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files
    }


def marks_of(folder: Path) -> dict[str, Any]:
    """What the mark in a folder says: that of another user perhaps, so that no file that it names lies outside.

    Raises:
        OSError, ValueError: there is none, or it is damaged.
    """
    file = folder / MARKER
    if file.is_file() and not file.stat().st_size:
        raise ValueError(f"{file} is empty: the run was killed as it started; remove the folder, and start it again")
    try:
        values = read_json(file)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise ValueError(f"{file} is not of prefixmem, or damaged")
    if not re.fullmatch("[0-9a-f]{32}", str(values.get("run"))):
        raise ValueError(f"{file} is damaged: it names no run")
    files = values.get("files", {})
    if not isinstance(files, dict) or not all(map(_is_entry, files, files.values())):
        raise ValueError(f"{file} is damaged: its files are not those of a checkpoint with their sizes and SHA-256")
    return values


def _is_entry(name: str, entry: Any) -> bool:
    """Whether it is one of `digests_of`."""
    parts = Path(name).parts
    inside = name and "\0" not in name and ".." not in parts and not Path(name).is_absolute()
    return bool(inside) and isinstance(entry, dict) and set(entry) == {"bytes", "sha256"}


def _lock(file: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # a system without such locks
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise ValueError(f"another process works in {path}; wait for it, or give another folder") from None
    except OSError as error:
        warnings.warn(f"{path} cannot be locked ({error}); start no other process in it", stacklevel=2)


def command_of(kind: str) -> str:
    """The command that starts runs of a kind."""
    method = kind.partition(" ")[2]
    return f"pretrain --method {method}" if method else kind
