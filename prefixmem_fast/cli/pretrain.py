"""`prefixmem pretrain`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._progress import quiet_transformers
from .train import add_run_arguments, config_of, summary

if TYPE_CHECKING:
    from ..recommender.training.config import RunConfig

METHODS = ("classification", "tiger", "lm")
_DEFAULTS = {
    "classification": {"batch_size": 1024, "steps": 2000, "learning_rate": 2e-3},
    "tiger": {"model": "tiger"},
    "lm": {"model": "decoder"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=METHODS, default=METHODS[0], help="(default: %(default)s)")
    add_run_arguments(parser)


def run(options: argparse.Namespace) -> int:
    from ..recommender.training.config import MEMORY_ARMS
    from ..recommender.training.folder import ENCODER
    from ..recommender.training.session import is_first_process

    config = config_of(options, **_DEFAULTS[options.method])
    if config.arm not in MEMORY_ARMS:
        raise ValueError(f"arm = {config.arm!r} has no tables to pre-train; give {' or '.join(MEMORY_ARMS)}")
    out, how = Path(options.out), {"resume": options.resume, "quiet": options.json}
    with quiet_transformers():
        if options.method == "classification":
            from ..recommender.training.classification import pretrain

            report = pretrain(config, out, **how)
        else:
            report = _pretrain_in_a_model(config, out, options.method, how)
    if not is_first_process():
        return 0
    print(json.dumps(report, indent=2) if options.json else summary(report, options.out))
    if not options.json:
        print(f"prefixmem train --encoder {out / ENCODER} ... starts from it")
    return 0


def _pretrain_in_a_model(config: RunConfig, out: Path, method: str, how: dict[str, Any]) -> dict[str, Any]:
    from functools import partial

    from ..encoder import PrefixMem
    from ..recommender.training.folder import ENCODER, MODEL, RunFolder
    from ..recommender.training.run import train
    from ..recommender.training.session import is_first_process
    from ..sid import SIDVocabulary

    kind = f"pretrain {method}"
    report = train(config, out, kind=kind, **how)
    if is_first_process() and not (out / ENCODER).exists():
        encoder, vocabulary = PrefixMem.from_pretrained(out / MODEL), SIDVocabulary.from_pretrained(out / MODEL)
        with RunFolder.resume(out, kind) as folder:
            folder.place(ENCODER, partial(encoder.save_pretrained, vocabulary=vocabulary))
    return report
