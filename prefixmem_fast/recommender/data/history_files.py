"""Histories read from the files of the field.

JSON      {"user": [item, item, ...]}, in time order
CSV       one interaction a row, with columns for user, item and, if it is not in time order, timestamp; TSV alike
CSV       as MiniOneRec writes it: user_id, history_item_id, item_id, one target a row
Parquet   one interaction a row, as in CSV; or one user a row with a list of items; or a list and one target a row
"""

from __future__ import annotations

import ast
import csv
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from ..._files import read_json
from ..._inputs import clipped, input_file, shown
from ..._parquet import parquet_file
from ..._progress import Progress
from ...sid.catalogue import Catalogue
from .interactions import Histories

_ROWS_AT_ONCE = 10_000
SUFFIXES = (".json", ".csv", ".tsv", ".parquet")
USER, ITEM = ("user_id", "user"), ("item_id", "item", "item_asin", "parent_asin")
LIST = ("items", "item_ids", "history", "history_item_id", "sequence_data")  # the last is of sid_gr
# In small letters without underscores. The first two win over the others, and each of those over nothing else.
TIME = ("timestamp", "time")
OTHER_TIMES = (
    *("ts", "date", "datetime", "eventtime", "reviewtime", "unixtime", "unixtimestamp", "unixreviewtime"),
    *("reviewdate", "createdat", "timestampms", "eventtimestamp", "eventdate"),
)

Rows = Iterable[tuple[str, Mapping[str, Any]]]  # with the place of each in its file


def load_interactions(paths: str | Path | Sequence[str | Path], catalogue: Catalogue) -> Histories:
    """Read histories from one file, or from several that follow each other in time.

    Where rows have no column of times, a UserWarning says that the order of the file is taken for that of time.

    Args:
        paths: .json, .csv, .tsv or .parquet, see the module.
        catalogue: its items are those that the file may name.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is not as stated, or names an item that the catalogue has not; the message gives file,
            line or key, and what was expected.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not paths:
        raise ValueError("interactions names no file; give a .json, .csv, .tsv or .parquet file")
    builder = _Builder({item: i for i, item in enumerate(catalogue.items)})
    for path in [input_file("interactions", path, SUFFIXES) for path in paths]:
        try:
            untimed = _READERS[path.suffix.lower()](path, builder)
        except (UnicodeDecodeError, ValueError, csv.Error) as error:
            raise ValueError(f"interactions {path}: {clipped(error)}") from None
        if untimed:
            warnings.warn(
                f"interactions {path}: no time column among {clipped(', '.join(untimed))}: file order is taken for "
                "time order; name the column of times timestamp",
                UserWarning,
                stacklevel=2,
            )
    if not builder.items:
        raise ValueError(f"interactions {', '.join(map(str, paths))}: no user is in it")
    return builder.histories()


class _Builder:
    """Collects interactions by user, and checks each item against the catalogue."""

    def __init__(self, rows: Mapping[str, int]) -> None:
        self.rows = rows
        self.items: dict[str, list[int]] = {}
        self.times: dict[str, list[float]] = {}
        self.kind: str | None = None  # of the times: all files are sorted together

    def row(self, item: Any, where: str) -> int:
        if isinstance(item, float) and item.is_integer():
            item = int(item)
        row = self.rows.get(str(item)) if isinstance(item, (str, int)) and not isinstance(item, bool) else None
        if row is None:
            raise ValueError(f"{where}: item {shown(item)} is not in the index; an item named there was expected")
        return row

    def extend(self, user: Any, items: Any, where: str) -> None:
        if not isinstance(items, list):
            raise ValueError(f"{where}: {shown(items)} is no list; a list of items in time order was expected")
        self.items.setdefault(_user(user, where), []).extend([self.row(item, where) for item in items])

    def add(self, user: Any, item: Any, time: tuple[float, str] | None, where: str) -> None:
        user = _user(user, where)
        self.items.setdefault(user, []).append(self.row(item, where))
        if time is None:
            return
        moment, kind = time
        if kind != self.kind:
            if self.kind is not None:
                raise ValueError(f"{where}: its timestamp is {kind}, those before it are {self.kind}; give one kind")
            self.kind = kind
        self.times.setdefault(user, []).append(moment)

    def histories(self) -> Histories:
        users = list(self.items)
        items = [np.array(self.items[user], dtype=np.int64) for user in users]
        if not self.times:
            return Histories(users, items)
        times = [np.array(self.times.get(user, ()), dtype=np.float64) for user in users]
        for user, own, moments in zip(users, items, times, strict=True):
            if len(own) != len(moments):
                raise ValueError(
                    f"user {shown(user)} has {len(own)} items and {len(moments)} timestamps; give all or none"
                )
        order = [np.argsort(moments, kind="stable") for moments in times]
        return Histories(
            users,
            [own[o] for own, o in zip(items, order, strict=True)],
            [moments[o] for moments, o in zip(times, order, strict=True)],
        )


def _user(user: Any, where: str) -> str:
    """The name of a user; 1.0 is the user 1, as pandas writes it where a user is missing elsewhere."""
    if user is None or user == "" or user != user:
        raise ValueError(f"{where}: the user is empty; a name was expected")
    if isinstance(user, (float, Decimal)) and user == user // 1:
        user = int(user)
    if isinstance(user, bool) or not isinstance(user, (str, int)):
        raise ValueError(f"{where}: user {shown(user)} is neither a name nor a whole number")
    if "\0" in str(user):
        raise ValueError(f"{where}: user {shown(user)} has a null character in it; a name was expected")
    return str(user)


def _time(value: Any, where: str) -> tuple[float, str]:
    """Seconds, and the kind of what they were given as: kinds are not ordered among each other."""
    try:
        seconds = float(value)
        kind = "a number"
    except (TypeError, ValueError, OverflowError):
        try:
            moment = datetime.fromisoformat(value.strip().replace("Z", "+00:00"))
            kind = "a date with a zone" if moment.tzinfo else "a date without a zone"
            # One without a zone means the same on every machine.
            seconds = (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
        except (AttributeError, ValueError, OverflowError):
            seconds = np.nan
    if isinstance(value, bool) or not np.isfinite(seconds):
        raise ValueError(
            f"{where}: timestamp {shown(value)} is no number and no ISO date; seconds or any other ascending number, "
            "or dates such as 2024-01-31 or 2024-01-31 18:30:00, were expected"
        )
    return seconds, kind


def _read_json(path: Path, builder: _Builder) -> None:
    content = read_json(path, most=None)
    if not isinstance(content, dict):
        raise ValueError(f'it holds a {type(content).__name__}; {{"user": [item, item, ...]}} was expected')
    for user, items in content.items():
        builder.extend(user, items, f"key {shown(user)}")


def _read_csv(path: Path, builder: _Builder) -> Sequence[str] | None:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        columns = reader.fieldnames or ()
        rows = _counted(_lines(reader), path)
        if "history_item_id" in columns and "item_id" in columns:
            return _read_targets(rows, columns, "history_item_id", builder)
        return _read_rows(rows, columns, builder)


def _lines(reader: csv.DictReader) -> Iterator[tuple[str, dict[str, Any]]]:
    for row in reader:
        where = f"line {reader.line_num}"
        if None in row or None in row.values():
            raise ValueError(
                f"{where}: it has another number of fields than the header; {len(reader.fieldnames)} were expected"
            )
        yield where, row


def _counted(rows: Rows, path: Path, total: int | None = None) -> Rows:
    """The rows, counted while they are read."""
    with Progress(f"reading {path.name}", total, "rows") as progress:
        for i, row in enumerate(rows, 1):
            if not i % _ROWS_AT_ONCE:
                progress.update(_ROWS_AT_ONCE)
            yield row


def _read_parquet(path: Path, builder: _Builder) -> Sequence[str] | None:
    with parquet_file(path) as file:
        columns = file.schema_arrow.names
        lists = _column(columns, LIST, "items", optional=True)
        item = _column(columns, ITEM, "item", optional=lists is not None)
        time = _time_column(columns) if lists is None else None
        wanted = [_column(columns, USER, "user"), *filter(None, (lists, item, time))]
        table = file.read(columns=wanted)
        if time is not None:
            table, kind = _moments(table, time)
        records = (row for batch in table.to_batches() for row in batch.to_pylist())
        rows = _counted(((f"row {i}", row) for i, row in enumerate(records)), path, len(table))
    if lists is not None and item is not None:
        return _read_targets(rows, columns, lists, builder)
    if lists is None:
        moment = None if time is None or kind is None else lambda value, where: (_time(value, where)[0], kind)
        return _read_rows(rows, columns, builder, moment)
    for where, row in rows:
        builder.extend(row[wanted[0]], row[lists], where)
    return None


def _moments(table: Any, column: str) -> tuple[Any, str | None]:
    """The table with Arrow's dates in a column as seconds, and their kind; None where the column holds something else.

    Raises:
        ValueError: it holds times of day or durations.
    """
    import pyarrow
    import pyarrow.compute

    kind = table.schema.field(column).type
    if pyarrow.types.is_time(kind) or pyarrow.types.is_duration(kind):
        raise ValueError(f"column {column} is of type {kind}; numbers, dates or timestamps were expected")
    if not (pyarrow.types.is_timestamp(kind) or pyarrow.types.is_date(kind)):
        return table, None
    values = table[column].cast(pyarrow.timestamp("us", getattr(kind, "tz", None)), safe=False)
    seconds = pyarrow.compute.divide(values.cast(pyarrow.int64()).cast(pyarrow.float64(), safe=False), 1e6)
    zoned = "a date with a zone" if getattr(kind, "tz", None) else "a date without a zone"
    return table.set_column(table.schema.get_field_index(column), column, seconds), zoned


def _read_rows(
    rows: Rows, columns: Sequence[str], builder: _Builder, moment: Callable[..., tuple[float, str]] | None = None
) -> Sequence[str] | None:
    """One interaction a row; returns the columns where none of them is of times."""
    user, item, time = _column(columns, USER, "user"), _column(columns, ITEM, "item"), _time_column(columns)
    moment = moment or _time
    for where, row in rows:
        builder.add(row[user], row[item], None if time is None else moment(row[time], where), where)
    return columns if time is None else None


def _read_targets(rows: Rows, columns: Sequence[str], history_column: str, builder: _Builder) -> None:
    """MiniOneRec's rows: each repeats the last items of the user's history and adds one."""
    user_column = _column(columns, USER, "user")
    item_column = _column(columns, ITEM, "item")
    for where, row in rows:
        history = row[history_column]
        try:
            history = ast.literal_eval(history) if isinstance(history, str) else history
        except (SyntaxError, TypeError, ValueError, MemoryError, RecursionError):
            history = None
        if not isinstance(history, list):
            raise ValueError(
                f"{where}: {history_column} = {shown(row[history_column])}; a list such as [1, 2] was expected"
            )
        user = _user(row[user_column], where)
        known = builder.items.setdefault(user, [])
        before = [builder.row(item, where) for item in history]
        if not known:
            known.extend(before)
        elif not before or known[-len(before) :] != before:
            raise ValueError(
                f"{where}: the history of user {shown(user)} does not end as the rows before it; rows in time order, "
                "files in the order train, valid, test were expected"
            )
        known.append(builder.row(row[item_column], where))


def _column(columns: Sequence[str], names: tuple[str, ...], what: str, optional: bool = False) -> str | None:
    column = next((name for name in names if name in columns), None)
    if column is None and not optional:
        raise ValueError(
            f"no column for the {what}; one of {', '.join(names)} was expected, found {clipped(', '.join(columns))}"
        )
    if column is not None:
        _check_once(columns, column)
    return column


def _time_column(columns: Sequence[str]) -> str | None:
    """The column of times; letters' case and underscores in its name do not matter.

    Raises:
        ValueError: there are several.
    """
    plain = {name: name.lower().replace("_", "").replace(" ", "") for name in columns}
    for known in ((TIME[0],), (TIME[1],), OTHER_TIMES):
        found = [name for name in columns if plain[name] in known]
        if len(found) > 1:
            raise ValueError(f"columns {', '.join(map(shown, found))} all look like times; name one of them timestamp")
        if found:
            return found[0]
    return None


def _check_once(columns: Sequence[str], column: str) -> None:
    if list(columns).count(column) > 1:
        raise ValueError(f"column {shown(column)} is there twice; name each column once")


_READERS = {".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}
