"""A child process that reads files one after the other, in bounded time and memory, and says how each ended.

Its standard input has a line for each file, JSON [reader, path], and its standard output one, JSON [kind, message].
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import warnings
from pathlib import Path

import torch

from prefixmem_fast import Catalogue
from prefixmem_fast.recommender.data import load_interactions, load_item_text

ITEMS = ("10", "11", "x", "13")
CATALOGUE = Catalogue(ITEMS, torch.arange(4)[:, None])
READERS = {
    "index": Catalogue.load,
    "histories": lambda path: load_interactions(path, CATALOGUE),
    "text": lambda path: load_item_text(path, CATALOGUE),
}
SECONDS, BYTES = 10, 1 << 30  # of the processor, as others may use the machine too; who started this counts the clock


class TooLong(BaseException):
    """Not an Exception: what reads a file must not take it for a damaged file."""


def stop(*_):
    raise TooLong


def outcome(reader: str, path: str) -> tuple[str, str]:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + BYTES, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        READERS[reader](path)
        return "read", ""
    except BaseException as error:
        return type(error).__name__, str(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    warnings.simplefilter("ignore")
    import pyarrow.parquet  # noqa: F401  libraries are no part of what a file takes

    signal.signal(signal.SIGPROF, stop)
    for line in sys.stdin:
        print(json.dumps(outcome(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
