"""Pre-train an encoder alone: by a classification head, or in a small Tiger or causal LM, for any model to attach."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .train import add_run_arguments, config_of, is_first_process, quiet_transformers, summary

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
    config = config_of(options, **_DEFAULTS[options.method])
    if config.arm != "prefixmem":
        raise ValueError(f"arm = {config.arm!r} has no tables to pre-train; give arm = 'prefixmem'")
    out, how = Path(options.out), {"resume": options.resume, "quiet": options.json}
    if options.method == "classification":
        from ..recommender.training.classification import pretrain

        with quiet_transformers():
            report = pretrain(config, out, **how)
    else:
        from ..encoder import PrefixMem
        from ..recommender.training.classification import ENCODER
        from ..recommender.training.run import MODEL, train
        from ..sid import SIDVocabulary

        with quiet_transformers():
            report = train(config, out, **how)
        if not is_first_process():
            return 0
        encoder, vocabulary = PrefixMem.from_pretrained(out / MODEL), SIDVocabulary.from_pretrained(out / MODEL)
        encoder.save_pretrained(out / ENCODER, vocabulary)
    print(json.dumps(report, indent=2) if options.json else summary(report, options.out))
    if not options.json:
        print(f"prefixmem train --encoder {out / 'encoder'} ... starts from it")
    return 0
