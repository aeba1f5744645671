"""Progress of long work on standard error: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

_SECONDS = 10.0  # between two lines, at least


def say(line: str) -> None:
    """Print a line on standard error, where there is one that takes it: work goes on without."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)


def on_a_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


class Progress:
    """A context manager whose `update` is told what has been done.

    Args:
        what: is done.
        total: how much of it there is; None where nobody knows.
        unit: what `total` counts.
        quiet: show nothing.
    """

    def __init__(self, what: str, total: int | None, unit: str = "", *, quiet: bool = False) -> None:
        self.what, self.total, self.unit, self.quiet = what, total, unit, quiet
        self._done, self._said = 0, time.monotonic()
        self._bar = None
        if not quiet and on_a_terminal():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=what, unit=f" {unit}", delay=1)

    def update(self, done: int = 1, **figures: Any) -> None:
        self._done += done
        if self._bar is not None:
            self._bar.set_postfix(figures, refresh=False)
            self._bar.update(done)
        elif not self.quiet and time.monotonic() - self._said >= _SECONDS:
            self._said = time.monotonic()
            shown = "".join(f", {name} {value}" for name, value in figures.items())
            of = "" if self.total is None else f" of {self.total}"
            say(f"{self.what}: {self._done}{of} {self.unit}{shown}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within it transformers shows neither its bars of loading and writing weights nor warnings."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
