"""Run the study of arms and seeds on real Semantic IDs, or report what has been run.

    python -m bench quality list
    python -m bench quality run [--sets ...] [--arms ...] [--seeds 0,1,2] [--jobs 2]
    python -m bench quality pace [--sets ...] [--arms ...]
    python -m bench quality report

Each run is one process of minutes; finished ones are not repeated, interrupted ones go on. Rows are appended to
bench/results/quality/<set>.jsonl as they come.

The data are files of the public repository Nishikata97/CollisionGenRec, commit 505d5be3, MIT licence; the reviews
behind them are the Amazon review sets of McAuley et al., for research use. They are read from the folder that --data or
PREFIXMEM_DATA names. bench/quality/README.md says how to fill it, and each file's SHA-256 is checked.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ..real_data import VARIABLE, checked_folder
from ..rows import append_rows, read_rows
from .arms import ARMS, FIRST, PACE, SETS, fullness, recipe

RESULTS, RUNS = Path("bench/results/quality"), Path("runs/quality")


def add_arguments(option: Callable) -> None:
    option("action", choices=("list", "run", "pace", "report", "run-here", "pace-here"), help="what to do")
    option("--data", type=Path, help=f"folder of the two sets (default: what {VARIABLE} names)")
    option("--sets", default="beauty-mql4grec,scientific-rqvae_zcr", help="(default: %(default)s)")
    option("--arms", default=",".join(FIRST), help=f"of {', '.join(ARMS)} (default: %(default)s)")
    option("--seeds", default="0,1,2", help="(default: %(default)s)")
    option("--jobs", type=int, default=2, help="runs at a time, one thread each (default: %(default)s)")
    option("--turns", type=int, default=100, help="of pace: steps of each arm, in turns (default: %(default)s)")
    option("--beams", type=int, default=100, help="of the test's searches (default: %(default)s)")
    option("--examples", type=int, default=0, help="of the test; 0 for all (default: %(default)s)")
    option("--runs", type=Path, default=RUNS, help="checkpoints (default: %(default)s)")
    option("--out", type=Path, default=RESULTS, help="rows (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    sets, arms = _chosen("sets", options.sets, SETS), _chosen("arms", options.arms, ARMS)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    if options.action == "report":
        from .report import report

        return report(options.out)
    todo = [(s, a, seed) for seed in seeds for a in arms for s in sets if not _done(options, s, a, seed)]
    if options.action == "list":
        for s, a, seed in todo:
            print(f"to do  {s:<24}{a:<18}{seed}  {ARMS[a].what}")
        print(f"{len(todo)} runs to do of {len(seeds) * len(arms) * len(sets)}")
        return 0
    files = [name for s in sets for name in (SETS[s].items, SETS[s].interactions)]
    options.data = checked_folder(files, options.data)
    if options.action == "pace":
        commands = [_command("pace-here", s, options.arms, "0", options) for s in sets]
        codes = [subprocess.run(command, env=_environment()).returncode for command in commands]
        return int(any(codes))
    if options.action == "pace-here":
        return _pace_here(sets[0], arms, options)
    if options.action == "run-here":
        return _run_here(*todo[0], options) if todo else 0
    return _all(todo, options)


def _run_here(data_set: str, arm: str, seed: int, options: argparse.Namespace) -> int:
    from transformers.utils import logging

    from .run import forget, run_one

    logging.disable_progress_bar()
    row = run_one(
        data_set,
        arm,
        seed,
        data=options.data,
        runs=options.runs,
        beams=options.beams,
        examples=options.examples or None,
        quiet=not sys.stderr.isatty(),
    )
    from ..machine import run_record

    append_rows(options.out / f"{data_set}.jsonl", run_record(), [row])
    forget(options.runs, data_set, arm, seed)
    return 0


def _pace_here(data_set: str, arms: list[str], options: argparse.Namespace) -> int:
    from transformers.utils import logging

    from .pace import measure

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    timed = [arm for arm in arms if not ARMS[arm].steps_of]
    rows = measure(data_set, timed, options.data, options.turns)
    from ..machine import run_record

    append_rows(options.out / PACE, run_record(), rows)
    for row in rows:
        time = f"{row['seconds_per_step'] * 1e3:.0f} ms a step, {row['of_first']:.3f} of {timed[0]}'s"
        print(f"{data_set:<24}{row['arm']:<18}{time}")
    return 0


def _command(action: str, data_set: str, arms: str, seeds: str, options: argparse.Namespace) -> list[str]:
    module = __package__.removesuffix(".quality")  # bench, or prefixmem_fast.bench
    command = [sys.executable, "-m", module, "quality", action, "--sets", data_set, "--arms", arms, "--seeds", seeds]
    for name in ("data", "runs", "out", "turns", "beams", "examples"):
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
            command = _command("run-here", s, a, str(seed), options)
            with open(options.runs / f"{s}-{a}-{seed}.log", "a") as log:
                process = subprocess.Popen(command, env=_environment(), stdout=log, stderr=subprocess.STDOUT)
            under_way[process] = (name, time.monotonic())
            print(f"started  {name}", flush=True)
        time.sleep(1)
        for process in [p for p in under_way if p.poll() is not None]:
            name, started = under_way.pop(process)
            failed += process.returncode != 0
            state = "done" if process.returncode == 0 else f"FAILED, exit code {process.returncode}"
            print(f"{state:<9}{name}, {time.monotonic() - started:.0f} s", flush=True)
    return 1 if failed else 0


def _done(options: argparse.Namespace, data_set: str, arm: str, seed: int) -> bool:
    """Whether a row is there of this recipe, and of as many test users and beams."""
    file = options.out / f"{data_set}.jsonl"
    rows = read_rows(file, ("arm", "seed", "recipe", "test")) if file.is_file() else ()
    own = [row for row in rows if (row["arm"], row["seed"], row["recipe"]) == (arm, seed, recipe(arm, data_set))]
    wanted = options.examples or SETS[data_set].users, options.beams
    return any(fullness(row) == wanted for row in own)


def _chosen(name: str, given: str, known: dict) -> list[str]:
    chosen = [word for word in given.split(",") if word]
    for word in chosen:
        if word not in known:
            raise ValueError(f"--{name}: {word!r} is unknown; known are {', '.join(known)}")
    return chosen
