"""Clocks, memory, and what is known of the machine."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from prefixmem_fast.cli.info import collect


def now(device: str) -> float:
    """Seconds; on a GPU, once all that was launched has ended."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median, 20 % and 80 % quantile in milliseconds."""
    low, *_, high = statistics.quantiles(seconds, n=5)
    return {"ms": statistics.median(seconds) * 1e3, "p20": low * 1e3, "p80": high * 1e3}


def copy_bandwidth(device: str) -> float:
    """Bytes read and written a second by a plain copy."""
    source = torch.randn((1 << 30 if device == "cuda" else 1 << 26) // 4, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        start = now(device)
        target.copy_(source)
        times.append(now(device) - start)
    return 2 * source.numel() * 4 / statistics.median(times)


def reset_peak() -> int:
    """Resident bytes of this process now, from where the peak counts."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def peak_bytes() -> int:
    """Most resident bytes since `reset_peak`."""
    return _resident("VmHWM")


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {**collect(), "cpu": cpu, "cores": os.cpu_count(), "memory_gib": round(memory / 2**30, 1)}


def provenance() -> dict[str, Any]:
    """What every row carries: machine, versions, commit, date."""
    return {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def append_rows(out: Path, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Append rows, each with `about`, to a file of JSON Lines."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        file.writelines(json.dumps({**row, **about}) + "\n" for row in rows)


def _commit() -> str:
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"
