"""One run of the study: pre-train if the arm says so, train, test once, and one row of results."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from prefixmem_fast.recommender.evaluation.report import evaluate, reachable_by
from prefixmem_fast.recommender.evaluation.retrieval import ranking_metrics, retrieve
from prefixmem_fast.recommender.training import classification
from prefixmem_fast.recommender.training.config import RunConfig
from prefixmem_fast.recommender.training.folder import ENCODER, MARKER
from prefixmem_fast.recommender.training.run import Data, load_data, load_run, prepare, train
from prefixmem_fast.sid.trie import SIDTrie

from .arms import ARMS, PRETRAINING, config_of, recipe
from .control import add_permuted
from .hits import packed

HARD = ("plain", 0)  # the arm and the seed whose test says which examples are reachable


def forget(runs: Path, data_set: str, arm: str, seed: int) -> None:
    """Remove the model of a run whose row is written, half a gigabyte; what its test has found stays."""
    for name in ("train", "pretraining"):
        shutil.rmtree(folder_of(runs, data_set, arm, seed) / name, ignore_errors=True)


def folder_of(runs: Path, data_set: str, arm: str, seed: int) -> Path:
    return runs / data_set / f"{arm}-{seed}"


def run_one(
    data_set: str, arm: str, seed: int, *, data: Path, runs: Path, beams: int, examples: int | None, quiet: bool
) -> dict[str, Any]:
    """Everything of one run; what an interrupted one has done already is not done again."""
    folder = folder_of(runs, data_set, arm, seed)
    changes: dict[str, Any] = {}
    pretraining = ARMS[arm].pretraining
    report: dict[str, Any] = {}
    if pretraining:
        report["pretraining"] = _pretrain(arm, data_set, seed, data, folder / "pretraining", quiet)
        changes["encoder"] = str(folder / "pretraining" / ENCODER)
    config, loaded, add_arm = arm_of(arm, data_set, data, seed, **changes)
    training = _train(config, folder / "train", quiet, loaded, add_arm)
    # The control is no encoder that the library knows, so its weights are put back by hand.
    run = prepare(config, loaded) if add_arm else load_run(folder / "train")
    if add_arm:
        add_arm(run.model, config, run.vocabulary)
        _load_weights(run.model, folder / "train" / "model")
    hard = folder_of(runs, data_set, *HARD) / "test.npz"
    chosen = loaded.split.test.sample(examples)
    reachable = None
    if (arm, seed) != HARD and hard.is_file():
        reachable = reachable_by(hard, chosen.targets)
    started = time.perf_counter()
    torch.manual_seed(seed)
    progress = lambda search, count: tqdm(total=count, desc=search, disable=quiet or None).update  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
        tested, arrays = evaluate(
            run.model,
            loaded.catalogue,
            run.vocabulary,
            run.tokens,
            loaded.split,
            part="test",
            num_beams=beams,
            max_items=config.max_items,
            examples=examples,
            searches=("constrained",),
            reachable=reachable,
            progress=progress,
        )
        some, trie = chosen.sample(_FREE).last(config.max_items), SIDTrie(loaded.catalogue, run.vocabulary)
        told = progress("unconstrained", len(some))
        free = retrieve(run.model, some, run.tokens, trie, num_beams=beams, constrained=False, progress=told)
    tested["unconstrained"] = {
        "examples": len(some),
        **ranking_metrics(free.rank, (10,)),
        "hit_rate": free.hits.mean(0).tolist(),
    }
    tested["hits@10"] = packed(arrays["constrained_rank"] < 10)
    if (arm, seed) == HARD:
        np.savez_compressed(hard, **arrays)
    return {
        "set": data_set,
        "arm": arm,
        "seed": seed,
        "what": ARMS[arm].what,
        "recipe": recipe(arm, data_set),
        "options": {name: value for name, value in config.to_dict().items() if name not in _PLACES},
        **report,
        **training,
        "test": tested,
        "test_seconds": round(time.perf_counter() - started, 1),
    }


def arm_of(arm: str, data_set: str, data: Path, seed: int, **changes: Any) -> tuple[RunConfig, Data, Callable | None]:
    """Options and data of a run, and what attaches its encoder where the library has no such arm."""
    config = config_of(arm, data_set, data, seed, **changes)
    loaded = load_data(config)
    if arm == "wide":
        config = config.replace(model_options=widened(config, data_set, data, loaded))
    permuted = partial(add_permuted, codes=loaded.catalogue.codes, train=loaded.split.train)
    return config, loaded, permuted if ARMS[arm].permuted else None


_FREE = 3000  # test examples of the unconstrained search


_PLACES = ("items", "interactions", "text", "encoder", "tokenizer")


def widened(config: RunConfig, data_set: str, data: Path, loaded: Any) -> dict[str, Any]:
    """Options of a plain model with as many parameters as the one of the arm "prefixmem" reads and trains.

    Rows of the tables that no item of the catalogue reads are not counted.
    """
    from prefixmem_fast import prefix_rows
    from prefixmem_fast.recommender.training.arms import build_encoder

    encoder = build_encoder(config_of("prefixmem", data_set, data, 0), loaded.catalogue.codebook_sizes, 128)
    rows = prefix_rows(loaded.catalogue.codes, encoder.config.spec)
    active = [level - 1 for level in encoder.config.spec.active_levels]
    live = len(rows[:, active].unique()) * encoder.config.row_width + encoder.out_proj.weight.numel()
    options = dict(config.model_options or {})
    aim = sum(p.numel() for p in prepare(config, loaded).model.parameters()) + live
    for width in range(128, 1025, 32):
        wide = {**options, **_of_width(width)}
        size = sum(p.numel() for p in prepare(config.replace(model_options=wide), loaded).model.parameters())
        if size >= aim:
            return wide
    return wide


def _of_width(width: int) -> dict[str, Any]:
    return {"n_embd": width, "n_inner": 8 * width}


def _pretrain(arm: str, data_set: str, seed: int, data: Path, out: Path, quiet: bool) -> dict[str, Any]:
    config = config_of(arm, data_set, data, seed, **PRETRAINING[ARMS[arm].pretraining])
    report = classification.pretrain(config, out, resume=(out / MARKER).is_file(), quiet=quiet)
    return {name: value for name, value in report.items() if name != "training"}


def _train(config: RunConfig, out: Path, quiet: bool, data: Any, add_arm: Any) -> dict[str, Any]:
    """Train, or go on, or give the report of a run that has finished; one of other options is refused."""
    report = train(config, out, resume=(out / MARKER).is_file(), quiet=quiet, data=data, add_arm=add_arm)
    return {name: value for name, value in report.items() if name != "training"}


def _load_weights(model: torch.nn.Module, folder: Path) -> None:
    from safetensors.torch import load_file

    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    left = [name for name in (*missing, *unexpected) if not name.endswith(("_extra_state", "lm_head.weight"))]
    if left:
        raise ValueError(f"{folder}: {left[0]} does not fit the model")
    model.tie_weights()
    model.eval()
