"""`prefixmem verify`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from dataclasses import asdict

from .._choices import BACKENDS, DTYPES, TARGETS
from .._progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="what to hold against the reference (default: all that run)"
    )
    parser.add_argument("--cases", type=int, default=100, help="random configurations (default: %(default)s)")
    parser.add_argument("--seconds", type=float, help="start no further configuration after so many")
    parser.add_argument("--seed", type=int, default=0, help="seed of the configurations (default: %(default)s)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--compile", action="store_true", help="compile offline instead, and report the machine code")
    instead.add_argument(
        "--traffic",
        action="store_true",
        help="count instead the bytes of each kernel in Triton's interpreter; --json prints a line a kernel",
    )
    for name, known in (("targets", TARGETS), ("dtypes", DTYPES)):
        parser.add_argument(f"--{name}", help=f"for --compile: some of {','.join(known)} (default: all)")


def run(options: argparse.Namespace) -> int:
    if options.compile:
        return _compile(options)
    for name in ("targets", "dtypes"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} goes with --compile; add it, or leave --{name} out")
    if options.traffic:
        from ..checks.counting import count_traffic

        return count_traffic(options.json)
    return _verify(options)


def _verify(options: argparse.Namespace) -> int:
    if options.cases < 1:
        raise ValueError(f"--cases = {options.cases}; give 1 or more")
    if options.seconds is not None and not options.seconds > 0:
        raise ValueError(f"--seconds = {options.seconds}; give more than 0")
    import torch

    from .._triton import interpreting
    from ..checks.parity import verify
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
    with Progress("verify", options.cases, "cases", quiet=options.json) as progress:
        for report in verify(backends, options.cases, options.seed, device):
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
        print(
            f"{report.cases} of {options.cases} cases, {report.comparisons} comparisons, "
            f"{len(report.mismatches)} mismatches"
        )
        for dtype, worst in sorted(report.worst.items()):
            print(f"{dtype:<10} worst error {worst['absolute']:.3g}, {worst['of_bound']:.2f} of the derived bound")
        for mismatch in report.mismatches[:10]:
            print(f"MISMATCH {mismatch}")
    return 1 if report.mismatches else 0


def _compile(options: argparse.Namespace) -> int:
    from ..checks import machine_code as offline
    from ..checks.environment import facts as machine_facts

    targets, dtypes = _listed("targets", options, TARGETS), _listed("dtypes", options, DTYPES)
    kernels = []
    with Progress("compile", len(targets) * len(dtypes), "targets and dtypes", quiet=options.json) as progress:
        for kernel in offline.compile_all(targets, dtypes):
            if kernels and (kernel.target, kernel.dtype) != (kernels[-1].target, kernels[-1].dtype):
                progress.update(kernels=len(kernels))
            kernels.append(kernel)
    spilled = [kernel for kernel in kernels if not kernel.clean]
    if options.json:
        head = {"versions": machine_facts()["versions"], "width": offline.WIDTH, "spec": offline.paper_spec().to_dict()}
        lines = ",\n".join(json.dumps(asdict(kernel)) for kernel in kernels)  # a kernel a line, to be compared
        print(f'{json.dumps(head)[:-1]}, "kernels": [\n{lines}\n]}}')
        return 1 if spilled else 0
    print(f"{offline.paper_spec()}, rows of {offline.WIDTH}")
    print("loads, stores and atomic adds: bytes a thread moves in one instruction x how many such instructions")
    form = "{:<8}{:<25}{:<19}{:<8}{:<10}{:>5}{:>8}{:>7}{:>8}  {:<26}{:<20}{}"
    heads = ("target", "launcher", "kernel", "mode", "dtype", "regs", "spills", "local", "shared", "loads", "stores")
    print(form.format(*heads, "adds"))
    for k in kernels:
        widths = [" ".join(f"{size}x{count}" for size, count in w.items()) for w in (k.loads, k.stores, k.reductions)]
        facts = (k.target, k.launcher, k.kernel, k.mode, k.dtype, k.registers, k.spills, k.local_bytes, k.shared_bytes)
        print(form.format(*facts, *widths).rstrip())
    print(f"{len(kernels)} kernels compiled, {len(spilled)} with spills or local memory")
    return 1 if spilled else 0


def _listed(name: str, options: argparse.Namespace, known: Iterable[str]) -> tuple[str, ...]:
    given = getattr(options, name)
    chosen = tuple(known) if given is None else tuple(filter(None, map(str.strip, given.split(","))))
    if not chosen or any(value not in known for value in chosen):
        raise ValueError(f"--{name} = {given!r} is unknown; allowed are {', '.join(known)}, separated by commas")
    return chosen
