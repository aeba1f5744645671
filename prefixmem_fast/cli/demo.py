"""`prefixmem demo`."""

from __future__ import annotations

import argparse
import statistics
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._progress import quiet_transformers
from .train import check_libraries, folder_name

if TYPE_CHECKING:
    from ..recommender.training.config import RunConfig
    from ..recommender.training.run import Data

REPORT, _OUT = "demo.json", "runs/demo"
PLAIN, WITH, ACROSS = "token embeddings alone", "with PrefixMem", "with cross-item orders too"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=folder_name,
        metavar="FOLDER",
        help=f"a new or an empty folder (default: {_OUT}, {_OUT}-2 and so on)",
    )
    parser.add_argument("--steps", type=int, default=200, help="training steps of each model (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    if options.steps < 20:
        raise ValueError(f"--steps = {options.steps}; give 20 or more")
    check_libraries("matplotlib")
    with quiet_transformers():
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    from .._files import write_text
    from ..recommender.evaluation.plots import plot_curves
    from ..recommender.evaluation.report import as_json
    from ..recommender.training.classification import pretrain
    from ..recommender.training.config import RunConfig
    from ..recommender.training.run import load_data, train

    out, quiet = _folder(options.out), options.json
    say = (lambda *_: None) if quiet else print
    every = max(options.steps // 12, 1)
    config = RunConfig(
        synthetic=True,
        steps=options.steps,
        log_every=every,
        eval_every=every,
        eval_users=500,
        batch_size=32,
        learning_rate=2e-3,
        warmup_steps=options.steps // 20,
        table_rows=20_000,
        memory_dim=64,
        seed=options.seed,
    )
    data = load_data(config)
    say(
        f"synthetic catalogue: {len(data.catalogue)} items, {data.catalogue.codes.shape[1]} levels, "
        f"{data.split.train.interactions} interactions to train on"
    )

    say("1/5  pre-train the encoder by a classification head, without a transformer")
    shorter = config.replace(
        steps=min(options.steps, 200), log_every=50, eval_every=50, batch_size=1024, warmup_steps=20
    )
    pretrain(shorter, out / "pretraining", quiet=quiet, data=data)
    arms = {
        PLAIN: {"arm": "plain"},
        WITH: {"encoder": str(out / "pretraining" / "encoder")},
        ACROSS: {"encoder": str(out / "pretraining" / "encoder"), "history": 1, "history_rows": 100_000},
    }
    folders = dict(zip(arms, (out / "plain", out / "prefixmem", out / "cross-item"), strict=True))
    curves, reports = {}, {}
    for i, (name, changes) in enumerate(arms.items(), start=2):
        say(f"{i}/5  train a small decoder, {name}")
        curves[name] = train(config.replace(**changes), folders[name], quiet=quiet, data=data)["validation"]
    say("5/5  evaluate on the test items, and time a training step")
    for name, folder in folders.items():
        reports[name] = _evaluate(folder, quiet)
    milliseconds = step_times(config, data)

    picture = out / "curves.png"
    plot_curves(
        {name: [rows] for name, rows in curves.items()},
        picture,
        "synthetic catalogue, validation",
        floors=reports[PLAIN]["count_table_accuracy"],
    )
    results = {"data": "synthetic", "curves": curves, "test": reports, "step_ms": milliseconds, "picture": str(picture)}
    text = as_json(results)
    write_text(out / REPORT, text + "\n")
    print(text if options.json else _table(results))
    return 0


def step_times(config: RunConfig, data: Data, steps: int = 8) -> dict[str, float]:
    """Median milliseconds of a training step at T = 200,000: without the encoder, with it, and in plain PyTorch.

    Plain PyTorch is the reference implementation, a dense gradient and AdamW on the tables. The three take turns.
    """
    from ..recommender.training.arms import add_arm
    from ..recommender.training.pace import seconds_of_steps
    from ..recommender.training.run import prepare

    runs = {}
    for name, changes, backend in (
        ("no encoder", {"arm": "plain"}, None),
        ("PrefixMem", {}, "auto"),
        ("PrefixMem in plain PyTorch, dense AdamW", {"grad": "dense"}, "reference"),
    ):
        run = runs[name] = prepare(config.replace(table_rows=200_000, **changes), data)
        add_arm(run.model, run.config, run.vocabulary)
        if backend:
            run.model.prefixmem.memory.backend = backend
    seconds = seconds_of_steps(runs, steps)
    return {name: round(1e3 * statistics.median(times), 1) for name, times in seconds.items()}


def _folder(out: str | None) -> Path:
    """A folder of the demo's own, made here."""
    from ..recommender.training.folder import check_new

    if out is not None:
        check_new(out)
        Path(out).mkdir(parents=True, exist_ok=True)
        return Path(out)
    for number in count(1):
        folder = Path(_OUT if number == 1 else f"{_OUT}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue


def _evaluate(folder: Path, quiet: bool) -> dict[str, Any]:
    from ..recommender.evaluation.report import evaluate
    from ..recommender.training.run import load_run
    from .evaluate import Searches

    run = load_run(folder)
    with Searches(quiet) as searches:
        report, _ = evaluate(
            run.model,
            run.data.catalogue,
            run.vocabulary,
            run.tokens,
            run.data.split,
            examples=1000,
            progress=searches.begin,
        )
    return report


def _table(results: dict[str, Any]) -> str:
    from ..recommender.evaluation.plots import rows_at

    reports, curves = results["test"], results["curves"]
    levels = range(1, len(reports[PLAIN]["teacher_forcing"]["accuracy"]) + 1)
    head = "".join(f"{f'level {level}':>9}" for level in levels)
    lines = ["", f"synthetic catalogue, teacher-forced accuracy{'':<2}{head}"]
    for share, what in ((1 / 3, "a third of the steps, validation"), (1.0, "all steps, validation")):
        for name, rows in curves.items():
            row = rows_at(rows, share)
            values = "".join(f"{row[f'accuracy_{level}']:>9.3f}" for level in levels)
            lines.append(
                f"{name + ', ' + what:<46}{values}" if len(name + what) < 44 else f"{name}\n  {what:<44}{values}"
            )
    for name, report in reports.items():
        values = "".join(f"{value:>9.3f}" for value in report["teacher_forcing"]["accuracy"])
        lines.append(f"{name}\n  {'all steps, test':<44}{values}")
    values = "".join(f"{value:>9.3f}" for value in reports[PLAIN]["count_table_accuracy"])
    lines.append(f"{'count table of prefixes, test':<46}{values}")
    lines += ["", f"{'next item, test':<46}{'R@10':>9}{'N@10':>9}{'hit rate':>10}"]
    for name, report in reports.items():
        for search, row in report["searches"].items():
            figures = f"{row['recall@10']:>9.4f}{row['ndcg@10']:>9.4f}{row['hit_rate'][-1]:>10.3f}"
            lines.append(f"{name + ', ' + search:<46}{figures}")
    for name, row in reports[PLAIN]["floors"].items():
        lines.append(f"{name:<46}{row['recall@10']:>9.4f}{row['ndcg@10']:>9.4f}")
    lines += ["", f"{'training step, T = 200,000':<46}{'ms':>9}"]
    lines += [f"{name:<46}{value:>9.1f}" for name, value in results["step_ms"].items()]
    lines += ["", f"learning curves: {results['picture']}"]
    return "\n".join(lines)
