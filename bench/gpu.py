"""The whole GPU suite in one call, in under nine minutes: parity of the paper's shape, benchmarks, then the rest.

    python bench/gpu.py [--out FOLDER] [--seconds 530]

Runs in a checkout without installing anything and without a network, with the torch and triton that are there.

    info        versions, GPU, backends
    prepare     side by side: parity of the paper's shape, the static report with its predictions, and this package's
                kernels compiled for the benchmarks
    tables      forward and a step of the tables, by all who take part, with memory
    sweeps      sizes of batches and tables, other codes, token streams, decoding
    models      a step of a language model, the dense gradient, pre-training, constrained beams
    predicted   times beside those of the static report
    counters    ncu's reading of the main kernels, if it is there
    checks      side by side: parity of fixed shapes over many batches and of random configurations, the tests of
                tests/gpu, and compute-sanitizer over a few configurations, if it is there

Each part ends at a share of the time, and what fails or is cut off ends no other. Rows are written as they come, to
<GPU>.jsonl; gpu.log begins with the verdicts, failures first, and holds what every process printed. Without a GPU every
part is skipped and says so.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ("paper", "float32", "suffix", "full", "wide", "odd", "cross-item", "float64")  # as prefixmem_fast._choices
RANDOM = 3  # processes of parity over random configurations, each with a seed of its own
TEST_WORKERS = 6
GRACE = 12  # seconds in which a process that was told to stop comes to its end
LONGEST_LOG = 40_000  # characters that gpu.log holds of a process; a longer log stays a file of its own
KERNELS = "prefix_memory_fwd|token_memory_fwd|pack_codes|prefixes|mark_claims|sum_prefixes|sum_edges|merge_rows"
SECTIONS = ("SpeedOfLight", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats")
COUNTED = r"(\d+) of \d+ (shapes|cases), (\d+) batches, (\d+) comparisons, (\d+) mismatches"


@dataclass
class Job:
    """One process; `absent` says why it does not run."""

    name: str
    command: list[str]
    absent: str | None = None


@dataclass
class Suite:
    """Where results go, and what has been found so far."""

    out: Path
    rows: Path
    commit: list[str]  # options that name the revision
    found: list[tuple[str, str, str]] = field(default_factory=list)  # name, verdict and log of each process that ended

    @property
    def failed(self) -> list[str]:
        return [name for name, verdict, _ in self.found if verdict not in ("ok", "skipped")]

    def add(self, name: str, verdict: str, text: str) -> None:
        """Note how a process ended, and write gpu.log anew."""
        self.found.append((name, verdict, text))
        order = sorted(self.found, key=lambda entry: entry[1] in ("ok", "skipped"))
        lines = [f"{verdict:<16}{name}" for name, verdict, _ in order]
        lines += [f"\n===== {name}: {verdict}\n{text}" for name, verdict, text in self.found]
        (self.out / "gpu.log").write_text("\n".join(lines) + "\n")

    def parity(self) -> str:
        """What all processes of parity checked together."""
        found = [match.groups() for _, _, text in self.found for match in re.finditer(COUNTED, text)]
        specs, batches, comparisons, mismatches = (sum(int(row[i]) for row in found) for i in (0, 2, 3, 4))
        return f"parity: {specs} specs, {batches} batches, {comparisons} comparisons, {mismatches} mismatches"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="folder for rows and the log")
    parser.add_argument("--seconds", type=float, default=530, help="for everything (default: %(default)s)")
    parser.add_argument("--commit", help="name of the revision, where the tree is a copy without git")
    options = parser.parse_args()
    wrong = _wrong(options)
    if wrong:
        print(f"bench/gpu.py: {wrong}", file=sys.stderr)
        return 2
    try:
        return _all_parts(options)
    except KeyboardInterrupt:
        print(f"bench/gpu.py: interrupted; what there is so far is in {options.out}", file=sys.stderr)
        return 130


def _wrong(options: argparse.Namespace) -> str | None:
    """What is wrong with the arguments, and what to give."""
    if not 0 < options.seconds < float("inf"):
        return f"--seconds {options.seconds} is not a number above 0; give one, such as 530"
    give = "give a folder that you may write, or one that is to be made"
    try:
        out = options.out.resolve()
        folder = next(folder for folder in (out, *out.parents) if folder.exists())
        if not folder.is_dir():
            return f"--out {options.out}: {folder} is no folder; {give}"
        with tempfile.TemporaryFile(dir=folder):
            return None
    except (OSError, ValueError, RuntimeError) as error:  # a name that is too long, links in a circle
        return f"--out {str(options.out)[:200]} cannot be written ({getattr(error, 'strerror', error)}); {give}"


def _all_parts(options: argparse.Namespace) -> int:
    reason = _no_gpu()
    if reason:
        for name in PARTS:
            print(f"{name:<16}skipped: {reason}")
        return 0

    began, out = time.monotonic(), options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    commit = ["--commit", options.commit] if options.commit else []
    suite = Suite(out, out / f"{_gpu_name()}.jsonl", commit)
    for jobs_of, share in PARTS.values():
        left = began + share * options.seconds - time.monotonic()
        for jobs in jobs_of(suite, max(left - GRACE, 1)):
            _run(jobs, suite, max(began + share * options.seconds - time.monotonic(), 1))
    with contextlib.suppress(OSError):
        (out / "logs").rmdir()  # nothing is in it where every log is in gpu.log
    print(f"results are in {out}")
    print(suite.parity())
    print(f"failed: {', '.join(suite.failed)}" if suite.failed else "every job succeeded")
    return 1 if suite.failed else 0


Stages = list[list[Job]]  # one after another; the jobs of each side by side


def _info(suite: Suite, seconds: float) -> Stages:
    return [[Job("info", _prefixmem("info"))]]


def _prepare(suite: Suite, seconds: float) -> Stages:
    """The compiler's work on all cores, so that the measured parts need not wait for it."""
    static = ["--targets", "sm_90", "--dtypes", "bfloat16", "--save", str(suite.out)]
    static += ["--launchers", "prefix_memory_fwd,token_memory_fwd,row_adagrad_bwd"]
    return [
        [
            Job("parity, paper", _parity("--shapes", "paper", "--batches", "6", "--seconds", f"{seconds / 2:.0f}")),
            Job("static", _prefixmem("verify", "--compile", *static)),
            *(_warm(name, "sids=65536") for name in ("forward", "training-sweep", "tokens")),
            _warm("decoding", "sequences=64"),
        ]
    ]


def _warm(name: str, workload: str) -> Job:
    return Job(f"compile {name}", _bench(name, "--ours", "--set", workload, "--share", "0.001", "--no-counts"))


def _tables(suite: Suite, seconds: float) -> Stages:
    return [[_measuring("tables", suite, seconds, "forward", "training")]]


def _sweeps(suite: Suite, seconds: float) -> Stages:
    return [[_measuring("sweeps", suite, seconds, "forward-sweep", "training-sweep", "tokens", "decoding")]]


def _models(suite: Suite, seconds: float) -> Stages:
    return [[_measuring("models", suite, seconds, "language-model", "gradient", "pretraining", "constrained")]]


def _measuring(job: str, suite: Suite, seconds: float, *names: str) -> Job:
    return Job(job, _bench(*names, "--seconds", f"{seconds:.0f}", *suite.commit, out=str(suite.rows)))


def _predicted(suite: Suite, seconds: float) -> Stages:
    reports = sorted(suite.out.glob("compile_triton_*.json"), key=lambda path: path.stat().st_mtime)
    report = str(reports[-1]) if reports else "none"
    command = _module("bench", "predicted", report, "--out", str(suite.rows), *suite.commit)
    return [[Job("predicted", command, None if reports else "there is no static report")]]


def _counters(suite: Suite, seconds: float) -> Stages:
    """One after another, as ncu takes the counters for itself."""
    profiler = shutil.which("ncu")
    sections = [word for section in SECTIONS for word in ("--section", section)]
    options = ["--clock-control", "none", "--kill", "yes", *sections, "-k", f"regex:{KERNELS}"]
    reason = None if profiler else "ncu is not on the PATH"
    return [
        [
            Job(
                f"counters, {name}",
                [profiler or "ncu", *options, "-c", str(launches), *_warm(name, "sids=65536").command],
                reason,
            )
        ]
        for name, launches in (("training-sweep", 12), ("tokens", 2))
    ]


def _checks(suite: Suite, seconds: float) -> Stages:
    """Most of their time is compilation, so there is a process for each core of sixteen."""
    until = ["--seconds", f"{seconds:.0f}"]
    workers = ["-n", str(TEST_WORKERS)] if _has("xdist") else []
    tests = _module("pytest", "-v", "--import-mode=importlib", *workers, str(ROOT / "tests" / "gpu"))
    sanitizer = shutil.which("compute-sanitizer")
    return [
        [
            *(Job(f"parity, {name}, all batches", _parity("--shapes", name, "--seed", "1", *until)) for name in SHAPES),
            *(
                Job(
                    f"parity, random {seed}",
                    _parity("--cases", "300", "--batches", "4", "--seed", str(seed), *until),
                )
                for seed in range(RANDOM)
            ),
            Job("tests", tests, None if _has("pytest") else f"{sys.executable} has no pytest"),
            *(
                Job(
                    tool,
                    [
                        "env",
                        "PYTORCH_NO_CUDA_MEMORY_CACHING=1",  # so that each tensor ends where it ends
                        *(sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9"),
                        *_parity("--cases", "4", "--seed", "9", "--seconds", f"{seconds / 2:.0f}"),
                    ],
                    None if sanitizer else "compute-sanitizer is not on the PATH",
                )
                for tool in ("memcheck", "racecheck")
            ),
        ]
    ]


# What each part runs, and the share of all seconds at which it ends; one that ends early leaves its time to the next.
PARTS: dict[str, tuple[Callable[[Suite, float], Stages], float]] = {
    "info": (_info, 0.05),
    "prepare": (_prepare, 0.17),
    "tables": (_tables, 0.33),
    "sweeps": (_sweeps, 0.52),
    "models": (_models, 0.63),
    "predicted": (_predicted, 0.69),
    "counters": (_counters, 0.78),
    "checks": (_checks, 0.98),
}


def _run(jobs: list[Job], suite: Suite, seconds: float) -> None:
    """Run jobs side by side, each with a log, and cut off what is left after so many seconds."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {"OMP_NUM_THREADS": "2", **os.environ, "TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    started, deadline = time.monotonic(), time.monotonic() + seconds
    running: dict[str, tuple[subprocess.Popen, Path]] = {}
    try:
        for job in jobs:
            if job.absent:
                print(f"== {job.name}: skipped: {job.absent}", flush=True)
                suite.add(job.name, "skipped", job.absent)
                continue
            log = suite.out / "logs" / f"{job.name.replace(', ', '-').replace(' ', '-')}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            streams = {"stderr": subprocess.STDOUT, "start_new_session": True}
            try:
                with log.open("w") as file:
                    process = subprocess.Popen(job.command, cwd=ROOT, env=environment, stdout=file, **streams)
            except OSError as error:
                print(f"== {job.name}: {error}", flush=True)
                suite.add(job.name, "not started", str(error))
                continue
            running[job.name] = (process, log)
        while running:
            time.sleep(0.2)
            late = time.monotonic() > deadline
            for name, (process, log) in list(running.items()):
                cut = process.poll() is None
                if cut and not late:
                    continue
                if cut:
                    _kill(process)
                del running[name]
                _ended(name, process.returncode, "cut off" if cut else None, log, time.monotonic() - started, suite)
    except BaseException:  # such as Ctrl-C: what they wrote until then is kept
        for process, _ in running.values():
            _kill(process)
        for name, (process, log) in running.items():
            _ended(name, process.returncode, "interrupted", log, time.monotonic() - started, suite)
        raise


def _ended(name: str, code: int, verdict: str | None, log: Path, seconds: float, suite: Suite) -> None:
    """Print and keep what a process wrote; the verdict is that of its exit code where none is given."""
    text = log.read_text(errors="replace")
    verdict = verdict or ("ok" if code == 0 else f"exit code {code}")
    if code and "ERR_NVGPUCTRPERM" in text:
        verdict, text = "skipped", f"{text}the driver lets only its owner read counters"
    if len(text) > LONGEST_LOG:
        text = f"{text[: LONGEST_LOG // 4]}\n[...] {log.name}\n{text[-3 * LONGEST_LOG // 4 :]}"
    else:
        log.unlink()
    suite.add(name, verdict, text)
    print("\n".join(text.strip().splitlines()[-12:]))
    print(f"== {name}: {verdict}, {seconds:.0f} s", flush=True)


def _kill(process: subprocess.Popen) -> None:
    """With the processes that it started."""
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def _prefixmem(*arguments: str) -> list[str]:
    return _module("prefixmem_fast.cli", *arguments)


def _parity(*arguments: str) -> list[str]:
    return _prefixmem("verify", "--backend", "triton", *arguments)


def _bench(*arguments: str, out: str = os.devnull) -> list[str]:
    return _module("bench", "run", *arguments, "--out", out)


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
