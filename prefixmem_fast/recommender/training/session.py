"""One process at work on a run: it starts in a new folder or goes on in that of a run, and finishes it once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..._files import read_json, write_text
from .config import CONFIG, RunConfig, read_run, write_options
from .folder import RunFolder, check_new
from .inputs import check_options, check_outside, check_revision, inputs_of, located

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
            if is_first_process():
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
        if (self._folder.path / self._product).exists():
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
        self._folder.remove_unfinished()
        if not (self._folder.path / CONFIG).is_file():
            write_options(self.config, self._folder.path / CONFIG, self._inputs)
        return self._folder

    def finish(self, report: dict[str, Any], save: Callable[[Path], object]) -> None:
        """Write the report, and then, all or nothing, the product: `save` is given the folder to write it into."""
        write_text(self._folder.path / CURVES, json.dumps(report, indent=1, allow_nan=False) + "\n")
        self._folder.place(self._product, save)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.close()


def process_count() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """True outside of torchrun too."""
    return int(os.environ.get("RANK", "0")) == 0


def _read_report(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"the run has finished, and its {file} cannot be read: {error}") from None
