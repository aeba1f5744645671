"""Forward and backward of the operation beside eager PyTorch, in one run.

    python -m bench [--sids N] [--out FILE]

A provider whose result differs from the reference is reported as wrong and gets no time. Rows are appended to FILE as
JSON Lines with the machine and the versions.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prefixmem_fast import AddressSpec, prefix_memory, prefix_rows
from prefixmem_fast.cli.info import collect


def eager_tables(spec: AddressSpec, weight: Tensor) -> tuple[Callable[[Tensor], Tensor], list[nn.Parameter]]:
    """What a user writes first: one nn.Embedding a table, hashes in PyTorch, a sum over orders a level."""
    tables = {}
    for order in range(1, spec.max_order + 1):
        for head in range(spec.heads):
            start = spec.offsets[order - 1][head]
            rows = weight[start : start + spec.rows_per_order[order - 1]].detach().clone()
            tables[order, head] = nn.Embedding.from_pretrained(rows, freeze=False)

    def forward(codes: Tensor) -> Tensor:
        out = []
        for level in spec.active_levels:
            total = 0
            for order in spec.orders_at(level):
                heads = []
                for head in range(spec.heads):
                    index = codes[:, 0] * spec.multipliers[0][head]
                    for i in range(1, order):
                        index = index ^ (codes[:, i] * spec.multipliers[i][head])
                    heads.append(tables[order, head](index % spec.rows_per_order[order - 1]))
                total = total + torch.cat(heads, dim=-1)
            out.append(total)
        return torch.stack(out, dim=1)

    return forward, [table.weight for table in tables.values()]


def providers(spec: AddressSpec, width: int, dtype: torch.dtype, device: str) -> list[tuple]:
    weight = nn.Parameter(torch.randn(spec.total_rows, width, device=device, dtype=dtype) * 0.02)
    eager, eager_parameters = eager_tables(spec, weight)
    ours = "triton" if device == "cuda" else "reference"
    return [
        (f"prefixmem_fast ({ours})", lambda codes: prefix_memory(codes, weight, spec), [weight]),
        (
            f"prefixmem_fast ({ours}, deterministic)",
            lambda codes: prefix_memory(codes, weight, spec, deterministic=True),
            [weight],
        ),
        ("eager PyTorch, one nn.Embedding a table", eager, eager_parameters),
    ]


def git_commit() -> str:
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return "unknown"


def training_step(forward: Callable[[Tensor], Tensor], codes: Tensor, parameters: list, grad: Tensor) -> None:
    for parameter in parameters:
        parameter.grad = None
    forward(codes).backward(grad)


def timed(call: Callable[[], object], device: str, repeats: int) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile in milliseconds; device events on a GPU, a host clock on a CPU."""
    call()
    found = []
    for _ in range(repeats):
        if device == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end))
        else:
            started = time.perf_counter()
            call()
            found.append((time.perf_counter() - started) * 1e3)
    low, *_, high = statistics.quantiles(found, n=5)
    return statistics.median(found), low, high


def copy_bandwidth(device: str) -> float:
    """Bytes read and written a second by a plain copy, the denominator of the forward's floor."""
    source = torch.randn((1 << 30 if device == "cuda" else 1 << 26) // 4, device=device)
    target = torch.empty_like(source)
    median, _, _ = timed(lambda: target.copy_(source), device, 10)
    return 2 * source.numel() * 4 / (median * 1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--sids", type=int, nargs="+", help="batch sizes (default: 1024 16384, on a GPU 65536 1048576)")
    parser.add_argument("--table-rows", type=int, help="T (default: 200000, on a GPU 2000000)")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="append JSON Lines to this file")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = options.sids or ([65_536, 1_048_576] if device == "cuda" else [1024, 16_384])
    spec = AddressSpec(
        (2048,) * 5,
        table_rows=options.table_rows or (2_000_000 if device == "cuda" else 200_000),
        active_levels=(3, 4),
        addressing="hash",
    )
    width, dtype = 64, torch.bfloat16 if device == "cuda" else torch.float32
    machine = {**collect(), "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    commit = git_commit()
    bandwidth = copy_bandwidth(device)
    print(f"{device}, T = {spec.table_rows[0]}, {dtype}, copy bandwidth {bandwidth / 1e9:.1f} GB/s")

    rows = []
    named = providers(spec, width, dtype, device)
    for sids in sizes:
        codes = torch.randint(0, 2048, (sids, 5), device=device)
        expected = prefix_memory(codes[:256], named[0][2][0], spec, backend="reference")
        floor = _forward_bytes(codes, spec, width, dtype)
        for name, forward, parameters in tqdm(named, desc=f"{sids} SIDs", leave=False, disable=None):
            if not torch.allclose(forward(codes[:256]).float(), expected.float(), atol=1e-2, rtol=1e-2):
                print(f"{name}: WRONG result, not timed")
                continue
            grad = torch.randn_like(forward(codes))
            if "deterministic" not in name:  # a mode of the backward alone
                with torch.no_grad():
                    times = timed(partial(forward, codes), device, options.repeats)
                rows.append(_row("forward", name, sids, times, floor, bandwidth, machine, commit))
            step = partial(training_step, forward, codes, parameters, grad)
            times = timed(step, device, max(options.repeats // 3, 3))
            rows.append(_row("forward + dense backward", name, sids, times, None, bandwidth, machine, commit))
    print(f"{'':<26}{'provider':<42}{'SIDs':>9}{'ms':>10}{'p20':>9}{'p80':>9}{'of copy':>9}")
    for row in rows:
        share = f"{row['of_copy']:>8.1%}" if row["of_copy"] else ""
        print(
            f"{row['workload']:<26}{row['provider']:<42}{row['sids']:>9}{row['ms']:>10.3f}{row['p20']:>9.3f}"
            f"{row['p80']:>9.3f} {share}"
        )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def _forward_bytes(codes: Tensor, spec: AddressSpec, width: int, dtype: torch.dtype) -> int:
    """The forward's floor: codes in, each distinct row once, S out."""
    rows = prefix_rows(codes, spec)[:, spec.active_levels[-1] - 1]
    size = dtype.itemsize
    out = codes.shape[0] * len(spec.active_levels) * spec.heads * width * size
    return codes.numel() * codes.element_size() + rows.unique().numel() * width * size + out


def _row(workload, provider, sids, times, floor, bandwidth, machine, commit) -> dict:
    return {
        "workload": workload,
        "provider": provider,
        "sids": sids,
        "ms": times[0],
        "p20": times[1],
        "p80": times[2],
        "floor_bytes": floor,
        "of_copy": floor / (times[0] * 1e-3) / bandwidth if floor else None,
        "copy_bandwidth": bandwidth,
        "machine": machine,
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    main()
