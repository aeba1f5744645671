"""Tables in Markdown from rows, and the page of a machine."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from prefixmem_fast._files import write_file

from .rows import Row, describe, latest, read_rows, workload_key

OURS = "prefixmem_fast"


def main_metric(rows: Iterable[Row]) -> str:
    """The time by which providers of a workload are compared."""
    metrics = [row["metric"] for row in rows if row.get("unit") == "ms"]
    return next((name for name in ("step", "backward", "forward") if name in metrics), metrics[0] if metrics else "")


def main_times(rows: Iterable[Row]) -> list[Row]:
    """The rows of every workload's main time."""
    kept = [(main_metric(here), here) for here in _by_workload(rows).values()]
    return [row for main, here in kept for row in here if main and row.get("metric") == main]


def table(rows: list[Row]) -> str:
    """One workload: milliseconds by provider, then memory and launches, then who was left out and remarks."""
    timed = [row for row in rows if row.get("unit") == "ms"]
    metrics = list(dict.fromkeys(row["metric"] for row in timed if row["metric"] != "host"))
    main = main_metric(rows)
    found = {(row["provider"], row["metric"]): row for row in rows if "metric" in row}
    names = list(dict.fromkeys(row["provider"] for row in timed))
    extra = [name for name in ("host", "launches", "peak memory") if any(key[1] == name for key in found)]
    with_floor = [name for name in metrics if any("floor" in row for row in timed if row["metric"] == name)][:1]
    head = ["ms", *metrics, "20 to 80 %", "x the first"]
    head += [f"% of floor, {name}" if len(metrics) > 1 else "% of floor" for name in with_floor]
    head += [{"host": "host, ms", "peak memory": "peak MiB, of it held"}.get(name, name) for name in extra]
    lines = []
    for name in names:
        first, here = found.get((names[0], main)), found.get((name, main))
        line = [name, *(_number(found.get((name, metric))) for metric in metrics)]
        line += [f"{short(here['p20'])} to {short(here['p80'])}", f"{here['p50'] / first['p50']:.2f}"]
        line += [_floor(found.get((name, metric))) for metric in with_floor]
        for metric in extra:
            row = found.get((name, metric))
            line.append(_number(row) + (f", {row['held_mib']:,.0f}" if row and "held_mib" in row else ""))
        lines.append(line)
    text = markdown(head, lines) if lines else ""
    notes = [f"{row['provider']}: {row['skipped']}" for row in rows if "skipped" in row]
    remarks: dict[str, list[str]] = {}
    for row in timed:
        if row["metric"] == main:
            for remark in row.get("remarks", ()):
                remarks.setdefault(remark, []).append(row["provider"])
    notes += [f"{', '.join(who)}: {what}" for what, who in remarks.items()]
    return text + "".join(f"\n- {note}" for note in notes) + "\n"


def write_report(path: Path, folder: Path) -> list[Path]:
    """Tables and plots of the latest run of every workload in a file of rows, in `folder`.

    Raises:
        ValueError: the file holds no row, or one that is none.
    """
    from .plots import draw

    rows = latest(read_rows(path))
    if not rows:
        raise ValueError(f"{path} holds no rows; python -m bench run writes them")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        written = draw(rows, folder)
    except ImportError as error:
        print(f"no plots: {error}; pip install matplotlib", file=sys.stderr)
        written = []
    page = folder / "tables.md"
    text = _page(rows, written)
    write_file(page, lambda temporary: Path(temporary).write_text(text))
    return [page, *written]


def _page(rows: list[Row], pictures: list[Path]) -> str:
    about = rows[-1]
    found, versions = about["machine"], about["machine"]["versions"]
    gpu = found["gpus"][0] if found["gpus"] else None
    name = f"{gpu['name']}, driver {gpu['driver']}" if gpu else f"{found['cpu']}, {about['threads']} threads"
    copies = sorted({row["ceilings"]["copy_bytes_per_second"] / 1e9 for row in rows})
    shorten = re.compile("([0-9a-f]{12})[0-9a-f]{28}")
    runs = dict.fromkeys((shorten.sub(r"\1", row["commit"]), row["date"][:10]) for row in rows)
    text = [
        f"# {name}\n",
        "Written by `python -m bench report`. Medians; percent of the floor is the time that the fewest bytes take "
        "at the copy bandwidth of the same run, over the time measured: rows that several Semantic IDs share counted "
        "once / once for each.\n",
        f"Copies move {' to '.join(f'{one:.4g}' for one in dict.fromkeys((copies[0], copies[-1])))} GB/s, read and "
        f"written. {', '.join(f'{package} {version}' for package, version in versions.items())}. Commits "
        f"{', '.join(f'{commit} of {date}' for commit, date in runs)}.\n",
        *(f"![{picture.stem}]({picture.name})" for picture in pictures),
    ]
    for workload, here in _by_workload(rows).items():
        text.append(f"\n## {workload[0]}: {describe(here[0]['workload'])}\n\n{table(here)}")
    return "\n".join(text)


def _by_workload(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(workload_key(row), []).append(row)
    return found


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """Columns of equal width, so that it reads as text too."""
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    rule = "|" + "|".join("-" * (width + 1) + ("-" if i == 0 else ":") for i, width in enumerate(widths)) + "|"

    def written(line: list[str]) -> str:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "| " + " | ".join(cells) + " |"

    return "\n".join([written(head), rule, *map(written, lines)]) + "\n"


def short(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _number(row: Row | None) -> str:
    return short(row["p50"]) if row else ""


def _floor(row: Row | None) -> str:
    if not row or "floor" not in row:
        return ""
    return f"{row['floor']['percent_distinct']:.3g} / {row['floor']['percent_algorithmic']:.3g}"
