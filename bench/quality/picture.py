"""Recall@10 of arms, of counts and of published models as one picture, a panel a data set."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixmem_fast.recommender.evaluation.plots import COLOURS, new_figure, save_figure

from ..rows import Row
from .arms import ARMS, SETS

_GROUPS = {
    "seen": "targets that followed the last item somewhere in training",
    "new": "other targets",
}
_COUNTS = {"markov": "counts: first-order Markov", "decayed": "counts: decayed", "lagged": "counts: lags"}


def plot_recall(studied: Mapping[str, Mapping[str, Sequence[Row]]], file: Path, drawn: Sequence[str]) -> None:
    """Draw Recall@10 as bars of two parts, transitions that training has seen and others.

    Args:
        studied: for each set the rows of each arm by seed.
        drawn: the arms, from above.
    """
    figure = new_figure(5.6 * len(studied), 4.2)
    panels = figure.subplots(1, len(studied), squeeze=False)[0]
    for panel, (name, runs) in zip(panels, studied.items(), strict=True):
        _draw_set(panel, name, {arm: runs[arm] for arm in drawn if arm in runs})
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside lower center", ncols=len(labels))
    save_figure(figure, file)


def parts_of(row: Row, floor: str | None = None) -> list[float]:
    """What each group of transitions adds to the Recall@10 of all examples, of the arm or of a count beside it."""
    test = row["test"]
    found = test["searches"]["constrained"]["by_transition"]
    share = {group: test["transitions"][group]["examples"] / test["examples"] for group in _GROUPS}
    recall = {g: test["transitions"][g][f"{floor}_recall@10"] if floor else found[g]["recall@10"] for g in _GROUPS}
    return [share[group] * recall[group] for group in _GROUPS]


def _draw_set(panel: Any, name: str, runs: Mapping[str, Sequence[Row]]) -> None:
    bars = [(ARMS[arm].what, [parts_of(row) for row in rows]) for arm, rows in runs.items()]
    first = next(iter(runs.values()))[0]
    bars += [(label, [parts_of(first, floor)]) for floor, label in _COUNTS.items()]
    left = [0.0] * len(bars)
    for i, (label, colour) in enumerate(zip(_GROUPS.values(), (COLOURS[0], COLOURS[5]), strict=True)):
        widths = [statistics.mean(parts[i] for parts in seeds) for _, seeds in bars]
        panel.barh(range(len(bars)), widths, left=left, color=colour, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    spreads = {place: statistics.stdev(map(sum, seeds)) for place, (_, seeds) in enumerate(bars) if len(seeds) > 1}
    measured = [left[place] for place in spreads]
    panel.errorbar(measured, [*spreads], xerr=[*spreads.values()], fmt="none", color="black", linewidth=0.8, capsize=2)
    published = [(f"published: {model}", recall) for model, (recall, _) in SETS[name].published.items()]
    panel.barh(range(len(bars), len(bars) + len(published)), [recall for _, recall in published], color="0.8")
    labels = [label for label, _ in (*bars, *published)]
    totals = [*left, *(recall for _, recall in published)]
    ends = [total + spreads.get(place, 0.0) for place, total in enumerate(totals)]
    for place, (total, end) in enumerate(zip(totals, ends, strict=True)):
        panel.annotate(f"{total:.4f}", (end, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    panel.set_xlim(0, 1.2 * max(ends))
    panel.set_ylim(len(labels) - 0.4, -0.6)  # the first arm is at the top
    panel.set_yticks(range(len(labels)), labels, fontsize=8)
    panel.tick_params(axis="x", labelsize=8)
    panel.set_title(name, fontsize=10)
    panel.set_xlabel("Recall@10", fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)
