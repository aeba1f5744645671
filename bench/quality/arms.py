"""The arms of the study and the one recipe that all of them share.

What an arm changes beside the recipe is all that differs from the others: same data, same order of sequences, same
steps, learning rate and schedule; the checkpoint with the lowest validation loss is the one that is tested.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefixmem_fast.recommender.training.config import RunConfig


@dataclass(frozen=True)
class Arm:
    """What differs from the recipe.

    Attributes:
        options: of RunConfig.
        pretraining: of PRETRAINING, how the encoder is pre-trained first; None where it is not.
        permuted: whether prefixes are exchanged, see `control.py`.
        steps_of: the arm whose training steps are the same work, if it is another.
        epochs: passes over the histories, where they are not those of the recipe.
        what: a line for tables.
    """

    what: str
    options: dict[str, Any] = field(default_factory=dict)
    pretraining: str | None = None
    permuted: bool = False
    steps_of: str | None = None
    epochs: int | None = None


@dataclass(frozen=True)
class DataSet:
    """An index and its histories, below the data folder.

    Attributes:
        epoch: steps in which every history is seen once.
        users: in the test, all of them.
        published: Recall@10 and NDCG@10 of published models, on all test users.
    """

    items: str
    interactions: str
    epoch: int
    users: int
    published: dict[str, tuple[float, float]] = field(default_factory=dict)


SETS = {
    "beauty-mql4grec": DataSet(
        "beauty/mql4grec.index.json",
        "beauty/interactions.json",
        280,
        22_363,
        {
            "TIGER": (0.0648, 0.0384),
            "LETTER": (0.0672, 0.0364),
            "SASRec, tuned": (0.0740, 0.0423),
            "LC-Rec": (0.0791, 0.0438),
        },
    ),
    "beauty-rqvae_zcr": DataSet("beauty/rqvae_zcr.index.json", "beauty/interactions.json", 280, 22_363),
    "scientific-rqvae_zcr": DataSet("scientific/rqvae_zcr.index.json", "scientific/interactions.json", 104, 8_317),
    "scientific-rkmeans_zcr": DataSet("scientific/rkmeans_zcr.index.json", "scientific/interactions.json", 104, 8_317),
    "scientific-rqvae_native": DataSet(
        "scientific/rqvae_native.index.json", "scientific/interactions.json", 104, 8_317
    ),
}

EPOCHS, EPOCHS_A_VALIDATION = 10, 2
RECIPE: dict[str, Any] = {
    "model": "decoder",
    "model_options": {"n_inner": 512, "embd_pdrop": 0.1, "resid_pdrop": 0.1},
    "codebook_sizes": [256] * 4,
    "table_rows": 32_768,
    "heads": 2,
    "max_order": 3,
    "memory_dim": 32,
    "history_codes": [3, 4],
    "history_rows": 1_048_573,
    "history_heads": 2,
    "history_dim": 64,
    "grad": "fused",
    "max_grad_norm": 0.0,
    "history_lr": 0.1,
    "batch_size": 80,
    "learning_rate": 3e-3,
    "adam_beta2": 0.99,
    "weight_decay": 0.05,
    "warmup_steps": 100,
    "precision": "bfloat16",
    "eval_users": 5000,
}
PRETRAINING: dict[str, dict[str, Any]] = {
    "classification": {
        "steps": 1000,
        "batch_size": 1024,
        "learning_rate": 2e-3,
        "warmup_steps": 50,
        "eval_every": 200,
        "log_every": 200,
        "restart_rows": 0,
    },
}
PRETRAINING["prefixes"] = {**PRETRAINING["classification"], "history": 0}

ARMS = {
    "plain": Arm("token embeddings alone", {"arm": "plain"}),
    "wide": Arm("the same, widened to as many parameters", {"arm": "plain"}),
    "permuted": Arm("control: PrefixMem of exchanged prefixes", permuted=True),
    "prefixmem": Arm("PrefixMem, as in the paper"),
    "cross-item": Arm("PrefixMem + cross-item orders", {"history": 4}),
    "cross-item-permuted": Arm("control: the same of exchanged items before", {"history": 4}, permuted=True),
    "cross-item-alone": Arm("cross-item orders alone", {"arm": "cross-item", "history": 4}),
    "cross-item-1": Arm("PrefixMem + cross-item orders of the item before alone", {"history": 1}),
    "cross-item-whole": Arm(
        "PrefixMem + cross-item orders of whole items alone", {"history": 4, "history_codes": None}
    ),
    "cross-item-input": Arm(
        "PrefixMem + cross-item orders, not added to the last hidden states", {"history": 4, "history_output": False}
    ),
    "sid-transformer": Arm("SID-Transformer in the same slot", {"arm": "sid-transformer", "encoder_lr_multiple": 0.3}),
    "pretrained": Arm(
        "PrefixMem + cross-item orders, pre-trained by classification",
        {"history": 4, "restart_rows": 0},  # which would lose what was pre-trained
        pretraining="classification",
        steps_of="cross-item",
    ),
    "pretrained-prefixes": Arm(
        "PrefixMem pre-trained by classification + cross-item orders that are not",
        {"history": 4},
        pretraining="prefixes",
        steps_of="cross-item",
    ),
    # An encoder-decoder learns one target a history in an epoch, where a decoder learns all, five to seven.
    "tiger": Arm(
        "a T5 in place of the decoder, token embeddings alone",
        {"arm": "plain", "model": "tiger", "model_options": {}},
        epochs=60,
    ),
    "tiger-prefixmem": Arm("a T5 with PrefixMem", {"model": "tiger", "model_options": {}}, epochs=60),
    # Without restarts the rows are trained on the same transitions again and again.
    "cross-item-kept": Arm(
        "PrefixMem + cross-item orders, rows kept from epoch to epoch", {"history": 4, "restart_rows": 0}
    ),
}
PACE = "pace.jsonl"  # seconds of a step of each arm
FIRST = ("plain", "prefixmem", "cross-item", "cross-item-permuted")  # what the study is not complete without


def config_of(arm: str, data_set: str, data: Path, seed: int, **changes: Any) -> RunConfig:
    """The options of one run of the study."""
    files = SETS[data_set]
    places = {"items": str(data / files.items), "interactions": [str(data / files.interactions)]}
    epochs = _epochs(arm)
    times = {
        "steps": epochs * files.epoch,
        "restart_rows": files.epoch,
        "eval_every": EPOCHS_A_VALIDATION * epochs // EPOCHS * files.epoch,
        "log_every": files.epoch,
    }
    return RunConfig(**without_unread({**places, "seed": seed, **times, **RECIPE, **ARMS[arm].options, **changes}))


def without_unread(options: dict[str, Any]) -> dict[str, Any]:
    """What an arm reads of the recipe: without cross-item orders nothing of theirs."""
    unread = () if options.get("history") else ("history_codes", "history_lr", "restart_rows")
    return {name: value for name, value in options.items() if name not in unread}


def fullness(row: dict[str, Any]) -> tuple[int, int]:
    """Test users and beams of a row: rows in which they differ are not compared."""
    return row["test"]["examples"], row["test"]["beams"]


def recipe(arm: str, data_set: str) -> str:
    """What must not have changed for a stored row to count as this run's."""
    pretraining = PRETRAINING.get(ARMS[arm].pretraining or "")
    return json.dumps([_epochs(arm), SETS[data_set].epoch, RECIPE, ARMS[arm].options, pretraining], sort_keys=True)


def _epochs(arm: str) -> int:
    return ARMS[arm].epochs or EPOCHS
