"""One process at work on a run: it starts in a new folder or goes on in that of a run, and finishes it once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..._files import read_json, sha256_of, write_text
from .config import CONFIG, RunConfig, read_run, write_options
from .folder import RunFolder, check_new, marks_of
from .inputs import INPUTS, check_options, check_outside, check_revision, inputs_of, located

CURVES = "curves.json"


class Session:
    """A context manager, within which no other process works on the run.

    Args:
        config: the options.
        out: the folder.
        kind: the command, see `RunFolder`.
        product: the folder in it whose presence says that the run has finished.
        resume: go on with the run in the folder.

    Attributes:
        config: the options, with the places at which the files are now.
        report: of a run that has finished already, or None.

    Raises:
        OSError, ValueError: see `RunFolder`; or the options or the files are not those that the run was started with.
    """

    def __init__(self, config: RunConfig, out: str | Path, kind: str, product: str, resume: bool) -> None:
        self.config, self.report = config, None
        self._out, self._kind, self._product = Path(out), kind, product
        self._folder: RunFolder | None = None
        check_outside(config, self._out)
        if not resume:
            self._inputs = {}
            if is_first_process():  # which writes them
                check_new(out)
                self._inputs = inputs_of(config, self._out)
            return
        self._folder = RunFolder.resume(out, kind) if is_first_process() else RunFolder.read(out)
        try:
            self._go_on()
        except BaseException:
            self._folder.close()
            raise

    def _go_on(self) -> None:
        file = self._folder.path / CONFIG
        if not file.is_file():  # killed before it was written
            self._inputs = inputs_of(self.config, self._out)
            return
        options, self._inputs = read_run(file)
        check_options(self.config, RunConfig(**options), self._inputs, self._folder.path)
        self._folder.options = options_digest(options)
        product = self._folder.path / self._product
        if product.exists():
            self._check_product(product)
            self.report = _read_report(self._folder.path / CURVES)
        self.config = located(self.config, self._inputs, self._folder.path)

    def begin(self, revision: str | None = None) -> RunFolder:
        """The folder, ready for training: call it when all that can be wrong with the options has been checked.

        Args:
            revision: of the model, if it came from a hub.

        Raises:
            ValueError: the run was started with another revision.
        """
        check_revision(self._inputs, revision, str(self.config.model))
        if not is_first_process():
            self._folder = self._folder or RunFolder(self._out.resolve(), self._kind, "")
            return self._folder
        if self._folder is None:
            self._folder = RunFolder.start(self._out, self._kind)
        self._folder.options = self._folder.options or options_digest(self.config.to_dict())
        self._folder.remove_unfinished()
        if not (self._folder.path / CONFIG).is_file():
            write_options(self.config, self._folder.path / CONFIG, self._inputs)
        return self._folder

    def finish(self, report: dict[str, Any], save: Callable[[Path], object]) -> None:
        """Write the report, and then, all or nothing, the product: `save` is given the folder to write it into."""
        curves = self._folder.path / CURVES
        write_text(curves, json.dumps(report, indent=1, allow_nan=False) + "\n")
        self._folder.place(self._product, save, report=sha256_of(curves))

    def _check_product(self, product: Path) -> None:
        """Refuse a finished run whose product or report is not what it has written."""
        self._folder.check_options(product)
        problem = self._folder.problem_of(product)
        curves = product.parent / CURVES
        if problem is None and curves.is_file() and sha256_of(curves) != marks_of(product).get("report"):
            problem = f"{curves} is not the report of this run"
        if problem is not None:
            raise ValueError(f"the run has finished, and {problem}; bring the old files back, or train anew")

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.close()


def process_count() -> int:
    """How many processes torchrun has started; 1 without it.

    Raises:
        ValueError: WORLD_SIZE is no number of processes.
    """
    return _number("WORLD_SIZE", "1", least=1)


def is_first_process() -> bool:
    """True outside of torchrun too.

    Raises:
        ValueError: WORLD_SIZE or RANK is no number.
    """
    return process_count() == 1 or _number("RANK", "0", least=0) == 0


def options_digest(options: dict[str, Any]) -> str:
    """Of the options in config.yaml but the places of files, whose contents are compared."""
    options = {name: value for name, value in options.items() if name not in INPUTS}
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()


def _number(name: str, default: str, least: int) -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name} = {text!r} in the environment is no whole number of {least} or more; unset it")
    return int(text)


def _read_report(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"the run has finished, and its {file} cannot be read: {error}") from None
