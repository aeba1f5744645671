"""Run the study of arms x seeds on real Semantic IDs, or report what has been run.

    python -m bench quality list
    python -m bench quality run [--sets ...] [--arms ...] [--seeds 0,1,2] [--jobs 2]
    python -m bench quality pace [--sets ...] [--arms ...]
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

from .arms import ARMS, FIRST, PACE, SETS, recipe

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "quality"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench quality", description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("list", "run", "pace", "report", "one", "one-pace"), help="what to do")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the two sets")
    parser.add_argument("--sets", default="beauty-mql4grec,scientific-rqvae_zcr", help="(default: %(default)s)")
    parser.add_argument("--arms", default=",".join(FIRST), help=f"of {', '.join(ARMS)} (default: %(default)s)")
    parser.add_argument("--seeds", default="0,1,2", help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of pace: turns of each arm (default: %(default)s)")
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
    if options.action == "pace":
        commands = [_command("one-pace", s, options.arms, "0", options) for s in sets]
        codes = [subprocess.run(command, cwd=ROOT, env=_environment()).returncode for command in commands]
        return int(any(codes))
    if options.action == "one-pace":
        return _pace(sets[0], arms, options)
    if options.action == "one":
        (s, a, seed), out = todo[0] if todo else (None, None, None), options.out
        if s is None:
            return 0
        return _one(s, a, seed, options, out)
    return _all(todo, options)


def _one(data_set: str, arm: str, seed: int, options: argparse.Namespace, out: Path) -> int:
    from transformers.utils import logging

    from ..rows import append_rows
    from .run import run_one

    logging.disable_progress_bar()
    row = run_one(
        data_set, arm, seed, data=options.data, runs=options.runs, beams=options.beams,
        examples=options.examples or None, quiet=not sys.stderr.isatty(),
    )  # fmt: skip
    append_rows(out / f"{data_set}.jsonl", [row], {})
    return 0


def _pace(data_set: str, arms: list[str], options: argparse.Namespace) -> int:
    from transformers.utils import logging

    from ..rows import append_rows
    from .pace import measure

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    timed = [arm for arm in arms if not ARMS[arm].steps_of]
    rows = measure(data_set, timed, options.data, options.rounds)
    append_rows(options.out / PACE, rows, {})
    for row in rows:
        print(f"{data_set:<24}{row['arm']:<18}{row['seconds_per_step'] * 1e3:.0f} ms a step")
    return 0


def _command(action: str, data_set: str, arms: str, seeds: str, options: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-m", "bench", "quality", action, "--sets", data_set, "--arms", arms, "--seeds", seeds]
    for name in ("data", "runs", "out", "rounds", "beams", "examples"):
        command += [f"--{name}", str(getattr(options, name))]
    return command


def _environment() -> dict[str, str]:
    """One thread a run, and memory that is kept: returning large tensors to the system costs page faults."""
    settings = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
    return {**os.environ, **settings}


def _all(todo: list[tuple[str, str, int]], options: argparse.Namespace) -> int:
    """Several processes side by side; the runs that say which examples are hard come first."""
    under_way: dict[subprocess.Popen, tuple[str, float]] = {}
    failed = 0
    options.runs.mkdir(parents=True, exist_ok=True)
    while todo or under_way:
        while todo and len(under_way) < options.jobs:
            s, a, seed = todo.pop(0)
            name = f"{s} {a} {seed}"
            command = _command("one", s, a, str(seed), options)
            with open(options.runs / f"{s}-{a}-{seed}.log", "a") as log:
                process = subprocess.Popen(command, cwd=ROOT, env=_environment(), stdout=log, stderr=subprocess.STDOUT)
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
