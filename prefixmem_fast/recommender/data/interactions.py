"""Who met which items, in time order, read from the files of the field; and how they are split.

JSON      {"user": [item, item, ...]}, in time order
CSV       one interaction a row, with columns for user, item and, if it is not in time order, timestamp
CSV       as MiniOneRec writes it: user_id, history_item_id, item_id, one target a row
Parquet   one interaction a row, as in CSV; or one user a row with a list of items
"""

from __future__ import annotations

import ast
import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...sid.catalogue import Catalogue, unique_keys

USER, ITEM = ("user_id", "user"), ("item_id", "item", "item_asin", "parent_asin")
TIME, LIST = ("timestamp", "time"), ("items", "item_ids", "history")


@dataclass
class Histories:
    """The items that each user met, in time order.

    Attributes:
        users: their names.
        items: for each user int64 ``[n]``, rows of the catalogue.
        times: for each user float64 ``[n]``; None where the file has none.
    """

    users: list[str]
    items: list[np.ndarray]
    times: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.users)

    @property
    def interactions(self) -> int:
        return sum(map(len, self.items))


@dataclass
class Examples:
    """Next-item examples: after `histories[i]`, user `users[i]` met `targets[i]`; all are rows of the catalogue."""

    users: list[str]
    histories: list[np.ndarray]
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    def last(self, max_items: int) -> Examples:
        """The same with histories cut to their last `max_items` items."""
        return Examples(self.users, [history[-max_items:] for history in self.histories], self.targets)

    def sample(self, count: int | None, seed: int = 0) -> Examples:
        """`count` examples chosen by `seed`, in their order; all of them where there are no more."""
        if count is None or count >= len(self):
            return self
        chosen = np.sort(np.random.default_rng(seed).choice(len(self), count, replace=False))
        return Examples([self.users[i] for i in chosen], [self.histories[i] for i in chosen], self.targets[chosen])


@dataclass
class Split:
    """Histories to train on, and examples to choose and to judge a model by."""

    train: Histories
    validation: Examples
    test: Examples


def load_interactions(paths: str | Path | Sequence[str | Path], catalogue: Catalogue) -> Histories:
    """Read histories from one file, or from several that follow each other in time.

    Args:
        paths: .json, .csv or .parquet, see the module.
        catalogue: its items are those that the file may name.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is not as stated, or names an item that the catalogue has not; the message gives file,
            line or key, and what was expected.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not paths:
        raise ValueError("interactions names no file; give a .json, .csv or .parquet file")
    rows = {item: i for i, item in enumerate(catalogue.items)}
    builder = _Builder(rows)
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(f"interactions {path} is not there; give a .json, .csv or .parquet file")
        readers = {".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
        if path.suffix not in readers:
            raise ValueError(f"interactions {path}: its name ends neither in .json nor in .csv nor in .parquet")
        try:
            readers[path.suffix](path, builder)
        except (UnicodeDecodeError, ValueError, csv.Error) as error:
            raise ValueError(f"interactions {path}: {error}") from None
    if not builder.items:
        raise ValueError(f"interactions {', '.join(map(str, paths))}: no user is in it")
    return builder.histories()


def leave_two_out(histories: Histories) -> Split:
    """Each user's last item is the test target, the one before it the validation target; the rest is for training.

    Users with fewer than three items only train.

    Raises:
        ValueError: no user has three items.
    """
    train = Histories(list(histories.users), [_but(items, 2) if len(items) > 2 else items for items in histories.items])
    held = [(user, items) for user, items in zip(histories.users, histories.items, strict=True) if len(items) > 2]
    if not held:
        longest = max(map(len, histories.items))
        raise ValueError(
            f"interactions: leave-two-out needs users with 3 items or more; the longest history has {longest}"
        )
    users = [user for user, _ in held]
    validation, test = (
        Examples(users, [_but(items, back) for _, items in held], np.array([items[-back] for _, items in held]))
        for back in (2, 1)
    )
    return Split(train, validation, test)


def split_by_time(histories: Histories, fractions: tuple[float, float] = (0.8, 0.9)) -> Split:
    """Train on what happened before one moment, validate on what came between it and a second, test on the rest.

    A user gives one example a part at most: the first item met in it, after all that was met before it.

    Args:
        histories: with times.
        fractions: shares of all interactions that happened before the two moments.

    Raises:
        ValueError: there are no times, or a part is left empty.
    """
    if histories.times is None:
        raise ValueError(
            "split = 'time' needs a timestamp column in interactions; give one, or split = 'leave-two-out'"
        )
    first, second = np.quantile(np.concatenate(histories.times), fractions)
    users, kept, examples = [], [], ([], [])
    for user, items, times in zip(histories.users, histories.items, histories.times, strict=True):
        ends = np.searchsorted(times, (first, second, np.inf), side="left")
        if ends[0]:
            users.append(user)
            kept.append(items[: ends[0]])
        for part, (start, stop) in zip(examples, ((ends[0], ends[1]), (ends[1], ends[2])), strict=True):
            if 0 < start < stop:
                part.append((user, items[:start], items[start]))
    for name, part in zip(("validation", "test"), examples, strict=True):
        if not part or not users:
            raise ValueError(
                f"split = 'time' at {first:g} and {second:g} leaves no {name} example; change time_fractions"
            )
    return Split(
        Histories(users, kept),
        *(Examples([u for u, _, _ in p], [h for _, h, _ in p], np.array([t for _, _, t in p])) for p in examples),
    )


def _but(items: np.ndarray, count: int) -> np.ndarray:
    return items[: len(items) - count]


class _Builder:
    """Collects interactions by user, and checks each item against the catalogue."""

    def __init__(self, rows: Mapping[str, int]) -> None:
        self.rows = rows
        self.items: dict[str, list[int]] = {}
        self.times: dict[str, list[float]] = {}

    def row(self, item: Any, where: str) -> int:
        if isinstance(item, float) and item.is_integer():
            item = int(item)
        row = self.rows.get(str(item)) if isinstance(item, (str, int)) and not isinstance(item, bool) else None
        if row is None:
            raise ValueError(f"{where}: item {item!r} is not in the index; an item named there was expected")
        return row

    def extend(self, user: str, items: Any, where: str) -> None:
        if not isinstance(items, list):
            raise ValueError(f"{where}: {items!r} is no list; a list of items in time order was expected")
        self.items.setdefault(_user(user, where), []).extend(self.row(item, where) for item in items)

    def add(self, user: Any, item: Any, time: Any, where: str) -> None:
        user = _user(user, where)
        self.items.setdefault(user, []).append(self.row(item, where))
        if time is not None:
            self.times.setdefault(user, []).append(_time(time, where))

    def histories(self) -> Histories:
        users = list(self.items)
        items = [np.array(self.items[user], dtype=np.int64) for user in users]
        if not self.times:
            return Histories(users, items)
        times = [np.array(self.times.get(user, ()), dtype=np.float64) for user in users]
        for user, own, moments in zip(users, items, times, strict=True):
            if len(own) != len(moments):
                raise ValueError(f"user {user!r} has {len(own)} items and {len(moments)} timestamps; give all or none")
        order = [np.argsort(moments, kind="stable") for moments in times]
        return Histories(
            users,
            [own[o] for own, o in zip(items, order, strict=True)],
            [moments[o] for moments, o in zip(times, order, strict=True)],
        )


def _user(user: Any, where: str) -> str:
    if user is None or user == "":
        raise ValueError(f"{where}: the user is empty; a name was expected")
    return str(user)


def _time(value: Any, where: str) -> float:
    try:
        if isinstance(value, datetime):  # one without a zone means the same on every machine
            value = (value if value.tzinfo else value.replace(tzinfo=timezone.utc)).timestamp()
        seconds = float(value)
        if np.isfinite(seconds):
            return seconds
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{where}: timestamp {value!r} is no number; seconds or any other ascending number was expected")


def _read_json(path: Path, builder: _Builder) -> None:
    content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=partial(unique_keys, kind="key"))
    if not isinstance(content, dict):
        raise ValueError(f'it holds a {type(content).__name__}; {{"user": [item, item, ...]}} was expected')
    for user, items in content.items():
        builder.extend(user, items, f"key {user!r}")


def _read_csv(path: Path, builder: _Builder) -> None:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or ()
        if "history_item_id" in columns and "item_id" in columns:
            _read_targets(_lines(reader), builder)
        else:
            _read_rows(_lines(reader), columns, builder)


def _lines(reader: csv.DictReader) -> Iterator[tuple[str, dict[str, Any]]]:
    for row in reader:
        where = f"line {reader.line_num}"
        if None in row or None in row.values():
            raise ValueError(
                f"{where}: it has another number of fields than the header; {len(reader.fieldnames)} were expected"
            )
        yield where, row


def _read_parquet(path: Path, builder: _Builder) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("reading Parquet needs pyarrow: pip install 'prefixmem_fast[train]'") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"it is no Parquet file: {error}") from None
    columns = table.column_names
    records = (row for batch in table.to_batches() for row in batch.to_pylist())
    rows = ((f"row {i}", row) for i, row in enumerate(records))
    lists = _column(columns, LIST, "items", optional=True)
    if lists is None:
        return _read_rows(rows, columns, builder)
    user = _column(columns, USER, "user")
    for where, row in rows:
        builder.extend(row[user], row[lists], where)


def _read_rows(rows: Iterable[tuple[str, dict[str, Any]]], columns: Sequence[str], builder: _Builder) -> None:
    user, item = _column(columns, USER, "user"), _column(columns, ITEM, "item")
    time = _column(columns, TIME, "timestamp", optional=True)
    for where, row in rows:
        builder.add(row[user], row[item], None if time is None else row[time], where)


def _read_targets(rows: Iterable[tuple[str, dict[str, Any]]], builder: _Builder) -> None:
    """MiniOneRec's rows: each repeats the last items of the user's history and adds one."""
    for where, row in rows:
        try:
            history = ast.literal_eval(row["history_item_id"])
        except (SyntaxError, TypeError, ValueError, MemoryError, RecursionError):
            history = None
        if not isinstance(history, list):
            raise ValueError(
                f"{where}: history_item_id = {row['history_item_id']!r}; a list such as [1, 2] was expected"
            )
        user = row.get("user_id") or row.get("user")
        if not user:
            raise ValueError(f"{where}: no user; a column user_id was expected")
        known = builder.items.setdefault(user, [])
        before = [builder.row(item, where) for item in history]
        if not known:
            known.extend(before)
        elif not before or known[-len(before) :] != before:
            raise ValueError(
                f"{where}: the history of user {user!r} does not end as the rows before it; rows in time order, files "
                "in the order train, valid, test were expected"
            )
        known.append(builder.row(row["item_id"], where))


def _column(columns: Sequence[str], names: tuple[str, ...], what: str, optional: bool = False) -> str | None:
    column = next((name for name in names if name in columns), None)
    if column is None and not optional:
        raise ValueError(
            f"no column for the {what}; one of {', '.join(names)} was expected, found {', '.join(columns)}"
        )
    return column
