"""Pictures of a machine's rows: time against size, percent of the floor, speed-up over others, memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prefixmem_fast._files import write_file

from .report import OURS, main_times, short
from .rows import Row, describe, workload_key

COLOURS = {
    "prefixmem_fast": "#0b6e4f", "plain PyTorch, one fused table": "#d1495b", "eager PyTorch": "#edae49",
    "FBGEMM": "#30638e", "torch.compile": "#8d6a9f", "LigerEmbedding": "#7f7f7f",
}  # fmt: skip
STYLES = ("-", "--", ":", "-.")


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """Draw what the rows allow; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    made = {"speed_up.png": _speed_up, "time.png": _time, "floor.png": _floor, "memory.png": _memory}
    return [path for name, picture in made.items() if (path := _save(picture, rows, folder / name))]


def _save(picture: Callable, rows: list[Row], path: Path) -> Path | None:
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "0"}):
        figure = picture(rows, plt)
        if figure is None:
            return None
        options = {"format": "png", "dpi": 130, "bbox_inches": "tight", "metadata": {"Software": None}}
        write_file(path, lambda temporary: figure.savefig(temporary, **options))
        plt.close(figure)
    return path


def _first(rows: list[Row], benchmark: str) -> list[Row]:
    """Main times of a benchmark's first workload."""
    here = [row for row in main_times(rows) if row["benchmark"] == benchmark]
    return [row for row in here if row["workload"] == here[0]["workload"]]


def _colour(name: str) -> str:
    return next((colour for start, colour in COLOURS.items() if name.startswith(start)), "#444444")


def _speed_up(rows: list[Row], plt):
    """How many times our time the others take, workload by workload."""
    found = {name: _first(rows, name) for name in dict.fromkeys(row["benchmark"] for row in rows)}
    found = {
        name: here
        for name, here in found.items()
        if len(here) > 1 and not name.endswith("sweep") and name != "language-model"
    }
    if not found:
        return None
    figure, axes = plt.subplots(
        len(found), 1, layout="constrained", figsize=(9, 0.55 + sum(0.27 * len(here) + 0.5 for here in found.values())),
        gridspec_kw={"height_ratios": [len(here) + 1.5 for here in found.values()]},
    )  # fmt: skip
    for axis, (name, here) in zip([axes] if len(found) == 1 else axes, found.items(), strict=True):
        ours = next((row for row in here if row["provider"].startswith(OURS)), here[0])
        ratios = [row["p50"] / ours["p50"] for row in here]
        axis.barh(range(len(here)), ratios, color=[_colour(row["provider"]) for row in here], height=0.72)
        axis.set_yticks(range(len(here)), [row["provider"] for row in here])
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_xlim(min(0.5, *ratios) * 0.8, max(2.0, *ratios) * 2.5)
        axis.axvline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
        axis.set_xticks([tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if tick < axis.get_xlim()[1]])
        axis.set_xlim(left=min(0.5, *ratios) * 0.8)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axis.minorticks_off()
        for i, (row, ratio) in enumerate(zip(here, ratios, strict=True)):
            axis.text(ratio, i, f"  {short(ratio)}x, {short(row['p50'])} ms", va="center", fontsize=8)
        axis.set_title(f"{name}: {describe(here[0]['workload'])}", loc="left", fontsize=9, fontweight="bold")
    axis.set_xlabel("time, as a multiple of the first line's")
    return figure


def _time(rows: list[Row], plt):
    """Time against the size of the batch."""
    kinds = {"forward": ("forward", "forward-sweep"), "training": ("training", "training-sweep")}
    found = {kind: [r for r in main_times(rows) if r["benchmark"] in names] for kind, names in kinds.items()}
    found = {kind: _sizes(here) for kind, here in found.items()}
    found = {kind: here for kind, here in found.items() if len({r["workload"]["sids"] for r in here}) > 1}
    if not found:
        return None
    figure, axes = plt.subplots(1, len(found), figsize=(5.4 * len(found), 4.6))
    for axis, (kind, here) in zip([axes] if len(found) == 1 else axes, found.items(), strict=True):
        seen: dict[str, int] = {}
        for name in dict.fromkeys(row["provider"] for row in here):
            line = sorted({r["workload"]["sids"]: r for r in here if r["provider"] == name}.items())
            if len(line) < 2:
                continue
            colour = _colour(name)
            style = STYLES[seen.setdefault(colour, 0) % len(STYLES)]
            seen[colour] += 1
            sizes, times = zip(*((size, row["p50"]) for size, row in line), strict=True)
            low, high = zip(*((row["p20"], row["p80"]) for _, row in line), strict=True)
            axis.plot(sizes, times, style, color=colour, marker="o", markersize=3, label=name)
            axis.fill_between(sizes, low, high, color=colour, alpha=0.12, linewidth=0)
        floors = {
            r["workload"]["sids"]: 1e3 * r["floor"]["distinct_bytes"] / r["ceilings"]["copy_bytes_per_second"]
            for r in here
            if "floor" in r
        }
        axis.plot(
            *zip(*sorted(floors.items()), strict=True), color="#bbbbbb", label="floor: its bytes at copy bandwidth"
        )
        axis.set(xscale="log", yscale="log", xlabel="Semantic IDs", ylabel="ms")
        shape = {k: v for k, v in here[0]["workload"].items() if k != "sids"}
        axis.set_title(f"{kind}: {describe(shape)}", loc="left", fontsize=9, fontweight="bold")
        axis.legend(fontsize=7, frameon=False, loc="upper left")
        axis.set_ylim(top=axis.get_ylim()[1] * 12)  # room for the legend
    figure.tight_layout()
    return figure


def _sizes(rows: list[Row]) -> list[Row]:
    """Rows whose workloads differ from the first one in the number of SIDs alone."""
    same = lambda row: {k: v for k, v in row["workload"].items() if k != "sids"}  # noqa: E731
    return [row for row in rows if same(row) == same(rows[0])]


def _floor(rows: list[Row], plt):
    """Percent of the floor that ours reach, by workload."""
    bars: dict[str, list[tuple[str, float, float]]] = {"forward": [], "backward + update": []}
    for row in rows:
        if "floor" in row and row["metric"] in bars and row["benchmark"] != "gradient":
            if row["provider"] not in (OURS, f"{OURS}, fused, row-wise Adagrad"):
                continue
            if row["benchmark"].startswith("training") == (row["metric"] == "forward"):
                continue
            label = ("tokens: " if row["benchmark"] == "tokens" else "") + describe(row["workload"])
            bars[row["metric"]].append((label, row["floor"]["percent_distinct"], row["floor"]["percent_algorithmic"]))
    bars = {metric: list(dict.fromkeys(here)) for metric, here in bars.items() if here}
    if not bars:
        return None
    figure, axes = plt.subplots(
        len(bars), 1, layout="constrained", figsize=(8.5, 0.9 + sum(0.3 * len(here) + 0.5 for here in bars.values())),
        gridspec_kw={"height_ratios": [len(here) for here in bars.values()]},
    )  # fmt: skip
    for axis, (metric, here) in zip([axes] if len(bars) == 1 else axes, bars.items(), strict=True):
        places = range(len(here))
        axis.barh(places, [one[2] for one in here], color="#0b6e4f", alpha=0.3, height=0.75, label="each read counted")
        axis.barh(places, [one[1] for one in here], color="#0b6e4f", height=0.4, label="distinct bytes")
        axis.set_yticks(places, [one[0] for one in here])
        axis.invert_yaxis()
        title = f"{metric}, fused, row-wise Adagrad" if "update" in metric else metric
        axis.set_title(title, loc="left", fontsize=9, fontweight="bold")
        for i, one in enumerate(here):
            axis.text(max(one[1:]), i, f"  {one[1]:.2g}", va="center", fontsize=8)
        axis.margins(y=0.02)
    axis.set_xlabel("% of the copy bandwidth of the same run")
    figure.legend(*axis.get_legend_handles_labels(), fontsize=7, frameon=False, loc="outside upper right", ncols=2)
    return figure


def _memory(rows: list[Row], plt):
    """Peak memory: tables and optimizer state, and what a step takes beside them."""
    peaks = [row for row in rows if row.get("metric") == "peak memory"]
    groups = {key: [r for r in peaks if workload_key(r) == key] for key in dict.fromkeys(map(workload_key, peaks))}
    if not groups:
        return None
    height = 0.6 + sum(0.3 * len(here) + 0.7 for here in groups.values())
    figure, axes = plt.subplots(
        len(groups), 1, layout="constrained", figsize=(8.5, height),
        gridspec_kw={"height_ratios": [len(here) + 1 for here in groups.values()]},
    )  # fmt: skip
    for axis, (key, here) in zip([axes] if len(groups) == 1 else axes, groups.items(), strict=True):
        held = [row["held_mib"] for row in here]
        beside = [max(row["p50"] - row["held_mib"], 0) for row in here]
        axis.barh(range(len(here)), held, color="#30638e", height=0.7, label="held between steps")
        axis.barh(
            range(len(here)), beside, left=held, color="#edae49", height=0.7, label="beside it, at the peak of a step"
        )
        axis.set_yticks(range(len(here)), [row["provider"] for row in here])
        axis.invert_yaxis()
        axis.set_xlabel("MiB")
        axis.set_xlim(right=max(1.0, *(row["p50"] for row in here)) * 1.25)
        for i, (row, extra) in enumerate(zip(here, beside, strict=True)):
            axis.text(row["p50"], i, f"  {row['p50']:,.0f}, {extra:,.0f} beside", va="center", fontsize=8)
        axis.set_title(f"{key[0]}: {describe(here[0]['workload'])}", loc="left", fontsize=9, fontweight="bold")
        axis.legend(fontsize=7, frameon=False, loc="lower right")
    return figure
