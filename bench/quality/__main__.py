"""Run the study of arms x seeds on real Semantic IDs, or report what has been run.

    python -m bench quality list
    python -m bench quality run [--sets ...] [--arms ...] [--seeds 0,1,2] [--jobs 2]
    python -m bench quality report

Each run is one process of minutes; finished ones are not repeated, interrupted ones go on. Rows are appended to
bench/results/quality/<set>.jsonl as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from .arms import ARMS, FIRST, SETS, recipe

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "quality"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench quality", description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("list", "run", "report", "one"), help="what to do")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the two sets")
    parser.add_argument("--sets", default="beauty-mql4grec,scientific-rqvae_zcr", help="(default: %(default)s)")
    parser.add_argument("--arms", default=",".join(FIRST), help=f"of {', '.join(ARMS)} (default: %(default)s)")
    parser.add_argument("--seeds", default="0,1,2", help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default: %(default)s)")
    parser.add_argument("--beams", type=int, default=100, help="of the test's searches (default: %(default)s)")
    parser.add_argument("--examples", type=int, default=3000, help="of the test; 0 for all (default: %(default)s)")
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "quality", help="checkpoints (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="rows (default: %(default)s)")
    options = parser.parse_args(arguments)
    sets, arms = _chosen("sets", options.sets, SETS), _chosen("arms", options.arms, ARMS)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    if options.action == "report":
        from .report import report

        return report(options.out)
    todo = [(s, a, seed) for seed in seeds for a in arms for s in sets if not _done(options.out, s, a, seed)]
    if options.action == "list":
        for s, a, seed in todo:
            print(f"to do  {s:<24}{a:<18}{seed}  {ARMS[a].what}")
        print(f"{len(todo)} runs to do of {len(seeds) * len(arms) * len(sets)}")
        return 0
    if not options.data.is_dir():
        print(f"{options.data} is not there; --data names the folder of the two sets")
        return 2
    if options.action == "one":
        (s, a, seed), out = todo[0] if todo else (None, None, None), options.out
        if s is None:
            return 0
        return _one(s, a, seed, options, out)
    return _all(todo, options)


def _one(data_set: str, arm: str, seed: int, options: argparse.Namespace, out: Path) -> int:
    from transformers.utils import logging

    from ..measure import append_rows
    from .run import run_one

    logging.disable_progress_bar()
    row = run_one(
        data_set, arm, seed, data=options.data, runs=options.runs, beams=options.beams,
        examples=options.examples or None, quiet=not sys.stderr.isatty(),
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    append_rows(out / f"{data_set}.jsonl", [row], {})
    return 0


def _all(todo: list[tuple[str, str, int]], options: argparse.Namespace) -> int:
    """Several processes side by side; the runs that say which examples are hard come first."""
    settings = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
    under_way: dict[subprocess.Popen, tuple[str, float]] = {}
    failed = 0
    options.runs.mkdir(parents=True, exist_ok=True)
    while todo or under_way:
        while todo and len(under_way) < options.jobs:
            s, a, seed = todo.pop(0)
            name = f"{s} {a} {seed}"
            command = [
                sys.executable, "-m", "bench", "quality", "one", "--sets", s, "--arms", a, "--seeds", str(seed),
                "--data", str(options.data), "--runs", str(options.runs), "--out", str(options.out),
                "--beams", str(options.beams), "--examples", str(options.examples),
            ]  # fmt: skip
            with open(options.runs / f"{s}-{a}-{seed}.log", "a") as log:
                process = subprocess.Popen(
                    command, cwd=ROOT, env={**os.environ, **settings}, stdout=log, stderr=subprocess.STDOUT
                )
            under_way[process] = (name, time.monotonic())
            print(f"started  {name}", flush=True)
        time.sleep(1)
        for process in [p for p in under_way if p.poll() is not None]:
            name, started = under_way.pop(process)
            failed += process.returncode != 0
            state = "done" if process.returncode == 0 else f"FAILED, exit code {process.returncode}"
            print(f"{state:<9}{name}, {time.monotonic() - started:.0f} s", flush=True)
    return 1 if failed else 0


def _done(out: Path, data_set: str, arm: str, seed: int) -> bool:
    file = out / f"{data_set}.jsonl"
    rows = map(json.loads, file.read_text().splitlines()) if file.is_file() else ()
    return any((r["arm"], r["seed"], r["recipe"]) == (arm, seed, recipe(arm, data_set)) for r in rows)


def _chosen(name: str, given: str, known: dict) -> list[str]:
    chosen = [part for part in given.split(",") if part]
    for part in chosen:
        if part not in known:
            raise SystemExit(f"--{name}: {part!r} is unknown; known are {', '.join(known)}")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
