"""A small catalogue and histories as files, and options that train on them in seconds."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from bench import real_data
from prefixmem_fast.recommender.training.config import RunConfig

LEVELS, CODES, ITEMS, USERS = 3, 6, 60, 80


def write_files(folder: Path) -> dict[str, str]:
    random = np.random.default_rng(0)
    codes = random.permutation(np.unique(random.integers(CODES, size=(4 * ITEMS, LEVELS)), axis=0))[:ITEMS]
    index = {f"item {i}": [f"<{'abc'[l]}_{c}>" for l, c in enumerate(row)] for i, row in enumerate(codes)}
    histories = {
        f"user {u}": [f"item {i}" for i in random.choice(ITEMS, random.integers(4, 9), replace=False)]
        for u in range(USERS)
    }
    text = {f"item {i}": {"title": f"red thing number {i}"} for i in range(ITEMS)}
    for name, content in (("items.index.json", index), ("interactions.json", histories), ("items.json", text)):
        (folder / name).write_text(json.dumps(content))
    return {
        "items": str(folder / "items.index.json"),
        "interactions": [str(folder / "interactions.json")],
        "text": str(folder / "items.json"),
    }


def write_real_files(folder: Path, monkeypatch: Any) -> tuple[str, str]:
    """The same in place of the real data: index and histories, which a study takes as those it knows."""
    write_files(folder)
    files = ("items.index.json", "interactions.json")
    digests = {name: ("source", hashlib.sha256((folder / name).read_bytes()).hexdigest()) for name in files}
    monkeypatch.setattr(real_data, "FILES", digests)
    return files


TINY = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_inner": 16, "n_positions": 256}
TINY_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}


def options(folder: Path, **changes) -> RunConfig:
    small = {
        "model_options": TINY,
        "table_rows": 50,
        "heads": 2,
        "max_order": 2,
        "memory_dim": 8,
        "steps": 8,
        "batch_size": 8,
        "log_every": 1,
        "eval_every": 4,
        "warmup_steps": 2,
        "max_items": 5,
        "sid_width": 8,
        "sid_layers": 1,
        "learning_rate": 1e-2,
    }
    return RunConfig(**{**write_files(folder), **small, **changes})
