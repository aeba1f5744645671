"""Benchmarks of prefixmem_fast on this machine: run them, report them, compare two runs or two revisions.

    python -m bench list
    python -m bench run [names] [--where codes=uniform sids=16384] [--seconds 300]
    python -m bench report bench/results/<machine>.jsonl
    python -m bench compare before.jsonl after.jsonl
    python -m bench compare main HEAD --names training
    python -m bench scale --items 1e9

`prefixmem bench` is the same command.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path("bench/results")  # in a checkout
ELSEWHERE = Path("runs/bench")


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["quality"]:
        from .quality.__main__ import main as quality

        return quality(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__.splitlines()[0], allow_abbrev=False,
        epilog="python -m bench quality: the study of recommendation quality.",
    )  # fmt: skip
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
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|run|report|compare|scale")

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=summary.replace("%", "%%"), description=summary, allow_abbrev=False)
        action.add_argument("--json", action="store_true", help="print JSON, one object a line")
        return action

    add("list", "The benchmarks and their workloads on this machine.")
    measure = add("run", "Measure, print tables, and append a row for each figure.")
    _add_selection(measure)
    measure.add_argument("names", nargs="*", metavar="name", help="benchmarks (default: all)")
    measure.add_argument(
        "--out", type=Path, help=f"file of rows (default: <machine>.jsonl in {RESULTS} or {ELSEWHERE})"
    )
    measure.add_argument("--seconds", type=float, help="start no further workload after so many")
    measure.add_argument("--share", type=float, default=0.5, help="seconds a provider and workload (default: 0.5)")
    measure.add_argument("--no-audit", action="store_true", help="times alone, no memory and no launches")
    measure.add_argument("--report", action="store_true", help="then write tables and plots, as `report` does")
    measure.add_argument("--commit", help="name of the library's revision, where it is not a checkout's")
    report = add("report", "Markdown tables and plots from a file of rows.")
    report.add_argument("rows", type=Path, help="file of rows")
    report.add_argument("--out", type=Path, help="folder of tables and plots (default: beside the rows, by their name)")
    compare = add(
        "compare", "Fail where B is slower than A by more than 15 %: two files of rows, or two git revisions."
    )
    compare.add_argument("a", metavar="A", help="file of rows, or revision")
    compare.add_argument("b", metavar="B", help="file of rows, or revision")
    _add_selection(compare)
    compare.add_argument("--names", nargs="+", default=["training-sweep"], help="benchmarks to run on two revisions")
    compare.add_argument("--rounds", type=int, default=3, help="runs of each revision, in turns (default: %(default)s)")
    scale = add("scale", "What a catalogue costs in rows, bytes and devices, by the formulas of scale.py.")
    scale.add_argument("--items", type=float, default=1e9, help="of the catalogue (default: %(default)g)")
    scale.add_argument("--codes", type=int, default=2048, help="K, of each level (default: %(default)s)")
    scale.add_argument("--table-rows", type=float, nargs="+", default=[2e6, 5e6, 5e7, 2.5e8, 1e9], help="T, to compare")
    scale.add_argument("--rows", type=Path, nargs="*", default=[], help="files of rows whose steps are set beside it")


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--where", nargs="+", default=[], metavar="name=value", help="only workloads with these values")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="name=value", help="one workload a benchmark: its first, so changed"
    )
    parser.add_argument("--quick", action="store_true", help="one tiny workload a benchmark: whether everything runs")


def run(options: argparse.Namespace) -> int:
    """Exit code: 0 done, 1 a check failed, 2 bad input."""
    actions = {"list": _list, "run": _run, "report": _report, "compare": _compare, "scale": _scale}
    return actions[options.action](options)


def _list(options: argparse.Namespace) -> int:
    from .rows import describe

    device = _device()
    for one in _registered().values():
        workloads = one.workloads(device)
        if options.json:
            print(json.dumps({"benchmark": one.name, "summary": one.summary, "workloads": workloads}))
            continue
        print(f"{one.name}: {one.summary}")
        for workload in workloads:
            print(f"    {describe(workload)}")
    return 0


def _run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from . import machine, measure
    from .report import table
    from .rows import append_rows, describe
    from .suite import plan
    from .suite import run as run_workload

    began = time.monotonic()
    for name in ("seconds", "share"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} {value} is not above 0")
    todo = _chosen(options, plan(_names(options.names), _device(), options.quick))
    about = machine.provenance()
    if options.commit:
        about["commit"] = options.commit
    about["run"] = f"{about['date']} {machine.name_of(about['machine'])}"
    out = options.out or (RESULTS if RESULTS.is_dir() else ELSEWHERE) / f"{machine.name_of(about['machine'])}.jsonl"
    state = None
    if _device() == "cuda":
        state = machine.DeviceState()
        clock: measure.Clock = measure.DeviceClock(state.sample)
    else:
        clock = measure.HostClock()
    ceilings = {
        "copy_bytes_per_second": measure.copy_bandwidth(clock.device),
        "matrix_flops_per_second": measure.matrix_rate(clock.device),
    }
    about["ceilings"] = ceilings
    if not options.json:
        copies, products = ceilings["copy_bytes_per_second"] / 1e9, ceilings["matrix_flops_per_second"] / 1e12
        print(f"{machine.name_of(about['machine'])}: copies {copies:.4g} GB/s, matrix products {products:.3g} TFLOP/s")
        print(f"rows go to {out}", flush=True)
    wrong = left = 0
    progress = tqdm(todo, desc="workloads", disable=None)
    for one, workload, audit in progress:
        if options.seconds and time.monotonic() - began > options.seconds:
            left += 1
            continue
        rows = []
        for row in run_workload(
            one,
            workload,
            clock,
            ceilings,
            seconds=0.05 if options.quick else options.share,
            audit=0 if options.no_audit else audit,
            state=state,
        ):
            append_rows(out, [row], about)  # at once: a run that is cut off keeps what it had
            rows.append(row)
        gc.collect()
        wrong += sum(row.get("skipped", "").startswith(("WRONG", "FAILED")) for row in rows)
        with progress.external_write_mode():
            if options.json:
                print("\n".join(json.dumps({**row, **about}) for row in rows), flush=True)
            else:
                print(f"\n{one.name}: {describe(workload)}\n\n{table(rows)}", flush=True)
    if left:
        print(f"{left} workloads left out: the {options.seconds:g} seconds of --seconds were over", file=sys.stderr)
    if options.report and out.is_file():
        _print_report(out, out.with_suffix(""), options.json)
    if wrong:
        print(f"{wrong} providers were wrong or failed, see above", file=sys.stderr)
    return 1 if wrong else 0


def _report(options: argparse.Namespace) -> int:
    _print_report(options.rows, options.out or options.rows.with_suffix(""), options.json)
    return 0


def _print_report(rows: Path, folder: Path, as_json: bool) -> None:
    from .report import write_report

    for path in write_report(rows, folder):
        print(json.dumps({"file": str(path)}) if as_json else path)


def _compare(options: argparse.Namespace) -> int:
    from . import compare

    a, b = Path(options.a), Path(options.b)
    if a.is_file() != b.is_file():
        raise ValueError(f"A = {a} and B = {b}: give two files of rows, or two git revisions")
    if a.is_file():
        found = compare.compare_files(a, b)
    else:
        selection = ["--where", *options.where] * bool(options.where) + ["--set", *options.set] * bool(options.set)
        selection += ["--quick"] * options.quick
        found = compare.compare_revisions(options.a, options.b, _names(options.names), selection, options.rounds)
    for one in found:
        print(json.dumps(one.as_row()) if options.json else one, flush=True)
    slower = sum(one.slower for one in found)
    if not found:
        raise ValueError("A and B have no figure of prefixmem_fast in common")
    print(f"{slower} of {len(found)} figures are slower by more than {compare.LIMIT:.0%}", file=sys.stderr)
    return 1 if slower else 0


def _scale(options: argparse.Namespace) -> int:
    from . import scale

    for name in ("items", "codes"):
        if not getattr(options, name) >= 1:
            raise ValueError(f"--{name} {getattr(options, name)} is below 1")
    if not all(size >= 1 for size in options.table_rows):
        raise ValueError(f"--table-rows {options.table_rows} holds a number below 1")
    catalogue = scale.Catalogue(options.items, options.codes)
    measured = [row for path in options.rows for row in scale.measured_steps(path)]
    if options.json:
        print(json.dumps(scale.as_row(catalogue, options.table_rows)))
    else:
        print(scale.tables(catalogue, options.table_rows, measured))
    return 0


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _registered() -> dict[str, Any]:
    from . import benchmarks  # noqa: F401  registers them
    from .suite import BENCHMARKS

    return BENCHMARKS


def _names(given: list[str]) -> list[str]:
    known = _registered()
    for name in given:
        if name not in known:
            raise ValueError(f"no benchmark is named {name!r}; there are {', '.join(known)}")
    return given or list(known)


def _chosen(options: argparse.Namespace, todo: list) -> list:
    """The workloads that --where and --set leave."""
    conditions = _conditions("--where", options.where, todo)
    todo = [entry for entry in todo if all(str(entry[1].get(name)) == value for name, value in conditions.items())]
    if not todo:
        raise ValueError(f"--where {' '.join(options.where)}: no workload has these values; see python -m bench list")
    changes = _conditions("--set", options.set, todo)
    if changes:
        firsts = {one.name: (one, workload, audit) for one, workload, audit in reversed(todo)}
        todo = [(one, workload, audit) for one, workload, audit in reversed(firsts.values())]
    return todo


def _conditions(option: str, given: list[str], todo: list) -> dict[str, str]:
    known = sorted({name for _, workload, _ in todo for name in workload})
    found = dict(condition.partition("=")[::2] for condition in given)
    for condition in given:
        if "=" not in condition or condition.partition("=")[0] not in known:
            raise ValueError(f"{option} {condition}: give name=value, with a name of {', '.join(known)}")
    return found


def _changed(workload: dict[str, Any], changes: dict[str, str]) -> dict[str, Any]:
    """Values of the type that they replace; names that a workload has not are another benchmark's."""
    changed = dict(workload)
    for name, value in changes.items():
        if isinstance(workload.get(name), int):
            if not value.isdecimal() or int(value) < 1:
                raise ValueError(f"--set {name}={value}: give a whole number above 0")
            changed[name] = int(value)
        elif name in workload:
            changed[name] = value
    return changed
