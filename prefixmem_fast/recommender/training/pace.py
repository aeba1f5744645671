"""Times of a training step of several runs, side by side: they take turns step by step, as a machine's speed drifts.

Each turn has an order of its own, as a step's time depends on what the one before has left in the caches.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping

import torch
from torch import nn

from .arms import optimizer_for
from .run import Run, stream_of


def seconds_of_steps(
    runs: Mapping[str, Run], steps: int, warm_up: int = 2, turn: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each training step of each run, without what a Trainer does around it.

    Args:
        runs: prepared, with their encoders; equal data and seeds give all of them equal batches.
        steps: of each run that are timed; `warm_up` come before them.
        turn: called where all runs have had another one.
    """
    optimizers = {name: optimizer_for(run.model.train(), run.config) for name, run in runs.items()}
    streams = {name: stream_of(run) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for step in range(warm_up + steps):
        for name in random.Random(step).sample(list(runs), len(runs)):
            run, (stream, collate) = runs[name], streams[name]
            batch = collate(stream[step % len(stream)])
            started = time.perf_counter()
            _step(run, batch, optimizers[name])
            if step >= warm_up:
                seconds[name].append(time.perf_counter() - started)
        if step >= warm_up:
            turn()
    return seconds


def _step(run: Run, batch: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    device = next(run.model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=run.config.precision == "bfloat16"):
        loss = run.model(**batch).loss
    loss.backward()
    if run.config.max_grad_norm:
        nn.utils.clip_grad_norm_(run.model.parameters(), run.config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
