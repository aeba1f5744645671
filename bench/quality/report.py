"""The study as tables and pictures: mean and spread over seeds, at equal steps and at equal time, beside the floors."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from prefixmem_fast.recommender.evaluation.plots import plot_curves, rows_at

from ..rows import Row, read_rows
from .arms import ARMS, PACE, SETS, fullness, recipe
from .hits import bootstrap_interval, unpacked
from .picture import plot_recall


def report(folder: Path) -> int:
    """Write ``summary.md`` and a picture a set into the folder of the rows, and print the tables."""
    studied = {name: runs for name in SETS if (runs := read_runs(folder, name))}
    if not studied:
        raise ValueError(f"no rows in {folder}; python -m bench quality run writes them")
    lines = ["# The study", "", "Written by `python -m bench quality report` from the rows beside it.", "", _METHOD, ""]
    for name, runs in studied.items():
        lines += _of_set(name, runs, read_pace(folder, name))
        models = {arm: [row["validation"] for row in rows] for arm, rows in runs.items() if arm in _DRAWN}
        plot_curves(models, folder / f"{name}.png", f"{name}, validation")
        lines += [f"![learning curves of {name}]({name}.png)", ""]
    plot_recall(studied, folder / "recall.png", _BARS)
    lines += ["![Recall@10 of each arm and of the counts](recall.png)", ""]
    text = "\n".join(lines)
    (folder / "summary.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


_BARS = ("plain", "wide", "permuted", "prefixmem", "cross-item-permuted", "cross-item-alone", "cross-item")
_DRAWN = ("plain", "prefixmem", "cross-item", "cross-item-permuted", "sid-transformer")
_METHOD = """Mean ± standard deviation over seeds. TF-l is the teacher-forced accuracy of level l. Recall
(R) and NDCG (N) are of beams constrained by the trie; the hit rate is that of unconstrained beams. Arms
share data, order, steps, learning rate and schedule, but for a T5, which takes more steps; the checkpoint
of the lowest validation loss is tested. The widened model has as many parameters as the plain one and the
rows that PrefixMem reads for the catalogue's items, a part of its tables. Counting ranks items by what
followed those of the history in training (evaluation/baselines.py). A transition is seen where the target
directly followed the last item of its history somewhere in training."""


def read_runs(folder: Path, data_set: str) -> dict[str, list[Row]]:
    """Rows of each arm by seed, the last one where a run was repeated.

    Rows of other recipes are left out, and those of fewer test users or beams than the fullest test.
    """
    file = folder / f"{data_set}.jsonl"
    rows = read_rows(file, ("arm", "seed", "recipe", "test")) if file.is_file() else []
    rows = [row for row in rows if row["arm"] in ARMS and row["recipe"] == recipe(row["arm"], data_set)]
    fullest = max(map(fullness, rows), default=None)
    kept = {(row["arm"], row["seed"]): row for row in rows if fullness(row) == fullest}
    runs: dict[str, list[Row]] = {}
    for arm in ARMS:
        own = [row for (name, _), row in sorted(kept.items()) if name == arm]
        if own:
            runs[arm] = own
    return runs


def read_pace(folder: Path, data_set: str) -> dict[str, float]:
    """Seconds a step of each arm that `pace` has timed, the last time."""
    file = folder / PACE
    rows = read_rows(file, ("set", "arm", "seconds_per_step")) if file.is_file() else ()
    return {row["arm"]: row["seconds_per_step"] for row in rows if row["set"] == data_set}


def _of_set(name: str, runs: dict[str, list[Row]], pace: dict[str, float]) -> list[str]:
    first = next(iter(runs.values()))[0]
    test = first["test"]
    levels = range(1, len(test["count_table_accuracy"]) + 1)
    lines = [f"## {name}", "", f"{test['examples']} test examples, beams of {test['beams']}.", ""]
    tf = [(f"TF-{l}", lambda row, l=l: row["test"]["teacher_forcing"]["accuracy"][l - 1]) for l in levels]
    search = [
        (f"{short}@{k}", lambda row, m=f"{metric}@{k}": row["test"]["searches"]["constrained"][m])
        for metric, short, k in (("recall", "R", 10), ("ndcg", "N", 10), ("recall", "R", 50), ("recall", "R", 100))
    ]
    seen = [
        (f"R@10 {group}", lambda row, g=group: row["test"]["searches"]["constrained"]["by_transition"][g]["recall@10"])
        for group in ("seen", "new")
    ]
    more = [
        ("CE", lambda row: sum(row["test"]["teacher_forcing"]["loss"])),
        ("hit rate", lambda row: row["test"]["unconstrained"]["hit_rate"][-1]),
        ("L1 codes", lambda row: row["test"]["searches"]["constrained"]["first_codes"]),
    ]
    lines += _table("test", runs, [*tf, *search, *seen, *more])
    counted = [f"{value:.3f}" for value in test["count_table_accuracy"]]
    lines.append("| count table | | " + " | ".join([*counted, *[""] * len([*search, *seen, *more])]) + " |")
    for floor, metrics in test["floors"].items():
        figures = [
            f"{metrics[f'{m}@{k}']:.4f}" for m, k in (("recall", 10), ("ndcg", 10), ("recall", 50), ("recall", 100))
        ]
        figures += [f"{test['transitions'][group][f'{floor}_recall@10']:.4f}" for group in ("seen", "new")]
        lines.append(f"| {floor} | | " + " | ".join([*[""] * len(tf), *figures, *[""] * len(more)]) + " |")
    lines += _differences(runs, test["examples"])
    if published := SETS[name].published:
        known = ", ".join(f"{model} {recall:.4f} / {ndcg:.4f}" for model, (recall, ndcg) in published.items())
        lines += ["", f"Published R@10 / N@10, on all test users: {known}."]

    deepest = f"accuracy_{levels[-1]}"
    columns = [
        (f"TF-{levels[-1]}, a third of the steps", lambda row: rows_at(row["validation"], 1 / 3)[deepest]),
        (f"TF-{levels[-1]}, all steps", lambda row: row["validation"][-1][deepest]),
        ("CE, all steps", lambda row: row["validation"][-1]["loss"]),
        ("steps", lambda row: row["steps"]),
        ("parameters", lambda row: sum(row["parameters"].values())),
    ]
    compared = "Validation, at equal steps:"
    if "plain" in runs and "plain" in pace:
        time = runs["plain"][0]["steps"] * pace["plain"]
        compared = (
            f"Validation, at equal steps, and after the {time:.0f} s that the plain model's steps take on one thread, "
            "pre-training included, from the steps' times in pace.jsonl and interpolated between validations:"
        )
        columns[3:3] = [
            (f"TF-{levels[-1]}, equal time", lambda row: _at_time(row, time, pace, deepest)),
            ("CE, equal time", lambda row: _at_time(row, time, pace, "loss")),
            ("ms a step", lambda row: 1e3 * pace[_timed(row["arm"])]),
        ]
    lines += ["", compared, "", *_table("validation", runs, columns)]
    groups: list[tuple[str, Callable]] = []
    for third in ("rare", "medium", "popular"):
        accuracy = lambda row, t=third: row["test"]["teacher_forcing"]["accuracy_by_popularity"][t][-1]  # noqa: E731
        groups.append((f"TF-{levels[-1]} {third}", accuracy))
    for group in ("reachable", "unreachable"):
        groups.append((f"TF-{levels[-1]} {group}", lambda row, g=group: row["test"]["reachable"][g]["accuracy"][-1]))
        groups.append((f"R@10 {group}", lambda row, g=group: row["test"]["reachable"][g]["constrained_recall@10"]))
    lines += ["", "Test, by popularity of the prefix, and by what the plain model of seed 0 reaches:", ""]
    lines += [*_table("test", runs, groups), ""]
    return lines


def _differences(runs: dict[str, list[Row]], examples: int) -> list[str]:
    """Recall@10 of each arm less that of others, with intervals of 95 % by resampling the users, all seeds of each at
    once."""
    hits = {arm: np.mean([unpacked(row["test"]["hits@10"], examples) for row in rows], 0) for arm, rows in runs.items()}
    pairs = [(arm, other) for arm, other in _COMPARED if arm in hits and other in hits]
    if not pairs:
        return []
    lines = ["", "| Recall@10, test | difference | 95 % interval |", "|---|---|---|"]
    for arm, other in pairs:
        low, high = bootstrap_interval(hits[arm] - hits[other])
        mean = (hits[arm] - hits[other]).mean()
        lines.append(f"| {ARMS[arm].what}, less {ARMS[other].what} | {mean:+.4f} | {low:+.4f} to {high:+.4f} |")
    return lines


_COMPARED = (
    ("prefixmem", "plain"),
    ("prefixmem", "wide"),
    ("prefixmem", "permuted"),
    ("cross-item", "prefixmem"),
    ("cross-item", "cross-item-permuted"),
    ("cross-item", "cross-item-alone"),
    ("cross-item", "cross-item-1"),
    ("cross-item", "cross-item-input"),
    ("cross-item", "pretrained-prefixes"),
)


def _table(head: str, runs: dict[str, list[Row]], columns: Sequence[tuple[str, Callable[[Row], float]]]) -> list[str]:
    lines = [f"| {head} | seeds | " + " | ".join(name for name, _ in columns) + " |", "|" + "---|" * (len(columns) + 2)]
    for arm, rows in runs.items():
        figures = [_figure(rows, value) for _, value in columns]
        lines.append(f"| {ARMS[arm].what} | {len(rows)} | " + " | ".join(figures) + " |")
    return lines


def _figure(rows: list[Row], value: Callable[[Row], float]) -> str:
    values = []
    for row in rows:
        try:
            values.append(value(row))
        except KeyError:  # no equal time; the run that says what is reachable has no groups of its own
            continue
    if not values:
        return ""
    mean = statistics.mean(values)
    if mean >= 30:
        return f"{mean:,.0f}"
    digits = 2 if mean >= 1.5 else 4 if mean < 0.2 else 3
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


def _timed(arm: str) -> str:
    return ARMS[arm].steps_of or arm


def _at_time(row: Row, seconds: float, pace: dict[str, float], metric: str) -> float:
    """A validation's figure after some seconds of pre-training and training.

    KeyError where no step was timed, and where another number of steps stretches the learning rate's schedule.
    """
    if "steps" in ARMS[row["arm"]].options:
        raise KeyError("steps")
    steps = (seconds - row.get("pretraining", {}).get("seconds", 0.0)) / pace[_timed(row["arm"])]
    curve = [(validation["step"], validation[metric]) for validation in row["validation"]]
    return float(np.interp(steps, *zip(*curve, strict=True)))
