"""Benchmarks of prefixmem_fast on this machine: run them, report them, compare two runs or two revisions.

    python -m bench list
    python -m bench run [names] [--set codes=hot sids=4096] [--seconds 300] [--report]
    python -m bench report runs/bench/<machine>.jsonl
    python -m bench compare before.jsonl after.jsonl
    python -m bench compare main HEAD --names training
    python -m bench scale --items 1e9
    python -m bench traffic
    python -m bench host
    python -m bench callgrind
    python -m bench distributed --ranks 2
    python -m bench gpu --minutes 3
    python -m bench quality --help
    python -m bench language-model-study --help

`prefixmem bench` is the same command.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from prefixmem_fast._files import write_file

from . import callgrind, compare, host, plots, scale
from .distributed import cli as distributed
from .quality import cli as quality
from .quality import language_model
from .registry import BENCHMARKS
from .report import page, table
from .rows import append_rows, check_out, describe, latest, read_rows

if TYPE_CHECKING:
    from .run import Planned

ACTIONS = (
    *("list", "run", "report", "compare", "gpu", "predicted", "scale", "traffic", "host", "callgrind", "quality"),
    *("distributed", "language-model-study"),
)
# Git ignores it; rows that are to be committed go to --out bench/results/<machine>.jsonl.
RUNS = Path("runs/bench")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        return run(options)
    except (ValueError, OSError) as error:
        print(f"python -m bench {options.action}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"python -m bench {options.action}: interrupted; rows that were printed are stored", file=sys.stderr)
        return 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="|".join(ACTIONS))

    def add(name: str, run: Callable[[argparse.Namespace], int], summary: str) -> Callable:
        action = actions.add_parser(name, help=summary.replace("%", "%%"), description=summary, allow_abbrev=False)
        action.set_defaults(run_action=run)
        action.add_argument("--json", action="store_true", help="print JSON, one object a line")
        return action.add_argument

    add("list", _list, "The benchmarks and their workloads on this machine.")
    option = add("run", _run, "Measure, print tables, and append a row for each figure.")
    option("names", nargs="*", metavar="name", help="benchmarks (default: all)")
    _add_selection(option)
    option("--out", type=Path, help=f"file of rows (default: {RUNS}/<machine>.jsonl)")
    option("--seconds", type=float, help="begin nothing new after so many, and say what was left out")
    option("--share", type=float, default=0.5, help="seconds a provider and workload (default: %(default)s)")
    option("--no-counts", action="store_true", help="times alone, no memory and no launches")
    option("--ours", action="store_true", help="this package's providers alone")
    option("--report", action="store_true", help="then write tables and plots, as `report` does")
    option("--commit", help="name of the library's revision, where it is not a checkout's")
    option = add("report", _report, "Markdown tables and plots from a file of rows.")
    option("rows", type=Path, help="file of rows")
    option("--out", type=Path, help="folder of tables and plots (default: named as the rows)")
    option = add("compare", _compare, "Fail where B is slower than A by more than 15 %.")
    option("a", metavar="A", help="file of rows, or git revision")
    option("b", metavar="B", help="the same of the other")
    _add_selection(option)
    option("--names", nargs="+", default=["training-sweep"], help="benchmarks to run on two revisions")
    option(
        "--rounds",
        type=int,
        default=3,
        help="runs of each revision, in turns; a verdict takes three (default: %(default)s)",
    )
    option = add("gpu", _gpu, "A few minutes on whatever GPU is there, and one file of rows to send in.")
    option("--minutes", type=float, default=3, help="begin nothing new after so many (default: %(default)g)")
    option("--out", type=Path, help="file of rows (default: prefixmem-<GPU>-<date>.jsonl in this folder)")
    option = add("predicted", _predicted, "Times on this GPU beside those that a static report predicts.")
    option("static", type=Path, metavar="report", help="a file of `prefixmem verify --compile --save`")
    option("--out", type=Path, required=True, help="file of rows")
    option("--commit", help="name of the library's revision, where it is not a checkout's")
    add("traffic", _traffic, "Count the bytes of each kernel in Triton's interpreter, in minutes.")
    host.add_arguments(add("host", host.run, "Time the host's work of a call, with kernels that return at once."))
    callgrind.add_arguments(
        add("callgrind", callgrind.run, "Count instructions and cache misses of the CPU kernels in valgrind.")
    )
    summary = "Bytes that leave a rank, and times, of the tables on several processes by every layout."
    distributed.add_arguments(add("distributed", distributed.run, summary))
    scale.add_arguments(add("scale", scale.run, "What a catalogue costs in rows, bytes and devices, by formulas."))
    form = argparse.RawDescriptionHelpFormatter
    for name, study in (("quality", quality), ("language-model-study", language_model)):
        summary = study.__doc__.splitlines()[0]
        action = actions.add_parser(name, help=summary, description=study.__doc__, formatter_class=form)
        action.set_defaults(run_action=study.run)
        study.add_arguments(action.add_argument)


def _add_selection(option: Callable) -> None:
    option("--set", nargs="+", default=[], metavar="name=value", help="each benchmark's first workload, so changed")
    option("--quick", action="store_true", help="one tiny workload a benchmark: whether everything runs")


def run(options: argparse.Namespace) -> int:
    """Exit code: 0 done, 1 a check failed, 2 bad input; 141, as of a killed pipe, where nobody reads on."""
    if options.action == "gpu" and getattr(options, "command", "") == "bench":
        options.command = "bench gpu"  # as which `prefixmem` says what is wrong
    try:
        code = options.run_action(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        return 141


def _list(options: argparse.Namespace) -> int:
    from . import benchmarks  # noqa: F401  registers them

    for benchmark in BENCHMARKS.values():
        workloads = benchmark.workloads(_device())
        if options.json:
            print(json.dumps({"benchmark": benchmark.name, "summary": benchmark.summary, "workloads": workloads}))
        else:
            print(f"{benchmark.name}: {benchmark.summary}", *map(describe, workloads), sep="\n    ")
    return 0


def _run(options: argparse.Namespace) -> int:
    from .clocks import DeviceClock, HostClock
    from .machine import copy_bandwidth, file_name, run_record
    from .run import plan
    from .run import run as run_workload

    began = time.monotonic()
    for name in ("seconds", "share"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} {value} is not above 0; give a number of seconds")
    if options.out is not None:
        check_out(options.out)
    todo = _changed(plan(_names(options.names), _device(), options.quick), options.set)
    record = run_record(options.commit)
    machine = file_name(record)
    out = options.out or RUNS / f"{machine}.jsonl"
    clock = DeviceClock() if _device() == "cuda" else HostClock()
    record["ceilings"] = {"copy_bytes_per_second": copy_bandwidth(clock.device)}
    if not options.json:
        copies = record["ceilings"]["copy_bytes_per_second"] / 1e9
        print(f"{machine}: copies move {copies:.4g} GB/s; rows go to {out}", flush=True)
    wrong = left_out = 0
    until = began + options.seconds if options.seconds else None
    progress = tqdm(todo, desc="workloads", disable=None)
    for i, (benchmark, workload, counted) in enumerate(progress, 1):
        if until is not None and time.monotonic() > until:
            left_out += 1
            continue
        if progress.disable and len(todo) > 1:
            seconds = time.monotonic() - began
            line = f"{i} of {len(todo)}, after {seconds:.0f} s: {benchmark.name}, {describe(workload)}"
            print(line, file=sys.stderr, flush=True)
        rows = []
        seconds, counted = 0.05 if options.quick else options.share, 0 if options.no_counts else counted
        for row in run_workload(benchmark, workload, clock, seconds, counted, until, options.ours):
            if "--seconds" not in row.get("skipped", ""):  # no fact of the machine, to be kept
                append_rows(out, record, [row])  # at once: a run that is cut off keeps what it had
            rows.append({**record, **row})
        gc.collect()
        wrong += sum(row.get("skipped", "").startswith(("WRONG", "FAILED")) for row in rows)
        with progress.external_write_mode():
            if options.json:
                print("\n".join(map(json.dumps, rows)), flush=True)
            else:
                print(f"\n{benchmark.name}: {describe(workload)}\n\n{table(rows)}", flush=True)
    if left_out:
        print(f"{left_out} workloads left out: the {options.seconds:g} seconds of --seconds were over", file=sys.stderr)
    if options.report and out.is_file():
        _report(argparse.Namespace(rows=out, out=None, json=options.json))
    if wrong:
        print(f"{wrong} providers were wrong or failed, see above", file=sys.stderr)
    return 1 if wrong else 0


def _gpu(options: argparse.Namespace) -> int:
    from . import card

    return card.run(options)


def _predicted(options: argparse.Namespace) -> int:
    from . import predicted

    return predicted.run(options)


def _traffic(options: argparse.Namespace) -> int:
    from prefixmem_fast.checks.counting import count_traffic  # `compare` runs this file on older libraries too

    return count_traffic(options.json)


def _report(options: argparse.Namespace) -> int:
    """Tables and plots of the latest run of every workload."""
    rows, folder = latest(read_rows(options.rows)), options.out or options.rows.with_suffix("")
    if not rows:
        raise ValueError(f"{options.rows} holds no rows; python -m bench run writes them")
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    try:
        pictures = plots.draw(rows, folder)
    except ImportError as error:
        print(f"no plots: {error}; pip install matplotlib", file=sys.stderr)
    write_file(folder / "tables.md", lambda temporary: Path(temporary).write_text(page(rows, pictures)))
    for path in (folder / "tables.md", *pictures):
        print(json.dumps({"file": str(path)}) if options.json else path)
    return 0


def _compare(options: argparse.Namespace) -> int:
    a, b = Path(options.a), Path(options.b)
    if a.is_file() != b.is_file():
        raise ValueError(f"A = {a} and B = {b}: give two files of rows, or two git revisions")
    if a.is_file():
        figures = compare.compare_files(a, b)
    else:
        selection = ["--set", *options.set] * bool(options.set) + ["--quick"] * options.quick
        figures = compare.compare_revisions(options.a, options.b, _names(options.names), selection, options.rounds)
    if not figures:
        raise ValueError("A and B have no figure of prefixmem_fast in common")
    for figure in figures:
        print(json.dumps(figure._asdict()) if options.json else figure, flush=True)
    if figures[0].slower is None:
        rounds = compare.ENOUGH_ROUNDS
        print(f"no verdict: --rounds {options.rounds} is no evidence; give {rounds} or more", file=sys.stderr)
        return 0
    slower = sum(figure.slower for figure in figures)
    print(f"{slower} of {len(figures)} figures are slower by more than {compare.LIMIT:.0%}", file=sys.stderr)
    return 1 if slower else 0


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _names(given: list[str]) -> list[str]:
    from . import benchmarks  # noqa: F401  registers them

    for name in given:
        if name not in BENCHMARKS:
            raise ValueError(f"no benchmark is named {name!r}; there are {', '.join(BENCHMARKS)}")
    return given or list(BENCHMARKS)


def _changed(todo: list[Planned], given: list[str]) -> list[Planned]:
    """With --set, the first workload of each benchmark with other values; a name it has not is another benchmark's."""
    if not given:
        return todo
    known = sorted({name for _, workload, _ in todo for name in workload})
    changes = dict(change.partition("=")[::2] for change in given)
    for change in given:
        if "=" not in change or change.partition("=")[0] not in known:
            raise ValueError(f"--set {change}: give name=value, with a name of {', '.join(known)}")
    firsts = {planned[0].name: planned for planned in reversed(todo)}
    return [
        (benchmark, {name: _value(name, old, changes.get(name, old)) for name, old in workload.items()}, counted)
        for benchmark, workload, counted in reversed(firsts.values())
    ]


def _value(name: str, old: Any, new: Any) -> Any:
    """`new` in the type of the value that it replaces."""
    if not isinstance(old, int) or new is old:
        return new
    if not new.isdecimal() or int(new) < 1:
        raise ValueError(f"--set {name}={new}: give a whole number above 0")
    return int(new)
