"""Seconds of a training step of each arm, taken in turns in one process.

Runs of the study share their machine with each other, so their own clocks say little; equal time is counted with these.
"""

from __future__ import annotations

import statistics
from operator import truediv
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prefixmem_fast.recommender.training.arms import add_arm as add_arm_of_config
from prefixmem_fast.recommender.training.pace import seconds_of_steps
from prefixmem_fast.recommender.training.run import Run, prepare

from .arms import ARMS
from .run import arm_of


def measure(data_set: str, arms: list[str], data: Path, steps: int) -> list[dict[str, Any]]:
    """A row an arm: the median time of its steps, and of their ratios to the first arm's step beside them."""
    runs = {arm: _prepared(arm, data_set, data) for arm in arms}
    with tqdm(total=steps, desc=f"pace on {data_set}") as progress:
        seconds = seconds_of_steps(runs, steps, turn=progress.update)
    return [
        {
            "set": data_set,
            "arm": arm,
            "what": ARMS[arm].what,
            "seconds_per_step": round(statistics.median(of_arm), 5),
            "of_first": round(statistics.median(map(truediv, of_arm, seconds[arms[0]])), 4),
            "steps": steps,
        }
        for arm, of_arm in seconds.items()
    ]


def _prepared(arm: str, data_set: str, data: Path) -> Run:
    config, loaded, add_arm = arm_of(arm, data_set, data, seed=0)
    run = prepare(config, loaded)
    (add_arm or add_arm_of_config)(run.model, config, run.vocabulary)
    return run
