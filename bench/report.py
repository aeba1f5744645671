"""Tables in Markdown from rows, and the page of a machine."""

from __future__ import annotations

import re
from pathlib import Path

from .rows import SLOWED, Row, by_workload, describe, floor_percent, hardware, main_metric, short

SPREAD = 0.2  # (p80 - p20) / p50 above which a note says so
UNITS = {"host": "host, ms", "peak memory": "peak MiB, of it tables and state"}  # else the metric's name


def table(rows: list[Row]) -> str:
    """One workload: milliseconds by provider, then memory and launches, then who was left out and remarks."""
    by_name = {(row["provider"], row["metric"]): row for row in rows if "metric" in row}
    timed = [row for row in rows if row.get("unit") == "ms"]
    providers = list(dict.fromkeys(row["provider"] for row in timed))
    metrics = list(dict.fromkeys(row["metric"] for row in timed if row["metric"] != "host"))
    counts = [name for name in ("host", "launches", "peak memory") if any(metric == name for _, metric in by_name)]
    with_floor = list(dict.fromkeys(row["metric"] for row in timed if "floor" in row))[:1]
    main = main_metric(rows)
    head = ["ms", *metrics, "20 to 80 %", "x the first"]
    head += [f"% of floor, {metric}" if len(metrics) > 1 else "% of floor" for metric in with_floor]
    head += [UNITS.get(name, name) for name in counts]
    lines = []
    for provider in providers:
        row = by_name[provider, main]
        cells = [_figure(by_name.get((provider, metric))) for metric in metrics]
        ratio = row["p50"] / by_name[providers[0], main]["p50"]
        cells += [f"{short(row['p20'])} to {short(row['p80'])}", f"{ratio:.2f}"]
        cells += [_percent_of_floor(by_name.get((provider, metric), {})) for metric in with_floor]
        cells += [_figure(by_name.get((provider, name))) for name in counts]
        lines.append([provider, *cells])
    notes = [f"{row['provider']}: {row['skipped']}" for row in rows if "skipped" in row]
    remarks: dict[str, list[str]] = {}
    for row in timed:
        for remark in _remarks(row) if row["metric"] == main else ():
            remarks.setdefault(remark, []).append(row["provider"])
    notes += [f"{', '.join(names)}: {remark}" for remark, names in remarks.items()]
    return (markdown(head, lines) if lines else "") + "".join(f"\n- {note}" for note in notes) + "\n"


def page(rows: list[Row], pictures: list[Path]) -> str:
    """All workloads of a machine, the last run of each."""
    record = rows[-1]
    gpus = record["machine"]["gpus"]
    copies = sorted({row["ceilings"]["copy_bytes_per_second"] / 1e9 for row in rows})
    commits = dict.fromkeys((re.sub("([0-9a-f]{12})[0-9a-f]{28}", r"\1", r["commit"]), r["date"][:10]) for r in rows)
    text = [
        f"# {', driver '.join([hardware(record), *(gpu['driver'] for gpu in gpus[:1])])}\n",
        "Written by `python -m bench report`. Medians; percent of the floor is the time that the fewest bytes take "
        "at the copy bandwidth of the same run, over the time measured: rows that several Semantic IDs share counted "
        "once / once for each.\n",
        f"Copies move {' to '.join(f'{rate:.4g}' for rate in dict.fromkeys((copies[0], copies[-1])))} GB/s, read and "
        f"written. {', '.join(f'{package} {version}' for package, version in record['versions'].items())}. Commits "
        f"{', '.join(f'{commit} of {date}' for commit, date in commits)}.\n",
        *(f"![{picture.stem}]({picture.name})" for picture in pictures),
    ]
    for group in by_workload(rows):
        text.append(f"\n## {group[0]['benchmark']}: {describe(group[0]['workload'])}\n\n{table(group)}")
    return "\n".join(text)


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """Columns of equal width, so that it reads as text too."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]

    def written(first: str, *cells: str) -> str:
        rest = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        return "| " + " | ".join([first.ljust(widths[0]), *rest]) + " |"

    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:]), ""])
    return "\n".join([written(*head), rule, *(written(*line) for line in lines)]) + "\n"


def _figure(row: Row | None) -> str:
    if row is None:
        return ""
    return short(row["p50"]) + (f", {row['state_mib']:,.0f}" if "state_mib" in row else "")


def _percent_of_floor(row: Row) -> str:
    return " / ".join(f"{percent:.3g}" for percent in floor_percent(row)) if "floor" in row else ""


def _remarks(row: Row) -> list[str]:
    """What to think of a time."""
    state = row.get("state", {})
    remarks = [f"clocks were held down by {SLOWED[reason]}" for reason in state.get("slowed_by", ())]
    remarks += [state["problem"]] if "problem" in state else []
    spread = (row["p80"] - row["p20"]) / row["p50"] if row["p50"] else 0.0
    return [*remarks, *[f"times spread by {spread:.0%} of the median, above {SPREAD:.0%}"] * (spread > SPREAD)]
