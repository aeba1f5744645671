"""This machine: the record of a run, what its memory can do, and how much of it is used."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import prefixmem_fast
from prefixmem_fast.checks.environment import facts as machine_facts


def run_record(commit: str | None = None) -> dict[str, Any]:
    """What a file says once of all rows of a run; `commit` names the library where it is not a checkout's."""
    facts, now = machine_facts(), datetime.datetime.now(datetime.timezone.utc)
    commit = commit or library_commit()
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (model := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        cpu = model[1]
    machine = {"gpus": facts["gpus"], "cpu": cpu, "cores": os.cpu_count(), "memory_gib": round(_memory() / 2**30, 1)}
    return {
        "run": f"{now:%Y%m%dT%H%M%S.%f}"[:19] + f"-{commit.removeprefix('version ')[:7]}",
        "machine": {**machine, "threads": torch.get_num_threads()},
        "versions": facts["versions"],
        "commit": commit,
        "date": now.isoformat(timespec="seconds"),
    }


def file_name(record: dict[str, Any]) -> str:
    """The machine as a name for files: the GPU, or the CPU and its cores."""
    machine = record["machine"]
    text = machine["gpus"][0]["name"] if machine["gpus"] else f"{machine['cpu']} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def library_commit() -> str:
    """The library's commit, marked where files that can change a time differ from it."""
    folder = Path(prefixmem_fast.__file__).parent
    head, root = _git(folder, "rev-parse", "HEAD"), _git(folder, "rev-parse", "--show-toplevel")
    if not head or not (Path(root) / "setup.py").is_file():  # another project's, around an installation
        return f"version {prefixmem_fast.__version__}"
    changed = _git(Path(root), "status", "--porcelain", "--", "kernels", "prefixmem_fast", "bench/*.py")
    return f"{head}-dirty" if changed else head


def _git(folder: Path, *arguments: str) -> str:
    try:
        return subprocess.check_output(["git", *arguments], cwd=folder, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def copy_bandwidth(device: str) -> float:
    """Bytes read and written a second by a plain copy: the most of 20, whatever else the machine did."""
    source = torch.randn((1 << 30 if device == "cuda" else 1 << 26) // 4, device=device)
    target = torch.empty_like(source)
    in_a_row = 10 if device == "cuda" else 1  # launches hide behind the copies before them
    seconds = []
    for _ in range(20 // in_a_row + 1):  # the first one warms up
        began = time.perf_counter()
        for _ in range(in_a_row):
            target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - began) / in_a_row)
    return 2 * source.numel() * 4 / min(seconds[1:])


def free_bytes(device: str) -> int:
    """Memory that another contender may take."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - (1 << 30)
    facts = Path("/proc/meminfo")
    return _kib(facts, "MemAvailable") * 1024 - (2 << 30) if facts.exists() else _memory() // 2


def reset_peak() -> int:
    """Resident bytes of this process now, from where the peak counts. Linux alone counts it."""
    Path("/proc/self/clear_refs").write_text("5")
    return _kib(Path("/proc/self/status"), "VmRSS") * 1024


def peak_bytes() -> int:
    """Most resident bytes since `reset_peak`."""
    return _kib(Path("/proc/self/status"), "VmHWM") * 1024


def _kib(file: Path, field: str) -> int:
    return int(re.search(rf"^{field}:\s*(\d+)", file.read_text(), re.MULTILINE)[1])


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
