"""Learning curves as a picture: the accuracy of each level while models train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..._files import write_file

# Colours that stay apart in print and for colour-blind eyes (Okabe and Ito), and lines that do so without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
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
    import numpy as np

    first = next(iter(models.values()))[0][0]
    levels = sorted(int(name[9:]) for name in first if name.startswith("accuracy_"))
    figure = new_figure(3.1 * len(levels), 3.4)
    panels = figure.subplots(1, len(levels), squeeze=False)[0]
    for panel, level in zip(panels, levels, strict=True):
        for (name, runs), colour, line in zip(models.items(), COLOURS, _LINES, strict=False):
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
    named = panels[0].get_legend_handles_labels()
    figure.legend(*named, fontsize=8, frameon=False, loc="outside lower center", ncols=len(named[1]))
    figure.suptitle(title, fontsize=11)
    save_figure(figure, file)


def new_figure(width: float, height: float) -> Any:
    """A figure of so many inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'prefixmem_fast[train]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, file: str | Path) -> None:
    kind = Path(file).suffix.lstrip(".").lower() or "png"
    write_file(Path(file), lambda temporary: figure.savefig(temporary, format=kind, dpi=150))


def rows_at(rows: Sequence[Mapping[str, Any]], share: float) -> Mapping[str, Any]:
    """The validation nearest to a share of a run's steps."""
    return min(rows, key=lambda row: abs(row["step"] - share * rows[-1]["step"]))


def plot_catalogue(report: Mapping[str, Any], file: str | Path) -> None:
    """Draw what `prefixmem inspect` counts: codes by level, prefixes and the rows they share, hot prefixes.

    Args:
        report: the object that `prefixmem inspect --json` prints.
        file: .png or any other format of matplotlib.

    Raises:
        ValueError: matplotlib is not installed.
    """
    draw = [_codes, _prefixes, _shared_rows] + ([_hot] if "hot" in report else [])
    figure = new_figure(3.6 * len(draw), 3.5)
    for panel, draw_panel in zip(figure.subplots(1, len(draw)), draw, strict=True):
        draw_panel(panel, report)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{Path(report['index']).name}: {report['items']:,} items", fontsize=11)
    save_figure(figure, file)


def _codes(panel: Any, report: Mapping[str, Any]) -> None:
    """Codes used, and as how many evenly used ones, of each codebook."""
    levels = report["levels"]
    places = range(len(levels))
    panel.bar(places, [level["size"] for level in levels], color="0.88", label="codebook")
    panel.bar(places, [level["used"] for level in levels], width=0.55, color=COLOURS[5], label="codes used")
    panel.bar(places, [level["perplexity"] for level in levels], width=0.25, color=COLOURS[0], label="perplexity")
    _name(panel, "codes of each level", "level", [level["level"] for level in levels])
    panel.set_ylim(top=1.35 * max(level["size"] for level in levels))  # room for the legend
    panel.legend(fontsize=8, frameon=False, ncols=2, loc="upper left")


def _all_orders(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Orders within an item by their number, cross-item orders by the codes of the item beside its predecessor's."""
    levels = len(report["prefixes"])
    across = report.get("cross_item", {"orders": ()})["orders"]
    return [(str(order["order"]), order) for order in report["orders"]] + [
        (f"L+{order['order'] - levels}", order) for order in across
    ]


def _below(report: Mapping[str, Any]) -> str:
    if "cross_item" not in report:
        return "order"
    back = report["cross_item"]["history"]
    return f"order (L+l: {'the item' if back == 1 else f'one of the {back} items'} before, and l codes)"


def _prefixes(panel: Any, report: Mapping[str, Any]) -> None:
    """Distinct prefixes of each order beside the rows of a head's table."""
    orders = _all_orders(report)
    places = range(len(orders))
    panel.bar(places, [order["prefixes"] for _, order in orders], color=COLOURS[0], label="distinct prefixes")
    for place, (_, order) in zip(places, orders, strict=True):
        label = "rows of a table" if place == 0 else None
        panel.plot([place - 0.45, place + 0.45], [order["table_rows"]] * 2, color=COLOURS[1], linewidth=2, label=label)
    panel.set_yscale("log")
    heights = [order[name] for _, order in orders for name in ("prefixes", "table_rows")]
    panel.set_ylim(max(min(heights) / 4, 0.5), 30 * max(heights))  # the top is room for the legend
    _name(panel, "prefixes and rows", _below(report), [name for name, _ in orders])
    panel.legend(fontsize=8, frameon=False, loc="upper left")


def _shared_rows(panel: Any, report: Mapping[str, Any]) -> None:
    """The share of prefixes whose row another one has too, the mean and the range of the heads."""
    orders = _all_orders(report)
    shares = [[100 * count / order["prefixes"] for count in order["sharing"]] for _, order in orders]
    means = [sum(heads) / len(heads) for heads in shares]
    spread = [
        [mean - min(heads) for mean, heads in zip(means, shares, strict=True)],
        [max(heads) - mean for mean, heads in zip(means, shares, strict=True)],
    ]
    colours = [COLOURS[2] if order["exact"] else COLOURS[1] for _, order in orders]
    panel.bar(range(len(orders)), means, yerr=spread, capsize=2, color=colours)
    for place, ((_, order), heads) in enumerate(zip(orders, shares, strict=True)):
        text = "exact" if order["exact"] else f"{means[place]:.1f}"
        panel.annotate(text, (place, max(heads)), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    panel.set_ylim(0, max(1.15 * max(map(max, shares)), 1))
    _name(panel, "prefixes that share a row (%)", _below(report), [name for name, _ in orders])


def _hot(panel: Any, report: Mapping[str, Any]) -> None:
    """The share of interactions that the most frequent prefixes of each length have."""
    tops = list(report["hot"][0]["top"])
    width = 0.8 / len(tops)
    for i, (top, colour) in enumerate(zip(tops, (COLOURS[0], COLOURS[5], "0.8"), strict=True)):
        places = [row + (i - (len(tops) - 1) / 2) * width for row in range(len(report["hot"]))]
        panel.bar(
            places, [100 * row["top"][top] for row in report["hot"]], width=width, color=colour, label=f"top {top}"
        )
    panel.set_ylim(0, 125)  # room for the legend
    panel.set_yticks(range(0, 101, 25))
    _name(panel, "interactions of hot prefixes (%)", "length of the prefix", [row["length"] for row in report["hot"]])
    panel.legend(fontsize=8, frameon=False, ncols=3, loc="upper left", columnspacing=1, handlelength=1)


def _name(panel: Any, title: str, below: str, ticks: Sequence[Any]) -> None:
    panel.set_title(title, fontsize=10)
    panel.set_xlabel(below, fontsize=9)
    panel.set_xticks(range(len(ticks)), ticks)
