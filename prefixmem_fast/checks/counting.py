"""`traffic.py` as a command: counted in a process that interprets the kernels, with its progress, and printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from .._progress import Progress
from .._triton import interpreting


def count_traffic(as_json: bool) -> int:
    """Count the bytes of every kernel and print them, as a table or a line of JSON a kernel.

    Returns:
        the exit code: 1 where a kernel exceeds its limit.
    """
    if not interpreting():  # triton reads the variable when it is imported, which may have happened
        command = [sys.executable, "-m", "prefixmem_fast.cli", "verify", "--traffic", *["--json"] * as_json]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
    from . import traffic

    counts = []
    with Progress("traffic", len(traffic.COUNTS), "kernels") as progress:
        for count in traffic.COUNTS:
            counts.append(count())
            progress.update()
            if as_json:
                print(json.dumps(counts[-1].as_row()), flush=True)
    if not as_json:
        print(traffic.table(counts))
    return 1 if any(count.excess for count in counts) else 0
