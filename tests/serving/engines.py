"""Engines for tests, in a module that their process can import in a moment: no torch, no transformers."""

import os
import select
import signal
import time
from pathlib import Path

from prefixmem_fast.serving.engine import Beam, Found, Search

SECONDS = 20  # longer than anything here takes
SIZES = (4, 5, 6)
LIMITS = {"min_history": 1, "max_history": 5, "max_beams": 7}
# The first Semantic ID of a history says what happens: items 0, 2, 3 and 4 of tests.helpers.examples.
WAIT, DIE, FAIL, SHORT = (1, 3, 4), (3, 3, 3), (1, 3, 0), (1, 0, 1)


class Says:
    """Finds what it was asked: the last Semantic ID of the history, `num_beams` times.

    Args:
        folder: with the pipes `entered`, written when a search waits, and `go`, which it waits for.
    """

    def __init__(self, folder):
        self.folder = Path(folder)

    def search(self, requests):
        return [self._one(request) for request in requests][
            : len(requests) - any(r.history[0] == SHORT for r in requests)
        ]

    def _one(self, request):
        first, last = request.history[0], request.history[-1]
        if first == WAIT:
            (self.folder / "entered").write_text(f"{os.getpid()}\n")
            (self.folder / "go").read_text()
        if first == DIE:
            os.kill(os.getpid(), signal.SIGKILL)
        if first == FAIL:
            raise RuntimeError("out of luck")
        beams = tuple((Beam(last[: level + 1], -0.5 * (level + 1)),) for level in range(len(last)))
        found = tuple(Found((f"number {i}", "\ud800<b>"), last, -1.5 - i) for i in range(request.num_beams))
        return Search(beams, found)

    def describe(self):
        named = {"engine": "says", "version": "1", "model": "none", "encoder": None, "items": 8, "levels": 3}
        return {**named, "codebook_sizes": SIZES, "limits": LIMITS}


def pipes(folder):
    for name in ("entered", "go"):
        os.mkfifo(Path(folder) / name)
    return Path(folder)


def entered(folder):
    """Wait until a search waits; its process."""
    pipe = os.open(Path(folder) / "entered", os.O_RDONLY | os.O_NONBLOCK)
    try:
        told, _, _ = select.select([pipe], [], [], SECONDS)
        assert told, "no search waits"
        return int(os.read(pipe, 100))
    finally:
        os.close(pipe)


def go(folder):
    """Let a search that waits go on."""
    end = time.monotonic() + SECONDS
    while True:
        try:
            pipe = os.open(Path(folder) / "go", os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError:  # nobody reads yet
            assert time.monotonic() < end, "no search waits"
            time.sleep(0.002)
    os.write(pipe, b"go")
    os.close(pipe)


def says(folder):
    return Says(folder)


def loads_never(folder):
    raise ValueError("the folder is empty")


def dies_while_loading(folder):
    os.kill(os.getpid(), signal.SIGKILL)


def loads_once(folder):
    """The first process has a model, the second one has lost it, the third one has it back."""
    mark = Path(folder) / "starts"
    starts = int(mark.read_text()) if mark.exists() else 0
    mark.write_text(str(starts + 1))
    if starts == 1:
        raise ValueError("the disk is away")
    return Says(folder)


def waits_while_loading(folder):
    (Path(folder) / "entered").write_text(f"{os.getpid()}\n")
    (Path(folder) / "go").read_text()
    return Says(folder)
