"""Results as JSON Lines: a record for each run, and rows that name their run.

    {"run": "20261122T115251.000-7cde74e", "machine": {...}, "versions": {...}, "commit": "...", "date": "...",
     "ceilings": {"copy_bytes_per_second": ...}}
    {"run": "20261122T115251.000-7cde74e", "benchmark": "training", "provider": "...",
     "workload": {"sids": 16384, ...}, "metric": "step", "unit": "ms", "p50": 1.2, "p20": 1.1, "p80": 1.3,
     "repeats": 40, "floor": {"distinct": ..., "every_read": ...}, "state": {...}}

A provider that was not measured has a row with "skipped", the reason, in place of metric and quantiles. `floor` is in
bytes, see `registry.Floor`; `state` is that of a GPU. Readers get each row with the record of its run.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

OURS = "prefixmem_fast"
# Reasons for which a GPU runs below its clocks; to be idle, or set so by its owner, is none.
SLOWED = {
    "SwPowerCap": "its power limit",
    "HwSlowdown": "a slow-down by the hardware",
    "SwThermalSlowdown": "its temperature",
    "HwThermalSlowdown": "its temperature, by the hardware",
    "HwPowerBrakeSlowdown": "the power supply",
}


def hardware(record: dict[str, Any]) -> str:
    """The machine in words."""
    machine = record["machine"]
    return machine["gpus"][0]["name"] if machine["gpus"] else f"{machine['cpu']}, {machine['threads']} threads"


def check_out(out: Path) -> None:
    """Whether `append_rows` can write there, asked before anything is measured. Nothing is made.

    Raises:
        ValueError: it is a folder, a pipe, a device other than the null device, a file of something else than rows, or
            it cannot be written; the message names --out.
    """
    give, name = "give a new file, or one of rows that this command wrote", " ".join(str(out).split())[:200]
    if out == Path():
        raise ValueError(f"--out is empty, or the folder that you are in; {give}")
    try:
        mode = os.stat(out).st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except (OSError, ValueError) as error:  # too long, links in a circle, a null character
        raise ValueError(f"--out {name} is no file's name ({getattr(error, 'strerror', error)}); {give}") from None
    if mode is not None and stat.S_ISDIR(mode):
        raise ValueError(f"--out {name} is a folder; {give}")
    if mode is not None and not stat.S_ISREG(mode):
        if out == Path(os.devnull):
            return
        raise ValueError(f"--out {name} is a pipe or a device; {give}")
    try:
        if mode is not None:
            read_rows(out)
            out.open("a").close()
            return
        folder = next(folder for folder in out.resolve().parents if folder.exists())
        if not folder.is_dir():
            raise ValueError(f"--out {name}: {folder} is a file and no folder; {give}")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error})"
        raise ValueError(f"--out {name} {reason}; {give}, where you may write") from None
    except (UnicodeDecodeError, RecursionError):
        raise ValueError(f"--out {name} is no file of rows, and nothing is appended to it; {give}") from None
    except ValueError as error:
        if mode is None:
            raise
        raise ValueError(f"--out {name} is no file of rows, and nothing is appended to it: {error}; {give}") from None


def append_rows(out: Path, record: dict[str, Any], rows: Iterable[Row]) -> None:
    """Append rows of a run in one write; its record goes before the first of them."""
    lines = [{"run": record["run"], **row} for row in rows]
    if not lines:
        return
    out.resolve().parent.mkdir(parents=True, exist_ok=True)
    text = out.read_text() if out.exists() else ""
    ends = "\n" if text and not text.endswith("\n") else ""  # a last line that has no end
    if json.dumps({"run": record["run"]})[:-1] not in text:
        lines.insert(0, record)
    with out.open("a") as file:
        file.write(ends + "".join(json.dumps(line) + "\n" for line in lines))


def read_rows(path: Path, fields: tuple[str, ...] = ("benchmark", "workload", "provider")) -> list[Row]:
    """Rows of a file, each with the record of its run.

    Args:
        fields: those that every row has.

    Raises:
        ValueError: a line is neither a run's record nor a row of a run before it, with its number.
    """
    rows, records = [], {}
    for i, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            if "machine" in row:
                records[row["run"]] = row
            else:
                [row[name] for name in fields]
                rows.append({**records[row["run"]], **row})
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {i} is neither the record of a run nor a row of a run above it") from None
    return rows


def workload_key(row: Row) -> tuple:
    return row["benchmark"], tuple(sorted(row["workload"].items()))


def key_of(row: Row) -> tuple:
    """What a row measured, whatever the run."""
    return *workload_key(row), row["provider"], row.get("metric")


def latest(rows: list[Row]) -> list[Row]:
    """For each workload, the rows of the last run that measured it."""
    last = {workload_key(row): row["run"] for row in rows}
    return [row for row in rows if row["run"] == last[workload_key(row)]]


def by_workload(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each workload."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(workload_key(row), []).append(row)
    return list(groups.values())


def main_metric(rows: Iterable[Row]) -> str:
    """The time by which providers of a workload are compared."""
    metrics = [row["metric"] for row in rows if row.get("unit") == "ms"]
    return next((name for name in ("step", "backward", "forward") if name in metrics), metrics[0] if metrics else "")


def main_times(rows: Iterable[Row]) -> list[Row]:
    """The rows of every workload's main time."""
    groups = [(main_metric(group), group) for group in by_workload(rows)]
    return [row for main, group in groups for row in group if main and row.get("metric") == main]


def floor_percent(row: Row) -> tuple[float, float]:
    """Percent of the time measured that the floor's bytes take in a copy: distinct rows, and every read."""
    bandwidth = row["ceilings"]["copy_bytes_per_second"]
    distinct, every_read = (round(1e5 * size / bandwidth / row["p50"], 2) for size in row["floor"].values())
    return distinct, every_read


def describe(workload: dict[str, Any]) -> str:
    """A workload in words, for titles and logs."""
    forms = {"sids": "{} SIDs", "table_rows": "T = {}", "vocabulary": "a vocabulary of {}"}
    words = []
    for name, value in workload.items():
        if name == "sids" and value == 1:
            words.append("1 SID")
        elif isinstance(value, int):
            words.append(forms.get(name, f"{{}} {name.replace('_', ' ')}").format(f"{value:,}"))
        else:
            words.append(str(value))
    return ", ".join(words)


def short(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"
