"""Evaluate a trained run: TF-L by level, recall and NDCG by beam search, hit rates, and what counting achieves."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ..recommender.evaluation.report import PARTS, SEARCHES, as_json
from .train import check_libraries, quiet_transformers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, metavar="FOLDER", help="a folder that prefixmem train wrote")
    parser.add_argument("--part", choices=PARTS, default="test", help="(default: %(default)s)")
    parser.add_argument("--beams", type=int, default=20, help="beams of a search (default: %(default)s)")
    parser.add_argument("--examples", type=int, help="examples, chosen once for all runs (default: all)")
    parser.add_argument("--search", choices=SEARCHES, help="one kind of search alone (default: both)")
    parser.add_argument("--baseline", metavar="FOLDER", help="an evaluated run that says which examples are reachable")
    parser.add_argument("--bleu", type=int, default=0, metavar="N", help="name N items by their text (default: 0)")


def run(options: argparse.Namespace) -> int:
    for name, least in (("beams", 2), ("bleu", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} = {getattr(options, name)}; give {least} or more")
    if options.examples is not None and options.examples < 1:
        raise ValueError(f"--examples = {options.examples}; give 1 or more")
    check_libraries()
    with quiet_transformers():
        return _evaluate(options)


def _evaluate(options: argparse.Namespace) -> int:
    import numpy as np

    from .._files import write_file
    from ..recommender.evaluation.report import evaluate, reachable_by, table
    from ..recommender.training.run import load_run

    loaded = load_run(options.run)
    part = loaded.data.split.test if options.part == "test" else loaded.data.split.validation
    reachable = None
    if options.baseline:
        targets = part.sample(options.examples).targets
        reachable = reachable_by(Path(options.baseline) / f"{options.part}.npz", targets)
    if options.bleu and loaded.tokens.texts is None:
        raise ValueError("--bleu needs a run that was trained with text: --text, and a weight for interleaved or pairs")
    report, arrays = evaluate(
        loaded.model,
        loaded.data.catalogue,
        loaded.vocabulary,
        loaded.tokens,
        loaded.data.split,
        part=options.part,
        max_items=loaded.config.max_items,
        num_beams=options.beams,
        examples=options.examples,
        searches=(options.search,) if options.search else SEARCHES,
        reachable=reachable,
        progress=partial(progress_bar, quiet=options.json),
    )
    report = {"run": str(options.run), "data": loaded.data.name, "name": loaded.config.arm, **report}
    if options.bleu:
        from ..recommender.evaluation.description import bleu, describe

        random = np.random.default_rng(0)
        named = np.flatnonzero([bool(text) for text in loaded.data.text])
        items = random.choice(named, min(options.bleu, len(named)), replace=False)
        texts = describe(loaded.model, loaded.tokenizer, loaded.tokens, items)
        report["bleu"] = bleu(texts, [loaded.data.text[item] for item in items])
    folder = Path(options.run)
    text = as_json(report)
    write_file(folder / f"{options.part}.json", lambda temporary: Path(temporary).write_text(text + "\n"))
    write_file(folder / f"{options.part}.npz", lambda temporary: _savez(temporary, arrays))
    print(text if options.json else table(report))
    return 0


def progress_bar(search: str, examples: int, *, quiet: bool):
    return tqdm(total=examples, desc=search, unit="user", disable=quiet or None).update


def _savez(temporary: str, arrays: dict) -> None:
    import numpy as np

    with open(temporary, "wb") as file:  # a name would have .npz added
        np.savez_compressed(file, **arrays)
