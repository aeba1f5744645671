"""What `prefixmem verify --compile` tells: kernels, launches and predictions, as rows of JSON or as tables."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch

from . import prediction
from .environment import facts
from .launches import WIDTH, Launch, launches, paper_spec, record
from .machine_code import Compiled, compile_all
from .occupancy import CARDS
from .prediction import Prediction

LAUNCHED_SIDS = (1024, 16_384, 65_536, 262_144, 1_048_576)


@dataclass(frozen=True)
class Launches:
    """The kernels that one call of a launcher launches, in order, and torch's operators between them."""

    launcher: str
    sids: int  # SIDs of codes, or tokens in each of 8 rows of a stream
    kernels: tuple[tuple[str, tuple[int, ...]], ...]  # name and grid
    operators: dict[str, int]  # with their counts


@dataclass(frozen=True)
class CompileReport:
    versions: dict[str, str]
    kernels: list[Compiled]
    launches: list[Launches]
    predictions: list[Prediction]  # none unless bfloat16 is compiled for the cards' architecture

    @property
    def spilled(self) -> list[Compiled]:
        return [kernel for kernel in self.kernels if not kernel.clean]


def compile_report(
    targets: tuple[str, ...],
    dtypes: tuple[str, ...],
    launchers: tuple[str, ...] | None = None,
    progress: Callable[[Compiled], None] = lambda kernel: None,
) -> CompileReport:
    """Compile and report; of some launchers, if they are named."""
    kernels = []
    for kernel in compile_all(targets, dtypes, launchers):
        kernels.append(kernel)
        progress(kernel)
    predicts = prediction.TARGET in targets and "bfloat16" in dtypes
    predictions = list(prediction.predict(launchers)) if predicts else []
    return CompileReport(_versions(), kernels, list(_launches(targets[0], launchers)), predictions)


def _versions() -> dict[str, str]:
    """Those of `facts`, but of the triton that has run: in a folder of its own it may lack metadata."""
    import triton

    return {**facts()["versions"], "triton": triton.__version__.partition("+")[0]}


def _launches(target: str, launchers: tuple[str, ...] | None) -> Iterator[Launches]:
    for sids in LAUNCHED_SIDS:
        for launcher, call in launches(paper_spec(), torch.bfloat16, WIDTH, sids).items():
            if launchers is not None and launcher not in launchers:
                continue
            events = record(call, target, compiling=False)
            kernels = tuple((event.kernel, event.grid) for event in events if isinstance(event, Launch))
            operators = Counter(event.name for event in events if not isinstance(event, Launch))
            yield Launches(launcher, sids, kernels, dict(operators))


def as_json(report: CompileReport) -> str:
    """A row a line, so that two reports can be compared."""
    head = {
        "versions": report.versions,
        "width": WIDTH,
        "spec": paper_spec().to_dict(),
        "assumptions": prediction.assumptions(),
    }
    lists = {
        name: ",\n".join(json.dumps(asdict(row)) for row in getattr(report, name))
        for name in ("kernels", "launches", "predictions")
    }
    return json.dumps(head)[:-1] + "".join(f', "{name}": [\n{rows}\n]' for name, rows in lists.items()) + "}"


def as_text(report: CompileReport) -> str:
    parts = [
        f"{paper_spec()}, rows of {WIDTH}, triton {report.versions['triton']}",
        _code_table(report.kernels),
        _schedule_table(report.kernels),
        _launch_table(report.launches),
        _prediction_table(report.predictions) if report.predictions else "",
        f"{len(report.kernels)} kernels compiled, {len(report.spilled)} with spills (on gfx: or local memory)",
    ]
    return "\n\n".join(filter(None, parts))


def _code_table(kernels: list[Compiled]) -> str:
    form = "{:<8}{:<25}{:<19}{:<8}{:<10}{:>5}{:>6}{:>9}{:>8}{:>7}{:>8}  {:<26}{:<20}{}"
    lines = [
        "Machine code. Loads, stores and atomic adds: bytes a thread moves in one instruction x how many such"
        " instructions.\nWarps: a program's, and those that a multiprocessor holds.",
        form.format(
            *("target", "launcher", "kernel", "mode", "dtype", "regs", "warps", "resident", "spills", "local"),
            *("shared", "loads", "stores", "adds"),
        ),
    ]
    for k in kernels:
        widths = [" ".join(f"{size}x{count}" for size, count in w.items()) for w in (k.loads, k.stores, k.reductions)]
        facts = (k.registers, k.warps, _or_dash(k.resident_warps), k.spills, k.local_bytes, k.shared_bytes)
        lines.append(form.format(k.target, k.launcher, k.kernel, k.mode, k.dtype, *facts, *widths).rstrip())
    return "\n".join(lines)


def _schedule_table(kernels: list[Compiled]) -> str:
    form = "{:<8}{:<25}{:<19}{:<8}{:<10}{:>6}{:>8}{:>7}{:>8}{:>6}{:>8}{:>7}{:>7}{:>6}{:>8}{:>8}{:>6}{:>5}{:>6}"
    needs = ", ".join(f"{name} {prediction.need(card) / 1e3:.0f}" for name, card in CARDS.items())
    lines = [
        "Timeline of one warp, from stall counts and waits and from ASSUMED latencies (cycles:"
        f" {', '.join(f'{kind} {cycles}' for kind, cycles in prediction.LATENCY.items())}).\n"
        "First of the program with all turns, then of a turn of its largest loop, or of the program where it has none."
        " turn: instructions. loads: in flight at the first wait for"
        " one; rows, KB/SM: loads\nof rows in flight at the first wait for one, and their bytes times resident warps;"
        f" full bandwidth needs {needs} KB. once: loads of rows waited for in the turn that issues them.\n"
        "BAR, SMEM: barriers, accesses to shared memory inside loops. i/SID: instructions of all warps a SID.",
        form.format(
            *("target", "launcher", "kernel", "mode", "dtype", "instr", "cycles", "rounds", "i/SID"),
            *("turn:", "cycles", "rounds"),
            *("loads", "rows", "B/warp", "KB/SM", "once", "BAR", "SMEM"),
        ),
    ]
    for k in kernels:
        s = k.schedule
        if s is None:
            continue
        facts = (
            *(s.instructions, s.program_cycles, s.program_rounds, _or_dash(k.instructions_a_sid)),
            *(_or_dash(s.turn_instructions), s.cycles, s.rounds),
            *(s.loads_at_first_wait, s.rows_at_first_wait, s.row_bytes_in_flight),
            *(f"{k.row_bytes_in_flight / 1e3:.1f}", s.rows_waited_for_at_once),
            *(s.barriers_in_loops, s.shared_accesses_in_loops),
        )
        unknown = f"  unknown pointers: {', '.join(s.unknown_pointers)}" if s.unknown_pointers else ""
        lines.append(form.format(k.target, k.launcher, k.kernel, k.mode, k.dtype, *facts) + unknown)
    return "\n".join(lines) if len(lines) > 2 else ""


def _launch_table(launched: list[Launches]) -> str:
    lines = ["Launches by SIDs, with the programs of each; a stream's tokens in each of its 8 rows."]
    for row in launched:
        kernels = " ".join(f"{name} {'x'.join(map(str, grid))}" for name, grid in row.kernels)
        operators = " ".join(f"{count} {name}" for name, count in row.operators.items())
        lines.append(f"{row.sids:>8}  {row.launcher:<25}{len(row.kernels):>3}: {kernels}; torch: {operators or '-'}")
    return "\n".join(lines)


def _prediction_table(predictions: list[Prediction]) -> str:
    lines = ["A MODEL, NOT A MEASUREMENT: times of whole operations on uniform codes. It assumes:"]
    lines += _indented(prediction.assumptions())
    form = "{:<6}{:<19}{:>8}{:>10}{:>10}   {}"
    lines.append(form.format("card", "operation", "SIDs", "us", "of copy", "parts, us"))
    for p in predictions:
        merged = [(name, list(parts)) for name, parts in groupby(p.parts, key=lambda part: part.name)]
        parts = ", ".join(
            f"{name}{f' x{len(of)}' if len(of) > 1 else ''} {sum(part.microseconds for part in of):.0f}"
            for name, of in merged
        )
        lines.append(form.format(p.card, p.operation, p.sids, f"{p.microseconds:.0f}", f"{p.share_of_copy:.0%}", parts))
    return "\n".join(lines)


def _indented(assumed: dict[str, Any], depth: int = 1) -> list[str]:
    """A line a value; a dictionary of plain numbers is one line."""
    lines = []
    for name, value in assumed.items():
        head = "  " * depth + name + ":"
        if not isinstance(value, dict):
            lines.append(f"{head} {value}")
        elif all(isinstance(inner, (int, float)) for inner in value.values()):
            lines.append(f"{head} " + ", ".join(f"{key} {inner}" for key, inner in value.items()))
        else:
            lines += [head, *_indented(value, depth + 1)]
    return lines


def _or_dash(value: Any) -> Any:
    return "-" if value is None else value
