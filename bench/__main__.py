"""One step of encoder pre-training: forward, backward and update of the tables, beside the alternatives, in one run.

    python -m bench [--quick] [--out FILE]

Providers take turns, a step each, so that what else the machine does falls on all of them. One whose forward differs
from the reference is reported as wrong and gets no time; one that does not fit into memory is left out by name. The
gradient of S is given: heads and losses, which are the same for all, are not part of the step. Rows are appended to
FILE as JSON Lines with the machine and the versions.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench import providers
from bench.measure import append_rows, copy_bandwidth, now, peak_bytes, provenance, quantiles, reset_peak
from bench.providers import OURS, PEERS, CompiledReference, Provider, bytes_held, missing
from prefixmem_fast import AddressSpec, reference

LEVELS, CODES, ORDERS, HEADS, WIDTH = 5, 2048, 4, 4, 64
ACTIVE = (3, 4)
BATCHES = 4  # different batches in turn


@dataclass(frozen=True)
class Workload:
    table_rows: int = 200_000
    sids: int = 16_384
    codes: str = "uniform"
    dtype: str = "float32"

    def spec(self) -> AddressSpec:
        """Every order hashed, as in the paper, so that all providers hold the same tables."""
        return AddressSpec((CODES,) * LEVELS, ORDERS, HEADS, self.table_rows, active_levels=ACTIVE, addressing="hash")

    def batch(self, seed: int, device: str) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.codes == "uniform":
            return torch.randint(0, CODES, (self.sids, LEVELS), generator=generator).to(device)
        chance = torch.arange(1, CODES + 1, dtype=torch.float64) ** -float(self.codes.removeprefix("Zipf "))
        drawn = torch.multinomial(chance, self.sids * LEVELS, replacement=True, generator=generator)
        return drawn.view(self.sids, LEVELS).to(device)

    def weight(self, device: str) -> Tensor:
        """Random values, repeated every 64 MiB: filling the largest tables with new ones would take minutes."""
        spec = self.spec()
        dtype = getattr(torch, self.dtype)
        block = torch.randn(min(1 << 18, spec.total_rows), WIDTH, device=device).mul_(0.02).to(dtype)
        weight = torch.empty(spec.total_rows, WIDTH, device=device, dtype=dtype)
        for part in weight.split(len(block)):
            part.copy_(block[: len(part)])
        return weight

    def __str__(self) -> str:
        return f"T = {self.table_rows:,}, {self.sids:,} SIDs, {self.codes}"


def workloads(quick: bool, on_gpu: bool) -> list[Workload]:
    if quick:
        return [Workload(500, 64)]
    middle = Workload(2_000_000, 65_536, dtype="bfloat16") if on_gpu else Workload()
    change = lambda **values: Workload(**{**asdict(middle), **values})  # noqa: E731
    return [
        middle,
        change(codes="Zipf 1.05"),
        change(table_rows=20_000),
        change(table_rows=2_000_000) if not on_gpu else change(table_rows=200_000),
        change(sids=middle.sids // 16),
        change(sids=middle.sids * 4),
    ]


def bytes_needed(provider: type[Provider], workload: Workload) -> int:
    """Tables, dense gradient, optimizer state, and the copies that setting up or updating them takes for a time."""
    copies = {"EagerTables": 5, "FusedTable": 3, "CompiledReference": 5, "FusedLazyAdam": 3, "FbgemmTables": 2}
    table = workload.spec().total_rows * WIDTH * getattr(torch, workload.dtype).itemsize
    return table * copies.get(provider.__name__, 1)


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def run_workload(workload: Workload, repeats: int, device: str, compiled: bool = True) -> list[dict[str, Any]]:
    """Rows of times by provider and phase, or of the reason why there are none; `compiled` False leaves out (c)."""
    spec = workload.spec()
    batches = [workload.batch(seed, device) for seed in range(BATCHES)]
    grad = torch.randn(workload.sids, len(ACTIVE), HEADS * WIDTH, device=device, dtype=getattr(torch, workload.dtype))
    left = 0.75 * (torch.cuda.get_device_properties(0).total_memory if device == "cuda" else _memory())
    rows, made = [], []
    for provider in (*OURS, *PEERS):
        if provider is CompiledReference and not compiled:
            continue
        reason = missing(provider)
        needed = bytes_needed(provider, workload)
        if reason is None and needed > left:
            reason = (
                f"left out: it takes {needed / 2**30:.0f} GiB, and {left / 2**30:.0f} GiB are left beside the others"
            )
        if reason is None:
            left -= needed
            weight = workload.weight(device)
            codes = batches[0][:256]
            expected = reference.prefix_memory(codes, weight, spec)
            one = provider(spec, weight)
            del weight
            found = one.forward(codes).detach()
            if torch.allclose(found.float(), expected.float(), atol=1e-6, rtol=1e-2 if found.itemsize == 2 else 1e-5):
                made.append((one, {"forward": [], "backward": [], "update": [], "step": []}))
                continue
            reason = "WRONG: its forward differs from the reference; not timed"
            del one
        rows.append({"provider": provider.name, **asdict(workload), "skipped": reason})

    for turn in tqdm(range(-2, repeats), desc=str(workload), leave=False, disable=None):
        for one, times in made:
            codes = batches[turn % BATCHES]
            start = now(device)
            out = one.forward(codes)
            read = now(device)
            one.backward(out, grad)
            differentiated = now(device)
            one.update()
            end = now(device)
            del out
            if turn >= 0:
                for phase, seconds in (
                    ("forward", read - start),
                    ("backward", differentiated - read),
                    ("update", end - differentiated),
                    ("step", end - start),
                ):
                    times[phase].append(seconds)
    for one, times in made:
        for phase, seconds in times.items():
            rows.append({"provider": one.name, **asdict(workload), "phase": phase, **quantiles(seconds)})
    return rows


def run_memory(workload: Workload) -> list[dict[str, Any]]:
    """Peak resident memory of each provider in a process of its own, over what its libraries took."""
    rows = []
    for provider in (*OURS, *PEERS):
        if missing(provider) is not None or bytes_needed(provider, workload) > 0.75 * _memory():
            continue
        given = json.dumps({"provider": provider.__name__, **asdict(workload)})
        done = subprocess.run(
            [sys.executable, "-m", "bench", "--memory-of", given], capture_output=True, text=True, check=True
        )
        rows.append({**asdict(workload), **json.loads(done.stdout.splitlines()[-1])})
    return rows


def _train(provider: Provider, codes: Tensor, grad: Tensor) -> None:
    for _ in range(3):
        provider.backward(provider.forward(codes), grad)
        provider.update()


def measure_memory(given: str) -> dict[str, Any]:
    values = json.loads(given)
    provider = getattr(providers, values.pop("provider"))
    workload = Workload(**values)
    spec, batch = workload.spec(), workload.batch(0, "cpu")
    grad = torch.randn(workload.sids, len(ACTIVE), HEADS * WIDTH)
    small = Workload(500, 64)  # loads every library before memory is counted
    _train(provider(small.spec(), small.weight("cpu")), small.batch(0, "cpu"), grad[:64])
    gc.collect()
    before = reset_peak()
    one = provider(spec, workload.weight("cpu"))
    _train(one, batch, grad)
    peak = peak_bytes()
    touched = len(reference.row_gradient(grad[:, :, :HEADS], batch, spec)[0]) * WIDTH * 4
    return {
        "provider": provider.name,
        "phase": "memory",
        "peak_mib": (peak - before) / 2**20,
        "held_mib": bytes_held(one) / 2**20,
        "touched_rows_mib": touched / 2**20,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """A workload a table: milliseconds a phase, spread of the step, and how many times the first provider's step."""
    timed = [row for row in rows if "ms" in row]
    key = ("table_rows", "sids", "codes", "dtype")
    for workload in dict.fromkeys(tuple(row[k] for k in key) for row in rows if "held_mib" not in row):
        print(f"\n{Workload(*workload)}, {workload[3]}")
        print(f"{'':<54}{'forward':>9}{'backward':>10}{'update':>9}{'step ms':>10}{'p20..p80':>18}{'x ours':>8}")
        here = [row for row in timed if tuple(row[k] for k in key) == workload]
        names = list(dict.fromkeys(row["provider"] for row in here))
        phases = {(row["provider"], row["phase"]): row for row in here}
        for name in names:
            of = {phase: phases[name, phase] for phase in ("forward", "backward", "update", "step")}
            step = of["step"]
            spread = f"{step['p20']:.1f}..{step['p80']:.1f}"
            ratio = step["ms"] / phases[names[0], "step"]["ms"]
            print(
                f"{name:<54}{of['forward']['ms']:>9.1f}{of['backward']['ms']:>10.1f}{of['update']['ms']:>9.1f}"
                f"{step['ms']:>10.1f}{spread:>18}{ratio:>8.2f}"
            )
        for row in rows:
            if "skipped" in row and tuple(row[k] for k in key) == workload:
                print(f"{row['provider']:<54}{row['skipped']}")
    memory = [row for row in rows if "held_mib" in row]
    if memory:
        print(f"\npeak memory in MiB, T = {memory[0]['table_rows']:,}, {memory[0]['sids']:,} SIDs")
        print(f"{'':<54}{'peak':>9}{'tables, state':>15}{'beside':>9}{'x touched rows':>16}")
    for row in memory:
        beside = row["peak_mib"] - row["held_mib"]
        print(
            f"{row['provider']:<54}{row['peak_mib']:>9.0f}{row['held_mib']:>15.0f}{beside:>9.0f}"
            f"{beside / row['touched_rows_mib']:>16.1f}"
        )


def main() -> None:
    if sys.argv[1:2] == ["quality"]:
        from .quality.__main__ import main as quality

        sys.exit(quality(sys.argv[2:]))
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one tiny workload: whether everything runs")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps a provider (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="append JSON Lines to this file")
    parser.add_argument("--memory", action="store_true", help="peak memory alone, no times")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(measure_memory(options.memory_of)))
        return
    if options.repeats < 2:
        parser.error(f"--repeats = {options.repeats}; give 2 or more")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = {"device": device, **provenance(), "copy_bandwidth": copy_bandwidth(device)}
    print(f"{about['machine']['cpu'] if device == 'cpu' else about['machine']['gpus'][0]['name']}, "
          f"copy bandwidth {about['copy_bandwidth'] / 1e9:.1f} GB/s")  # fmt: skip
    for i, workload in enumerate(workloads(options.quick, device == "cuda") if not options.memory else ()):
        rows = run_workload(workload, options.repeats, device, compiled=i == 0)  # its seconds a step say it once
        gc.collect()
        show(rows)
        if options.out:
            append_rows(options.out, rows, about)
    if device == "cpu":
        rows = run_memory(Workload(500, 64) if options.quick else Workload())
        show(rows)
        if options.out:
            append_rows(options.out, rows, about)


if __name__ == "__main__":
    main()
