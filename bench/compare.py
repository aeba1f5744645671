"""Whether B is slower than A: two files of rows, or two revisions of this repository run in turns.

A figure counts as slower where its median is more than 15 % above A's and its 20 % quantile is above A's 80 % quantile:
on a machine that others use too, a median alone moves by as much. Revisions get a verdict from three rounds on, as all
the times of one round may lie in a minute in which the machine was busy.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .rows import OURS, Row, describe, hardware, key_of, latest, main_times, read_rows

LIMIT = 0.15
ENOUGH_ROUNDS = 3


class Comparison(NamedTuple):
    """One figure in A and in B, in its unit; `slower` is None where the runs are too few to say."""

    what: str
    unit: str
    a: float
    b: float
    slower: bool | None

    def __str__(self) -> str:
        change = f"{self.b / self.a - 1:+.0%}" if self.a else "new"
        verdict = {True: "SLOWER", False: "ok", None: "?"}[self.slower]
        return f"{verdict:<7}{change:>6}  {self.a:.4g} to {self.b:.4g} {self.unit}  {self.what}"


def compare_files(a: Path, b: Path) -> list[Comparison]:
    """The figures that both files hold, of the latest run of each workload.

    Raises:
        ValueError: a file's line is not a row, or the files come from different machines.
    """
    rows_a, rows_b = latest(read_rows(a)), latest(read_rows(b))
    machines = [{hardware(row) for row in rows} for rows in (rows_a, rows_b)]
    if machines[0] and machines[1] and machines[0] != machines[1]:
        raise ValueError(f"{a} is of {'; '.join(machines[0])}, {b} of {'; '.join(machines[1])}: not to be compared")
    return compare(rows_a, rows_b)


def compare(a: Iterable[Row], b: Iterable[Row]) -> list[Comparison]:
    """Main times, peak memory and launches of this package's providers, where both have them."""
    left, right = _figures(a), _figures(b)
    return [_compared(key, left[key], right[key]) for key in left if key in right]


def _compared(key: tuple, a: Row, b: Row) -> Comparison:
    slower = b["p50"] > (1 + LIMIT) * a["p50"] and (b["p20"] > a["p80"] or a["unit"] != "ms")
    what = f"{a['benchmark']}, {a['provider']}, {a['metric']}: {describe(a['workload'])}"
    return Comparison(what, a["unit"], a["p50"], b["p50"], slower)


def _figures(rows: Iterable[Row]) -> dict[tuple, Row]:
    rows = list(rows)
    counts = [row for row in rows if row.get("metric") and row["unit"] != "ms"]
    return {key_of(row): row for row in (*main_times(rows), *counts) if row["provider"].startswith(OURS)}


def compare_revisions(a: str, b: str, names: list[str], selection: list[str], rounds: int) -> list[Comparison]:
    """Run the benchmarks `names` of this checkout on the libraries of two revisions, in turns; each figure is the
    round with the least median, and has no verdict where `rounds` is below ENOUGH_ROUNDS.

    Raises:
        ValueError: a revision is unknown, or one of its runs failed.
    """
    root = Path(__file__).resolve().parents[1]
    if rounds < 1:
        raise ValueError(f"--rounds {rounds} is below 1")
    with tempfile.TemporaryDirectory() as folder:
        sides = []
        for side, revision in (("a", a), ("b", b)):
            commit = _commit(root, revision)
            sides.append((_library(root, commit, Path(folder) / side), commit, Path(folder) / f"{side}.jsonl"))
        for turn in range(rounds):
            for library, commit, out in sides[:: 1 if turn % 2 == 0 else -1]:
                command = [sys.executable, "-m", "bench", "run", *names, *selection]
                command += ["--out", str(out), "--commit", commit]
                paths = [str(library), str(root), os.environ.get("PYTHONPATH", "")]
                environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
                print(f"round {turn + 1} of {rounds}: {commit[:12]}", file=sys.stderr, flush=True)
                # From the library's folder: the checkout's own prefixmem_fast must not come first.
                code = subprocess.run(command, cwd=library, env=environment, stdout=subprocess.DEVNULL).returncode
                if code:
                    raise ValueError(f"{' '.join(command[1:])} failed on {commit[:12]} with exit code {code}")
        figures = compare(*(_fastest(read_rows(out)) for _, _, out in sides))
        return figures if rounds >= ENOUGH_ROUNDS else [figure._replace(slower=None) for figure in figures]


def _commit(root: Path, revision: str) -> str:
    command = ["git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{revision!r} is neither a file of rows nor a revision that git knows in {root.name}")
    return done.stdout.strip()


def _library(root: Path, commit: str, folder: Path) -> Path:
    """The package of a revision as an installation would lay it out, without this checkout's benchmarks in it."""
    folder.mkdir()
    command = ["git", "archive", commit, "prefixmem_fast", "kernels"]
    archive = subprocess.run(command, cwd=root, check=True, capture_output=True)
    subprocess.run(["tar", "-x"], cwd=folder, input=archive.stdout, check=True)
    shutil.move(folder / "kernels", folder / "prefixmem_fast" / "kernels")
    return folder


def _fastest(rows: Iterable[Row]) -> list[Row]:
    """Of each figure the row with the least median."""
    measured = sorted((row for row in rows if "metric" in row), key=lambda row: row["p50"])
    return list({key_of(row): row for row in reversed(measured)}.values())
