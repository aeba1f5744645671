"""`prefixmem verify`."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from .._choices import BACKENDS, DTYPES, SHAPES, TARGETS
from .._files import write_text
from .._progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="what to hold against the reference (default: all that run)"
    )
    parser.add_argument("--cases", type=int, default=100, help="random configurations (default: %(default)s)")
    parser.add_argument(
        "--batches",
        type=int,
        help="of each configuration, whose compilation is paid once (default: 1; of a shape: all)",
    )
    parser.add_argument(
        "--shapes",
        help="fixed shapes instead of random configurations, over batches of 1 SID to --largest, uniform, skewed and "
        f"damaged: all, or some of {','.join(SHAPES)}",
    )
    parser.add_argument(
        "--largest", type=int, help="SIDs of the largest batch of --shapes (default: 65536; 1000 on a CPU)"
    )
    parser.add_argument(
        "--seconds", type=float, help="start no further configuration, or batch of --shapes, after so many"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the configurations (default: %(default)s)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--compile",
        action="store_true",
        help="compile offline instead; report machine code, launches, and times that a model gives",
    )
    instead.add_argument(
        "--traffic",
        action="store_true",
        help="count instead the bytes of each kernel in Triton's interpreter; --json prints a line a kernel",
    )
    for name, known in (("targets", TARGETS), ("dtypes", DTYPES)):
        parser.add_argument(f"--{name}", help=f"for --compile: some of {','.join(known)} (default: all)")
    parser.add_argument("--launchers", help="for --compile: some of those that the report names (default: all)")
    parser.add_argument(
        "--triton", help="for --compile: releases of triton to run with, as folders or as versions in .venv-triton/"
    )
    parser.add_argument("--save", metavar="FOLDER", help="for --compile: write compile_triton_<version>.json there")


def run(options: argparse.Namespace) -> int:
    if options.compile:
        return _compile(options)
    for name in ("targets", "dtypes", "launchers", "triton", "save"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} goes with --compile; add it, or leave --{name} out")
    if options.traffic:
        from ..checks.counting import count_traffic

        return count_traffic(options.json)
    return _verify(options)


def _verify(options: argparse.Namespace) -> int:
    if options.cases < 1:
        raise ValueError(f"--cases = {options.cases}; give 1 or more")
    for name in ("batches", "largest"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name} = {getattr(options, name)}; give 1 or more")
    if options.largest is not None and options.shapes is None:
        raise ValueError("--largest goes with --shapes; add it, or leave --largest out")
    if options.seconds is not None and not options.seconds > 0:
        raise ValueError(f"--seconds = {options.seconds}; give more than 0")
    shapes = () if options.shapes is None else _listed("shapes", options, SHAPES)
    import torch

    from .._triton import interpreting
    from ..checks.cases import grid_of
    from ..checks.parity import verify, verify_shapes
    from ..operation.backends import backend_problem, choose_backend

    device = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
    skipped = None
    if options.backend == "auto":
        skipped = backend_problem("triton", torch.device(device))
        backends = tuple(name for name in ("triton", "cpu") if backend_problem(name, torch.device(device)) is None)
    else:
        choose_backend(options.backend, tensors=torch.empty(0, device=device))
        backends = () if options.backend == "reference" else (options.backend,)

    began = time.monotonic()
    if shapes:
        largest = options.largest or (65_536 if device == "cuda" else 1000)
        every = len(grid_of(shapes[0], options.seed, largest))
        batches = min(options.batches or every, every)
        wanted, unit = batches * len(shapes), "batches"
        reports = verify_shapes(backends, shapes, options.seed, device, batches, largest)
    else:
        wanted, unit = options.cases, "cases"
        reports = verify(backends, options.cases, options.seed, device, options.batches or 1)
    with Progress("verify", wanted, unit, quiet=options.json) as progress:
        for report in reports:
            progress.update(mismatches=len(report.mismatches))
            if options.seconds is not None and time.monotonic() - began > options.seconds:
                break
    if options.json:
        print(json.dumps({**asdict(report), "triton_skipped": skipped}, indent=2))
    else:
        where = "the Triton interpreter on the CPU" if interpreting() else device
        print(f"{' and '.join(report.backends)} on {where}, seed {report.seed}")
        if skipped:
            print(f"triton not checked: {skipped}")
        of = f"{len(shapes)} shapes" if shapes else f"{options.cases} cases"
        print(
            f"{report.cases} of {of}, {report.batches} batches, "
            f"{report.comparisons} comparisons, {len(report.mismatches)} mismatches"
        )
        for dtype, worst in sorted(report.worst.items()):
            print(f"{dtype:<10} worst error {worst['absolute']:.3g}, {worst['of_bound']:.2f} of the derived bound")
        for mismatch in report.mismatches[:10]:
            print(f"MISMATCH {mismatch}")
    return 1 if report.mismatches else 0


def _compile(options: argparse.Namespace) -> int:
    targets, dtypes = _listed("targets", options, TARGETS), _listed("dtypes", options, DTYPES)
    if options.triton is not None:
        return _compile_with_others(options, targets, dtypes)
    from ..checks import compile_report as offline

    launchers = None if options.launchers is None else _split(options.launchers)
    kernels: Counter[tuple[str, str]] = Counter()
    with Progress("compile", len(targets) * len(dtypes), "targets and dtypes", quiet=options.json) as progress:

        def count(kernel: offline.Compiled) -> None:
            if kernels and (kernel.target, kernel.dtype) not in kernels:
                progress.update(kernels=kernels.total())
            kernels[kernel.target, kernel.dtype] += 1

        report = offline.compile_report(targets, dtypes, launchers, count)
    if options.save is not None:
        folder = Path(options.save)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"compile_triton_{report.versions['triton']}.json", offline.as_json(report) + "\n")
    print(offline.as_json(report) if options.json else offline.as_text(report))
    return 1 if report.spilled else 0


def _compile_with_others(options: argparse.Namespace, targets: tuple[str, ...], dtypes: tuple[str, ...]) -> int:
    from ..checks.other_triton import folder_of, run_with

    arguments = ["verify", "--compile", "--targets", ",".join(targets), "--dtypes", ",".join(dtypes)]
    arguments += ["--json"] * options.json
    for name in ("launchers", "save"):
        if getattr(options, name) is not None:
            arguments += [f"--{name}", getattr(options, name)]
    folders = [folder_of(release) for release in _split(options.triton)]
    return max([run_with(folder, arguments) for folder in folders], default=0)


def _listed(name: str, options: argparse.Namespace, known: Iterable[str]) -> tuple[str, ...]:
    given = getattr(options, name)
    chosen = tuple(known) if given in (None, "all") else _split(given)
    if not chosen or any(value not in known for value in chosen):
        raise ValueError(f"--{name} = {given!r} is unknown; allowed are {', '.join(known)}, separated by commas")
    return chosen


def _split(given: str) -> tuple[str, ...]:
    return tuple(filter(None, re.split(r"[,\s]+", given)))
