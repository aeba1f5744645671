"""`prefixmem evaluate`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .._choices import PARTS, SEARCHES
from .._progress import Progress, quiet_transformers
from .train import check_libraries, folder_name

_BEAMS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", type=folder_name, required=True, metavar="FOLDER", help="a folder that prefixmem train wrote"
    )
    parser.add_argument("--part", choices=PARTS, default="test", help="(default: %(default)s)")
    parser.add_argument("--beams", type=int, default=_BEAMS, help="beams of a search (default: %(default)s)")
    parser.add_argument("--examples", type=int, help="examples, chosen once for all runs (default: all)")
    parser.add_argument("--search", choices=SEARCHES, help="one kind of search alone (default: both)")
    parser.add_argument(
        "--baseline", type=folder_name, metavar="FOLDER", help="an evaluated run that says which examples are reachable"
    )
    parser.add_argument(
        "--out", type=folder_name, metavar="FOLDER", help="where the results are written (default: the run's folder)"
    )
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

    from .._files import check_writable, write_file, write_text
    from ..recommender.evaluation.report import as_json, evaluate, table
    from ..recommender.training.run import load_run

    folder = Path(options.run if options.out is None else options.out)
    check_writable(folder)
    loaded = load_run(options.run)
    part = loaded.data.split.test if options.part == "test" else loaded.data.split.validation
    reachable = None
    if options.baseline:
        reachable = _reachable_by(Path(options.baseline), options.part, part.sample(options.examples).targets)
    if options.bleu and loaded.tokens.texts is None:
        raise ValueError("--bleu needs a run that was trained with text: --text, and a weight for interleaved or pairs")
    name = result_name(options, len(part))
    check_replaceable(folder / name)
    with Searches(options.json) as searches:
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
            progress=searches.begin,
        )
    report = {"run": str(options.run), "data": loaded.data.name, "name": loaded.config.arm, **report}
    if options.bleu:
        from ..recommender.evaluation.description import bleu, describe

        random = np.random.default_rng(0)
        named = np.flatnonzero([bool(text) for text in loaded.data.text])
        items = random.choice(named, min(options.bleu, len(named)), replace=False)
        texts = describe(loaded.model, loaded.tokenizer, loaded.tokens, items)
        report["bleu"] = bleu(texts, [loaded.data.text[item] for item in items])
    text = as_json(report)
    print(text if options.json else table(report), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / f"{name}.npz", lambda temporary: _savez(temporary, arrays))
    write_text(folder / f"{name}.json", text + "\n")
    if not options.json:
        print(f"written to {folder / name}.json")
    return 0


def result_name(options: argparse.Namespace, examples: int) -> str:
    """The name of the files of a result: the part, and what was asked for beside the defaults.

    A result so replaces one of the same question alone; baselines are told apart by the names of their folders.
    """
    asked: dict[str, Any] = {
        "examples": options.examples if options.examples is not None and options.examples < examples else None,
        "search": options.search,
        "beams": options.beams if options.beams != _BEAMS else None,
        "bleu": options.bleu or None,
        "baseline": Path(options.baseline).resolve().name if options.baseline else None,
    }
    words = [f"{name}-{value}" for name, value in asked.items() if value is not None]
    return ".".join([options.part, *words])


def check_replaceable(result: Path) -> None:
    """Refuse to write over files that are no result of an evaluation.

    Raises:
        ValueError: there is such a file.
    """
    from .._files import read_json

    text = result.with_name(f"{result.name}.json")
    try:
        ours = text.is_file() and "teacher_forcing" in read_json(text)
    except (TypeError, ValueError):
        ours = False
    for file in (text, result.with_name(f"{result.name}.npz")):
        if os.path.lexists(file) and not ours:
            raise ValueError(f"{file} is there, and is no result of prefixmem evaluate; move it, or give another --out")


def _reachable_by(baseline: Path, part: str, targets: Any) -> Any:
    """Which examples a baseline reaches, from any of its results on the same part and examples."""
    from ..recommender.evaluation.report import reachable_by

    files = sorted(file for file in baseline.glob(f"{part}*.npz") if file.name.split(".")[0] == part)
    problem = None
    for file in files or [baseline / f"{part}.npz"]:
        try:
            return reachable_by(file, targets)
        except ValueError as error:
            problem = problem or error
    raise problem


class Searches:
    """Shows how far each search is; a context manager."""

    def __init__(self, quiet: bool) -> None:
        self._quiet, self._shown = quiet, ExitStack()

    def begin(self, search: str, examples: int) -> Callable[[int], object]:
        self._shown.close()
        return self._shown.enter_context(Progress(f"{search} search", examples, "users", quiet=self._quiet)).update

    def __enter__(self) -> Searches:
        return self

    def __exit__(self, *_: object) -> None:
        self._shown.close()


def _savez(temporary: str, arrays: dict) -> None:
    import numpy as np

    with open(temporary, "wb") as file:  # a name would have .npz added
        np.savez_compressed(file, **arrays)
