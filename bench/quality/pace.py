"""Seconds of a training step of each arm, taken in turns in one process.

Runs of the study share their machine with each other, so their own clocks say little; equal time is counted with these.
"""

from __future__ import annotations

import statistics
import tempfile
from operator import truediv
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prefixmem_fast.recommender.training.run import train

from .arms import ARMS
from .run import arm_of

STEPS = 25  # of warm-up, and as many that are timed


def measure(data_set: str, arms: list[str], data: Path, rounds: int) -> list[dict[str, Any]]:
    """A row an arm: the median of some rounds, in each of which every arm has its turn.

    The machine's speed drifts meanwhile, so `of_first` is the median of the ratios to the first arm's turn beside it.
    """
    prepared = {arm: arm_of(arm, data_set, data, seed=0) for arm in arms}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for arm in tqdm(arms * rounds, desc=f"pace on {data_set}"):
        config, loaded, add_arm = prepared[arm]
        config = config.replace(steps=2 * STEPS, eval_every=STEPS, log_every=STEPS, eval_users=1, keep_best=False)
        with tempfile.TemporaryDirectory() as folder:
            report = train(config, Path(folder) / "run", quiet=True, data=loaded, add_arm=add_arm)
        warm, end = (validation["seconds"] for validation in report["validation"])
        seconds[arm].append((end - warm) / STEPS)
    return [
        {
            "set": data_set,
            "arm": arm,
            "what": ARMS[arm].what,
            "seconds_per_step": round(statistics.median(rounds_of_arm), 5),
            "of_first": round(statistics.median(map(truediv, rounds_of_arm, seconds[arms[0]])), 4),
            "rounds": [round(of_round, 5) for of_round in rounds_of_arm],
        }
        for arm, rounds_of_arm in seconds.items()
    ]
