"""`prefixmem verify`."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

from .._choices import BACKENDS, DTYPES, SHAPES, TARGETS
from .._files import check_writable, write_text
from .._progress import Progress, say
from .train import folder_name

_LARGEST = 65_536  # SIDs of the largest batch of a shape
# Options of neither --compile nor --traffic.
_OF_CHECKS = ("backend", "cases", "batches", "shapes", "largest", "seconds", "seed")
_CHILD_SECONDS = 5.0  # for a child to say that it is interrupted, before it is killed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", choices=BACKENDS, help="what to hold against the reference (default: auto, all that run)"
    )
    parser.add_argument("--cases", type=int, help="random configurations (default: 100)")
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
        "--largest", type=int, help=f"SIDs of the largest batch of --shapes (default: {_LARGEST}; 1000 on a CPU)"
    )
    parser.add_argument("--seconds", type=float, help="start no further configuration, or batch, after so many")
    parser.add_argument("--seed", type=int, help="seed of the configurations (default: 0)")
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
        parser.add_argument(f"--{name}", help=f"for --compile: all, or some of {','.join(known)} (default: all)")
    parser.add_argument("--launchers", help="for --compile: some of those that the report names (default: all)")
    parser.add_argument(
        "--triton",
        help="for --compile: releases of triton to run with, as folders or as versions in .venv-triton/, with commas",
    )
    parser.add_argument(
        "--save",
        metavar="FOLDER",
        type=folder_name,
        help="for --compile: write compile_triton_<version>.json there, or ..._part.json where not all is compiled",
    )


def run(options: argparse.Namespace) -> int:
    for instead in ("compile", "traffic"):
        for name in _OF_CHECKS if getattr(options, instead) else ():
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} does not go with --{instead}; leave one of them out")
    if options.compile:
        return _compile(options)
    for name in ("targets", "dtypes", "launchers", "triton", "save"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} goes with --compile; add it, or leave --{name} out")
    if options.traffic:
        from .._triton import interpreting
        from ..checks.counting import count_traffic

        count = partial(count_traffic, options.json)
        return count() if interpreting() else _of_child(count, "that counts")
    return _verify(options)


def _verify(options: argparse.Namespace) -> int:
    for name in ("cases", "batches", "largest"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name} = {getattr(options, name)}; give 1 or more")
    if options.largest is not None and options.shapes is None:
        raise ValueError("--largest goes with --shapes; add it, or leave --largest out")
    if options.largest is not None and options.largest > _LARGEST:
        raise ValueError(f"--largest = {options.largest}; give {_LARGEST} or less, as the largest batch of a shape")
    if options.cases is not None and options.shapes is not None:
        raise ValueError("--cases does not go with --shapes; leave one of them out")
    if options.seconds is not None and not options.seconds > 0:
        raise ValueError(f"--seconds = {options.seconds}; give more than 0")
    shapes = () if options.shapes is None else _listed("shapes", options, SHAPES)
    cases, seed, backend = options.cases or 100, options.seed or 0, options.backend or "auto"
    import torch

    from .._triton import interpreting
    from ..checks.cases import grid_of
    from ..checks.parity import verify, verify_shapes
    from ..operation.backends import backend_problem, choose_backend

    device = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
    skipped = None
    if backend == "auto":
        skipped = backend_problem("triton", torch.device(device))
        backends = tuple(
            name for name in ("triton", "native", "cpu") if backend_problem(name, torch.device(device)) is None
        )
    else:
        choose_backend(backend, tensors=torch.empty(0, device=device))
        backends = () if backend == "reference" else (backend,)

    until = math.inf if options.seconds is None else time.monotonic() + options.seconds
    if shapes:
        largest = options.largest or (_LARGEST if device == "cuda" else 1000)
        every = len(grid_of(shapes[0], seed, largest))
        batches = min(options.batches or every, every)
        wanted, unit = batches * len(shapes), "batches"
        reports = verify_shapes(backends, shapes, seed, device, batches, largest)
    else:
        wanted, unit = cases, "cases"
        reports = verify(backends, cases, seed, device, options.batches or 1, until)
    with Progress("verify", wanted, unit, quiet=options.json) as progress:
        for report in reports:
            progress.update(mismatches=len(report.mismatches))
            if time.monotonic() >= until:
                break
    if options.json:
        print(json.dumps({**asdict(report), "triton_skipped": skipped}, indent=2))
    else:
        where = "the Triton interpreter on the CPU" if interpreting() else device
        print(f"{' and '.join(report.backends)} on {where}, seed {report.seed}")
        if skipped:
            print(f"triton not checked: {skipped}")
        of = f"{len(shapes)} shapes" if shapes else f"{cases} cases"
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
    launchers = None if options.launchers in (None, "all") else _split(options.launchers)
    if launchers == ():
        raise ValueError(f"--launchers = {options.launchers!r} names none; name some of the report's, or leave it out")
    if options.triton is not None:
        return _compile_with_others(options, targets, dtypes, launchers)
    from ..checks import compile_report as offline

    folder = None if options.save is None else _writable(options.save)
    kernels: Counter[tuple[str, str]] = Counter()
    with Progress("compile", len(targets) * len(dtypes), "targets and dtypes", quiet=options.json) as progress:

        def count(kernel: offline.Compiled) -> None:
            if kernels and (kernel.target, kernel.dtype) not in kernels:
                progress.update(kernels=kernels.total())
            kernels[kernel.target, kernel.dtype] += 1

        report = offline.compile_report(targets, dtypes, launchers, count)
    if folder is not None:
        part = "" if (targets, dtypes, launchers) == (TARGETS, DTYPES, None) else "_part"
        write_text(folder / f"compile_triton_{report.versions['triton']}{part}.json", offline.as_json(report) + "\n")
    print(offline.as_json(report) if options.json else offline.as_text(report))
    return 1 if report.spilled else 0


def _compile_with_others(
    options: argparse.Namespace, targets: tuple[str, ...], dtypes: tuple[str, ...], launchers: tuple[str, ...] | None
) -> int:
    from ..checks.other_triton import folders_of, run_with

    folders = folders_of(options.triton)
    if options.json and len(folders) > 1:
        raise ValueError(
            f"--json prints one object, and --triton = {options.triton!r} names {len(folders)} releases; name one, or "
            "leave --json out and --save the reports"
        )
    arguments = ["verify", "--compile", "--targets", ",".join(targets), "--dtypes", ",".join(dtypes)]
    arguments += ["--json"] * options.json
    if launchers is not None:
        arguments += [f"--launchers={','.join(launchers)}"]
    if options.save is not None:
        arguments += [f"--save={_writable(options.save)}"]
    worst = 0
    for folder in folders:
        code = _of_child(partial(run_with, folder, arguments), f"with the triton of {folder}", len(folders) > 1)
        if code == 130:
            return code
        worst = max(worst, code)
    return worst


def _writable(given: str) -> Path:
    """The folder of --save, made and tried before minutes of compiling."""
    try:
        folder = Path(given)
        check_writable(folder)
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"--save = {given!r} is no folder that can be written ({error}); give another") from None
    return folder


def _of_child(run: Callable[[], int], which: str, one_of_many: bool = False) -> int:
    """The exit code of `run`, which waits for a process: 1 if that crashed, 130 once it has said "interrupted"."""
    with _interrupts_are_the_childs() as interrupted:
        code = run()
    if code == -signal.SIGINT or (interrupted and code != 130):
        raise KeyboardInterrupt
    if code < 0:
        say(f"prefixmem verify: the process {which} crashed: {signal.strsignal(-code) or 'signal'} ({-code})")
        return 1
    if one_of_many and code not in (0, 130):
        say(f"prefixmem verify: the process {which} ended with exit code {code}")
    return code


@contextmanager
def _interrupts_are_the_childs() -> Iterator[list[bool]]:
    """Ctrl-C reaches a child too, which says so; raised here if it comes again, or if the child goes on for long.

    Yields a list that is not empty once it has come.
    """
    interrupted: list[bool] = []
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield interrupted
        return
    again = threading.Timer(_CHILD_SECONDS, os.kill, (os.getpid(), signal.SIGINT))
    again.daemon = True

    def first(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupted.append(True)
        again.start()

    signal.signal(signal.SIGINT, first)
    try:
        yield interrupted
    finally:
        again.cancel()
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _listed(name: str, options: argparse.Namespace, known: tuple[str, ...]) -> tuple[str, ...]:
    """Of `known`, in its order."""
    given = getattr(options, name)
    chosen = ("all",) if given is None else _split(given)
    if not chosen or any(value not in (*known, "all") for value in chosen):
        raise ValueError(
            f"--{name} = {given!r} is unknown; allowed are all, or some of {', '.join(known)}, separated by commas"
        )
    return tuple(value for value in known if value in chosen or "all" in chosen)


def _split(given: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, re.split(r"[,\s]+", given))))
