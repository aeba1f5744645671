"""Learning curves as a picture: the accuracy of each level while models train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..._files import write_file

# Colours that stay apart in print and for colour-blind eyes (Okabe and Ito), and lines that do so without colour.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)))


def plot_curves(
    models: Mapping[str, Sequence[Sequence[Mapping[str, float]]]],
    file: str | Path,
    title: str,
    *,
    floors: Sequence[float] | None = None,
) -> None:
    """Draw TF-L of every level by training step, a panel a level.

    Args:
        models: for each name its runs, each the `validation` rows of a run's curves; runs of several seeds are drawn as
            their mean with a band from the lowest to the highest.
        file: .png or any other format of matplotlib.
        title: what the data are; says so where they are synthetic.
        floors: accuracy of the count table at each level, as a line.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'prefixmem_fast[train]'") from None
    import numpy as np

    first = next(iter(models.values()))[0][0]
    levels = sorted(int(name[9:]) for name in first if name.startswith("accuracy_"))
    figure = Figure(figsize=(3.1 * len(levels), 3.2), layout="constrained")
    panels = figure.subplots(1, len(levels), squeeze=False)[0]
    for panel, level in zip(panels, levels, strict=True):
        for (name, runs), colour, line in zip(models.items(), _COLOURS, _LINES, strict=False):
            count = min(map(len, runs))
            steps = [row["step"] for row in runs[0][:count]]
            values = np.array([[row[f"accuracy_{level}"] for row in run[:count]] for run in runs])
            panel.plot(steps, values.mean(0), color=colour, linestyle=line, label=name, linewidth=1.6)
            if len(runs) > 1:
                panel.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)
        if floors is not None:
            panel.axhline(floors[level - 1], color="0.5", linewidth=0.8, linestyle=(0, (2, 2)), label="count table")
        panel.set_title(f"level {level}", fontsize=10)
        panel.set_xlabel("training step", fontsize=9)
        panel.set_ylim(bottom=0)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("teacher-forced accuracy", fontsize=9)
    panels[0].legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    kind = Path(file).suffix.lstrip(".") or "png"
    write_file(Path(file), lambda temporary: figure.savefig(temporary, format=kind, dpi=150))


def rows_at(rows: Sequence[Mapping[str, Any]], share: float) -> Mapping[str, Any]:
    """The validation nearest to a share of a run's steps."""
    return min(rows, key=lambda row: abs(row["step"] - share * rows[-1]["step"]))
