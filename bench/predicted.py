"""Times on this GPU beside those that the static report predicts, at the model's own workload.

The report is what `prefixmem verify --compile --targets sm_90 --dtypes bfloat16 --save FOLDER` writes there, with the
triton of this machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefixmem_fast import optim, prefix_memory, token_memory
from prefixmem_fast._files import read_json
from prefixmem_fast._inputs import clipped, shown
from prefixmem_fast.checks.launches import WIDTH, paper_spec
from prefixmem_fast.checks.prediction import DTYPE, OPERATIONS

from .benchmarks.workloads import token_stream, vocabulary_of
from .clocks import Clock, DeviceClock
from .machine import copy_bandwidth, run_record
from .registry import Mark
from .report import markdown
from .rows import Row, append_rows, check_out, hardware, short
from .run import quantiles

TURNS = 15
GIVE = "give a report as `prefixmem verify --compile --targets sm_90 --dtypes bfloat16 --save FOLDER` writes it"
MOST_SIDS = 1 << 24


def run(options: argparse.Namespace) -> int:
    check_out(options.out)
    predictions = read_predictions(options.static)
    if not torch.cuda.is_available():
        raise ValueError("predictions are for a GPU, and torch finds none")
    record = run_record(options.commit)
    record["ceilings"] = {"copy_bytes_per_second": copy_bandwidth("cuda")}
    rows = []
    for row in compared(predictions, DeviceClock(), hardware(record)):
        append_rows(options.out, record, [row])
        rows.append(row)
        if options.json:
            print(json.dumps({**record, **row}), flush=True)
    if not options.json:
        print(as_table(rows))
    return 0


def read_predictions(report: Path) -> list[dict[str, Any]]:
    """The predictions of a static report.

    Raises:
        ValueError: it is no such report, or one without predictions; the message names the file.
    """
    try:
        if not report.exists():
            raise ValueError("is not there")
        if not report.is_file():
            raise ValueError("is a folder, a pipe or a device")
        stored = read_json(report)
    except (OSError, ValueError) as error:
        told = clipped(getattr(error, "strerror", None) or error).removeprefix("it ")
        raise ValueError(f"report {clipped(report, 200)} {told}; {GIVE}") from None
    predictions = stored.get("predictions") if isinstance(stored, dict) else None
    if predictions is None or predictions == []:
        raise ValueError(f"report {report} holds no predictions; {GIVE}")
    if not isinstance(predictions, list):
        raise ValueError(f"report {report}: predictions is {shown(predictions)} and no list; {GIVE}")
    for i, prediction in enumerate(predictions, 1):
        wrong = _wrong(prediction)
        if wrong:
            raise ValueError(f"report {report}, prediction {i}: {wrong}; {GIVE}")
    return predictions


def _wrong(prediction: Any) -> str | None:
    """What `compared` cannot take."""
    if not isinstance(prediction, dict):
        return f"{shown(prediction)} is no object"
    number = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300  # noqa: E731
    whole = lambda value: number(value) and isinstance(value, int)  # noqa: E731
    for key, allowed, fits in (
        ("operation", f"one of {', '.join(OPERATIONS)}", lambda value: isinstance(value, str) and value in OPERATIONS),
        ("card", "a card's name", lambda value: isinstance(value, str) and value != ""),
        ("sids", f"a whole number from 1 to {MOST_SIDS:,}", lambda value: whole(value) and 1 <= value <= MOST_SIDS),
        ("microseconds", "a number above 0", lambda value: number(value) and value > 0),
        ("floor_bytes", "a whole number from 0 on", lambda value: whole(value) and value >= 0),
    ):
        if key not in prediction:
            return f"{key} is missing; it is {allowed}"
        if not fits(prediction[key]):
            return f"{key} is {shown(prediction[key])}, and not {allowed}"
    return None


def compared(predictions: list[dict[str, Any]], clock: Clock, gpu: str, rows: int = 2_000_000) -> Iterator[Row]:
    """A row for each operation and number of SIDs: measured, and predicted for every card of the model.

    Args:
        gpu: its name; `of_predicted` is against the card that it names.
        rows: of a table; the model's are the paper's.
    """
    spec = paper_spec()
    if rows != spec.rows_per_order[-1]:
        spec = type(spec)(spec.codebook_sizes, table_rows=rows, active_levels=spec.active_levels)
    weight = nn.Parameter(torch.empty(spec.total_rows, WIDTH, device=clock.device, dtype=DTYPE).normal_(std=0.02))
    optimizer = optim.RowWiseAdagrad([weight], lr=1e-3)
    vocabulary = vocabulary_of(spec)
    table = vocabulary.token_table(clock.device)
    steps = {"forward": _forward, "token forward": _tokens, "backward + update": partial(_update, optimizer=optimizer)}
    key = lambda p: (list(steps).index(p["operation"]), p["sids"])  # noqa: E731
    for (_, sids), group in itertools.groupby(sorted(predictions, key=key), key):
        expected = {p["card"]: p for p in group}
        operation = next(iter(expected.values()))["operation"]
        generator = torch.Generator(clock.device).manual_seed(sids)
        size = (sids, spec.levels)
        codes = torch.randint(0, spec.codebook_sizes[0], size, generator=generator, device=clock.device)
        ids = token_stream(codes, vocabulary, 8, 0)
        step = partial(steps[operation], codes=codes, ids=ids, table=table, weight=weight, spec=spec)
        seconds = [clock.time(step, (operation, sids))["measured"] for _ in range(TURNS)][3:]
        row = {"benchmark": "predicted", "workload": {"operation": operation, "sids": sids}}
        row |= {"provider": "prefixmem_fast", "metric": "time", "unit": "ms", "repeats": len(seconds)}
        row |= {name: 1e3 * value for name, value in quantiles(seconds).items()}
        row["predicted_ms"] = {card: p["microseconds"] / 1e3 for card, p in expected.items()}
        floor = next(iter(expected.values()))["floor_bytes"]
        row["floor"] = {"distinct": floor, "every_read": floor}
        card = next((card for card in expected if card in gpu), None)
        if card is not None:
            row["of_predicted"] = round(row["p50"] / row["predicted_ms"][card], 3)
        yield row


def _forward(mark: Mark, codes: Tensor, weight: Tensor, spec, **_: Any) -> None:
    with torch.no_grad():
        prefix_memory(codes, weight, spec)
    mark("measured")


def _tokens(mark: Mark, ids: Tensor, table: Tensor, weight: Tensor, spec, **_: Any) -> None:
    with torch.no_grad():
        token_memory(ids, table, weight, spec)
    mark("measured")


def _update(mark: Mark, codes: Tensor, weight: Tensor, spec, optimizer: optim.RowWiseAdagrad, **_: Any) -> None:
    S = prefix_memory(codes, weight, spec, grad="fused")
    grad = torch.ones_like(S)
    mark("forward")
    S.backward(grad)
    optimizer.step()
    mark("measured")


def as_table(rows: list[dict[str, Any]]) -> str:
    cards = list(rows[0]["predicted_ms"]) if rows else []
    head = ["operation", "SIDs", "measured, us", "20 to 80 %", *(f"predicted for {card}" for card in cards), "ratio"]
    lines = [
        [
            row["workload"]["operation"],
            f"{row['workload']['sids']:,}",
            short(1e3 * row["p50"]),
            f"{short(1e3 * row['p20'])} to {short(1e3 * row['p80'])}",
            *(short(1e3 * row["predicted_ms"][card]) for card in cards),
            f"{row['of_predicted']:.2f}" if "of_predicted" in row else "",
        ]
        for row in rows
    ]
    return markdown(head, lines)
