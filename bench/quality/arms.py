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
        pretraining: "classification" or "tiger": the encoder is pre-trained so first.
        permuted: whether prefixes are exchanged, see `control.py`.
        steps_of: the arm whose training steps are the same work, if it is another.
        what: a line for tables.
    """

    what: str
    options: dict[str, Any] = field(default_factory=dict)
    pretraining: str | None = None
    permuted: bool = False
    steps_of: str | None = None


@dataclass(frozen=True)
class DataSet:
    """An index and its histories, below the data folder.

    Attributes:
        steps: of training; the plain model's validation loss rises again beyond them on the smaller set.
        published: what is known on its splits.
    """

    items: str
    interactions: str
    steps: int
    published: str = ""


SETS = {
    "beauty-mql4grec": DataSet(
        "beauty/mql4grec.index.json",
        "beauty/interactions.json",
        2400,
        "published R@10 / N@10: TIGER .0648/.0384, LETTER .0672/.0364, SASRec tuned .0740/.0423, LC-Rec .0791/.0438; "
        "TIGER in cornac .0634/.0338",
    ),
    "beauty-rqvae_zcr": DataSet("beauty/rqvae_zcr.index.json", "beauty/interactions.json", 2400),
    "scientific-rqvae_zcr": DataSet("scientific/rqvae_zcr.index.json", "scientific/interactions.json", 1200),
    "scientific-rkmeans_zcr": DataSet("scientific/rkmeans_zcr.index.json", "scientific/interactions.json", 1200),
}

RECIPE: dict[str, Any] = {
    "model": "decoder",
    "model_options": {"embd_pdrop": 0.05, "resid_pdrop": 0.05},
    "codebook_sizes": [256] * 4,
    "table_rows": 32_768,
    "heads": 2,
    "max_order": 3,
    "memory_dim": 32,
    "batch_size": 40,
    "learning_rate": 8e-3,
    "adam_beta2": 0.99,
    "muon_lr": 0.03,
    "weight_decay": 0.05,
    "warmup_steps": 100,
    "precision": "bfloat16",
    "eval_every": 200,
    "eval_users": 2000,
}
PRETRAINING: dict[str, dict[str, Any]] = {
    "classification": {"steps": 1000, "batch_size": 1024, "learning_rate": 2e-3, "warmup_steps": 50},
    "tiger": {"model": "tiger", "model_options": None, "learning_rate": 2e-3, "muon_lr": None},
}

ARMS = {
    "plain": Arm("token embeddings alone", {"arm": "plain"}),
    "wide": Arm("the same, widened to as many parameters", {"arm": "plain"}),
    "permuted": Arm("control: PrefixMem of exchanged prefixes", permuted=True),
    "prefixmem": Arm("PrefixMem"),
    "prefixmem-dropout": Arm("PrefixMem, memory dropout .3", {"memory_dropout": 0.3}),
    "prefixmem-large": Arm("PrefixMem, 8 x the rows", {"table_rows": 262_144}),
    "pretrained": Arm("PrefixMem, pre-trained by classification", pretraining="classification", steps_of="prefixmem"),
    "tiger-pretrained": Arm("PrefixMem, pre-trained in Tiger", pretraining="tiger", steps_of="prefixmem"),
    # At the tables' rate of .04 a transformer does not learn; 1e-3 is an ordinary one for AdamW.
    "sid-transformer": Arm(
        "SID-Transformer in the same slot", {"arm": "sid-transformer", "encoder_lr_multiple": 0.125}
    ),
    "suffix": Arm("PrefixMem, suffix orders", {"mode": "suffix"}),
    "full": Arm("PrefixMem, one hash of the whole prefix", {"mode": "full"}),
    "all-levels": Arm("PrefixMem, active at every level", {"active_levels": [1, 2, 3, 4], "max_order": 4}),
    "plain-long": Arm("token embeddings alone, 9,600 steps", {"arm": "plain", "steps": 9600}, steps_of="plain"),
    "prefixmem-long": Arm("PrefixMem, 9,600 steps", {"steps": 9600}, steps_of="prefixmem"),
}
PACE = "pace.jsonl"  # seconds of a step of each arm
FIRST = ("plain", "prefixmem", "permuted", "pretrained")  # what the study is not complete without


def config_of(arm: str, data_set: str, data: Path, seed: int, **changes: Any) -> RunConfig:
    """The options of one run of the study."""
    files = SETS[data_set]
    places = {"items": str(data / files.items), "interactions": [str(data / files.interactions)]}
    return RunConfig(**{**places, "seed": seed, "steps": files.steps, **RECIPE, **ARMS[arm].options, **changes})


def recipe(arm: str, data_set: str) -> str:
    """What must not have changed for a stored row to count as this run's."""
    pretraining = PRETRAINING.get(ARMS[arm].pretraining or "")
    return json.dumps([SETS[data_set].steps, RECIPE, ARMS[arm].options, pretraining], sort_keys=True)
