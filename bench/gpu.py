"""The whole GPU suite in one call, in under nine minutes: correctness on the device, then the benchmarks.

    python bench/gpu.py [--out FOLDER] [--seconds 530]

Runs in a checkout without installing anything and without a network, with the torch and triton that are there.

    info        versions, GPU, backends
    checks      side by side, as most of their time is compilation: parity of every kernel and dtype over random
                configurations, the tests of tests/gpu, and compute-sanitizer over a few configurations, if it is there
    benchmarks  by importance; each row is written as it comes, so that a run that is cut off keeps what it had
    counters    ncu's reading of the main kernels, if it is there

Without a GPU every job is skipped and says so.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKS, PARITY = 170, 130  # seconds after which checks are cut off, and in which parity draws configurations
COUNTERS = 60  # seconds kept for ncu
PARITY_PROCESSES = 4  # each with a seed of its own
KERNELS = "regex:prefix_memory_fwd|sum_prefixes|prefixes_kernel|mark_shared|sum_rows"


@dataclass
class Job:
    """One process of a stage; `absent` says why it does not run."""

    name: str
    command: list[str]
    absent: str | None = None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for result rows and logs")
    parser.add_argument("--seconds", type=float, default=530, help="for everything (default: %(default)s)")
    parser.add_argument("--commit", help="name of the revision, where the tree is a copy without git")
    options = parser.parse_args()
    out, deadline = options.out.resolve(), time.monotonic() + options.seconds
    reason = _no_gpu()
    if reason:
        for name in ("info", *(job.name for job in _checks()), "benchmarks", "counters"):
            print(f"{name:<16}skipped: {reason}")
        return 0

    out.mkdir(parents=True, exist_ok=True)
    failed = _stage([Job("info", _module("prefixmem_fast.cli", "info"))], out, 60)
    failed += _stage(_checks(), out, CHECKS)
    left = deadline - time.monotonic()
    seconds = max(left - COUNTERS - 20, 30)
    command = _module(
        "bench", "run", "--report", "--seconds", f"{seconds:.0f}", "--out", str(out / f"{_gpu_name()}.jsonl")
    )
    benchmarks = Job("benchmarks", [*command, *(["--commit", options.commit] if options.commit else [])])
    failed += _stage([benchmarks], out, left - 15)
    failed += _stage([_counters()], out, max(deadline - time.monotonic(), 15))
    print(f"failed: {', '.join(failed)}" if failed else "every job succeeded")
    return 1 if failed else 0


def _checks() -> list[Job]:
    verify = _module("prefixmem_fast.cli", "verify", "--backend", "triton")
    parity = [
        Job(f"parity, seed {seed}", [*verify, "--cases", "300", "--seed", str(seed), "--seconds", str(PARITY)])
        for seed in range(PARITY_PROCESSES)
    ]
    workers = ["-n", "6"] if _has("xdist") else []
    tests = _module("pytest", "-q", "--import-mode=importlib", *workers, str(ROOT / "tests" / "gpu"))
    sanitizer = shutil.which("compute-sanitizer")
    memcheck = [sanitizer or "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *verify]
    return [
        *parity,
        Job("tests", tests, None if _has("pytest") else f"{sys.executable} has no pytest"),
        Job(
            "sanitizer",
            [*memcheck, "--cases", "20", "--seed", "9", "--seconds", str(PARITY / 2)],
            None if sanitizer else "compute-sanitizer is not on the PATH",
        ),
    ]


def _counters() -> Job:
    profiler = shutil.which("ncu")
    run = _module("bench", "run", "training-sweep", "--set", "sids=65536", "--share", "0.01", "--no-counts")
    command = [
        profiler or "ncu",
        "--clock-control",
        "none",
        "-k",
        KERNELS,
        "-c",
        "24",
        "--section",
        "SpeedOfLight",
        "--section",
        "Occupancy",
        "--section",
        "MemoryWorkloadAnalysis",
        *run,
        "--out",
        os.devnull,
    ]
    return Job("counters", command, None if profiler else "ncu is not on the PATH")


def _stage(jobs: list[Job], out: Path, seconds: float) -> list[str]:
    """Run jobs side by side, each with a log; returns the names of those that failed or were cut off."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    started, deadline = time.monotonic(), time.monotonic() + seconds
    running: dict[str, tuple[subprocess.Popen, Path]] = {}
    failed = []
    try:
        for job in jobs:
            if job.absent:
                print(f"== {job.name}: skipped: {job.absent}", flush=True)
                continue
            log = out / "logs" / f"{job.name.replace(', ', '-').replace(' ', '-')}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("w") as file:
                process = subprocess.Popen(
                    job.command,
                    cwd=ROOT,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            running[job.name] = (process, log)
        while running:
            time.sleep(0.2)
            late = time.monotonic() > deadline
            for name, (process, log) in list(running.items()):
                if process.poll() is None and not late:
                    continue
                cut = process.poll() is None
                if cut:
                    _kill(process)
                del running[name]
                if process.returncode and "ERR_NVGPUCTRPERM" in log.read_text():
                    print(f"== {name}: skipped: the driver lets only its owner read counters", flush=True)
                    continue
                verdict = "cut off" if cut else "ok" if process.returncode == 0 else f"exit code {process.returncode}"
                print(log.read_text().strip())
                print(f"== {name}: {verdict}, {time.monotonic() - started:.0f} s, log {log}", flush=True)
                if verdict != "ok":
                    failed.append(name)
    finally:
        for process, _ in running.values():
            _kill(process)
    return failed


def _kill(process: subprocess.Popen) -> None:
    """With the processes that it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def _has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def _no_gpu() -> str | None:
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch"
    return None if torch.cuda.is_available() else "torch finds no GPU"


def _gpu_name() -> str:
    """As `machine.file_name` writes it."""
    import torch

    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
