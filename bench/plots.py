"""Pictures of a machine's rows: speed-up over others, time against size, percent of the floor."""

from __future__ import annotations

from pathlib import Path

from prefixmem_fast._files import write_file

from .rows import OURS, Row, by_workload, describe, floor_percent, main_times, short

COLOURS = {
    OURS: "#0b6e4f",
    "plain PyTorch, one fused table": "#d1495b",
    "eager PyTorch": "#edae49",
    "FBGEMM": "#30638e",
    "torch.compile": "#8d6a9f",
    "": "#7f7f7f",
}
LINES = ("-", "--", ":", "-.")
TITLE = {"axes.titlesize": 9, "axes.titleweight": "bold", "axes.titlelocation": "left"}
LEGEND = {"legend.frameon": False, "legend.fontsize": 7}
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, **TITLE, **LEGEND}


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """Draw what the rows allow; returns the files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    written = []
    for draw_on in (_speed_up, _time, _floor):
        path = folder / f"{draw_on.__name__.strip('_')}.png"
        with matplotlib.rc_context(STYLE):
            figure = Figure(layout="constrained")
            draw_on(figure, rows)
            if figure.axes:
                options = {"format": "png", "dpi": 130, "bbox_inches": "tight", "metadata": {"Software": None}}
                write_file(path, lambda temporary: figure.savefig(temporary, **options))  # noqa: B023
                written.append(path)
    return written


def _panels(figure, groups: dict[str, list[Row]]):
    """(axis, title, rows) of each group, below each other, as high as they have rows."""
    lines = [len(group) + 1.5 for group in groups.values()]
    figure.set_size_inches(9, 0.6 + sum(0.28 * count + 0.2 for count in lines))
    axes = figure.subplots(len(groups), 1, squeeze=False, gridspec_kw={"height_ratios": lines})[:, 0] if groups else []
    return zip(axes, groups, groups.values(), strict=True)


def _bars(axis, names: list[str], widths: list[float], notes: list[str], **options) -> None:
    """A bar for each name, from top to bottom, with a note at its end."""
    axis.barh(range(len(names)), widths, height=0.72, **options)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    for i, (width, note) in enumerate(zip(widths, notes, strict=True)):
        axis.text(width, i, f"  {note}", va="center", fontsize=8)


def _colour(provider: str) -> str:
    return next(colour for start, colour in COLOURS.items() if provider.startswith(start))


def _speed_up(figure, rows: list[Row]) -> None:
    """How many times our time the others take, on the first workload of each benchmark."""
    firsts: dict[str, list[Row]] = {}
    for group in by_workload(main_times(rows)):
        name = group[0]["benchmark"]
        if len(group) > 1 and not name.endswith("sweep") and name != "language-model":
            firsts.setdefault(name, group)
    groups = {f"{name}: {describe(group[0]['workload'])}": group for name, group in firsts.items()}
    for axis, title, group in _panels(figure, groups):
        ours = next((row for row in group if row["provider"].startswith(OURS)), group[0])
        ratios = [row["p50"] / ours["p50"] for row in group]
        names = [row["provider"] for row in group]
        notes = [f"{short(ratio)}x, {short(row['p50'])} ms" for row, ratio in zip(group, ratios, strict=True)]
        _bars(axis, names, ratios, notes, color=list(map(_colour, names)))
        axis.set(title=title, xscale="log", xlim=(min(0.5, *ratios) * 0.8, max(2.0, *ratios) * 2.5))
        axis.minorticks_off()
        axis.set_xticks([1], ["ours, on a logarithmic scale"])
        axis.axvline(1, color="#bbbbbb", linewidth=0.8, zorder=0)


def _time(figure, rows: list[Row]) -> None:
    """Time against the size of the batch, where the rest of the workload is that of the first one."""
    groups = {}
    for kind in ("forward", "training"):
        group = [row for row in main_times(rows) if row["benchmark"] in (kind, f"{kind}-sweep")]
        group = sorted((row for row in group if _shape(row) == _shape(group[0])), key=_sids)
        if len(set(map(_sids, group))) > 1:
            groups[f"{kind}: {describe(_shape(group[0]))}"] = group
    figure.set_size_inches(5.4 * max(len(groups), 1), 4.6)
    axes = figure.subplots(1, len(groups), squeeze=False)[0] if groups else []
    for axis, (title, group) in zip(axes, groups.items(), strict=True):
        seen: list[str] = []  # colours
        for name in dict.fromkeys(row["provider"] for row in group):
            line = list({_sids(row): row for row in group if row["provider"] == name}.values())
            if len(line) > 1:
                style = {"color": _colour(name), "linestyle": LINES[seen.count(_colour(name)) % len(LINES)]}
                seen.append(_colour(name))
                sizes, low, high = list(map(_sids, line)), [row["p20"] for row in line], [row["p80"] for row in line]
                axis.plot(sizes, [row["p50"] for row in line], marker="o", markersize=3, label=name, **style)
                axis.fill_between(sizes, low, high, color=style["color"], alpha=0.12, linewidth=0)
        copied = {_sids(row): _copy_ms(row) for row in group if "floor" in row}
        axis.plot(list(copied), list(copied.values()), color="#bbbbbb", label="floor: its bytes at copy bandwidth")
        axis.set(title=title, xscale="log", yscale="log", xlabel="Semantic IDs", ylabel="ms")
        axis.legend(loc="upper left", bbox_to_anchor=(0, -0.14))  # below: lines are everywhere inside


def _copy_ms(row: Row) -> float:
    return 1e3 * row["floor"]["distinct"] / row["ceilings"]["copy_bytes_per_second"]


def _sids(row: Row) -> int:
    return row["workload"]["sids"]


def _shape(row: Row) -> dict:
    return {name: value for name, value in row["workload"].items() if name != "sids"}


def _floor(figure, rows: list[Row]) -> None:
    """Percent of the floor that ours reach, by workload."""
    groups = {}
    for metric, provider in (("forward", OURS), ("backward + update", f"{OURS}, fused, row-wise Adagrad")):
        group = [row for row in rows if (row.get("metric"), row["provider"]) == (metric, provider) and "floor" in row]
        if group:
            groups[f"{metric}, {provider}"] = group
    for axis, title, group in _panels(figure, groups):
        names = [("tokens: " if row["benchmark"] == "tokens" else "") + describe(row["workload"]) for row in group]
        distinct, every_read = zip(*map(floor_percent, group), strict=True)
        _bars(axis, names, every_read, list(map(short, every_read)), color="#8fbcae", label="each read counted")
        axis.barh(range(len(names)), distinct, color=COLOURS[OURS], height=0.4, label="distinct bytes")
        axis.set(title=title, xlabel="% of the copy bandwidth of the same run")
        axis.legend(loc="lower right")
