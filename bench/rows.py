"""Results as rows of JSON Lines: what was measured of whom, its quantiles, and where it was measured.

    {"benchmark": "training", "provider": "...", "workload": {"sids": 16384, ...}, "metric": "step", "unit": "ms",
     "p50": 1.2, "p20": 1.1, "p80": 1.3, "repeats": 40,
     "floor": {"distinct_bytes": ..., "algorithmic_bytes": ..., "percent_distinct": ..., "percent_algorithmic": ...},
     "remarks": [], "state": {}, "ceilings": {...}, "machine": {...}, "commit": "...", "date": "...", "run": "..."}

A provider that was not measured has a row with "skipped", the reason, in place of metric and quantiles.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def append_rows(out: Path, rows: list[Row], about: dict[str, Any]) -> None:
    """Append rows, each with `about`, to a file of JSON Lines, in one write."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        file.write("".join(json.dumps({**row, **about}) + "\n" for row in rows))


def read_rows(path: Path) -> list[Row]:
    """Rows of a file.

    Raises:
        ValueError: a line is not a row, with its number.
    """
    rows = []
    for i, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            key_of(row)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path}, line {i} is not a row of python -m bench run") from None
        rows.append(row)
    return rows


def workload_key(row: Row) -> tuple:
    return row["benchmark"], tuple(sorted(row["workload"].items()))


def key_of(row: Row) -> tuple:
    """What a row measured, whatever the run."""
    return *workload_key(row), row["provider"], row.get("metric")


def latest(rows: Iterable[Row]) -> list[Row]:
    """For each workload, the rows of the last run that measured it."""
    rows = list(rows)
    last = {workload_key(row): row.get("run") for row in rows}
    return [row for row in rows if row.get("run") == last[workload_key(row)]]


def describe(workload: dict[str, Any]) -> str:
    """A workload in words, for titles and logs."""
    forms = {"sids": "{} SIDs", "table_rows": "T = {}", "vocabulary": "a vocabulary of {}"}
    parts = []
    for name, value in workload.items():
        if name == "sids" and value == 1:
            parts.append("1 SID")
        elif isinstance(value, int):
            parts.append(forms.get(name, f"{{}} {name.replace('_', ' ')}").format(f"{value:,}"))
        else:
            parts.append(str(value))
    return ", ".join(parts)
