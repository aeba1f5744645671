"""Where a row comes from: machine, versions, commit, date, and the state of the GPU while it worked."""

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
from prefixmem_fast.cli.info import collect

# Reasons for which a GPU runs below its clocks; to be idle, or set so by its owner, is none.
SLOWED = {
    "SwPowerCap": "its power limit",
    "HwSlowdown": "a slow-down by the hardware",
    "SwThermalSlowdown": "its temperature",
    "HwThermalSlowdown": "its temperature, by the hardware",
    "HwPowerBrakeSlowdown": "the power supply",
}


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return {**collect(), "cpu": cpu, "cores": os.cpu_count(), "memory_gib": round(memory() / 2**30, 1)}


def memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def name_of(found: dict[str, Any]) -> str:
    """A name for files: the GPU, or the CPU and its cores."""
    text = found["gpus"][0]["name"] if found["gpus"] else f"{found['cpu']} {found['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def provenance() -> dict[str, Any]:
    """What every row carries: machine, versions, threads, commit, date."""
    return {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """The library's commit, marked where files that can change a time differ from it."""
    folder = Path(prefixmem_fast.__file__).parent
    found = _git(folder, "rev-parse", "HEAD")
    root = _git(folder, "rev-parse", "--show-toplevel")
    if not found or not (Path(root) / "setup.py").is_file():  # another project's, around an installation
        return f"version {prefixmem_fast.__version__}"
    changed = _git(Path(root), "status", "--porcelain", "--", "kernels", "prefixmem_fast", "bench/*.py")
    return f"{found}-dirty" if changed else found


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


class DeviceState:
    """Clocks, temperature, power and the reasons for slower clocks, read from the driver while the GPU works.

    `problem` says why nothing can be read, else it is None.
    """

    EVERY = 0.5  # seconds between readings

    def __init__(self) -> None:
        self.problem: str | None = None
        self._last, self._readings = 0.0, []
        try:
            import pynvml
        except ImportError:
            self.problem = "nvidia-ml-py is not installed, so clocks are unknown; pip install nvidia-ml-py"
            return
        try:
            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(0).uuid)
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            self._nvml = pynvml
            self._read()
        except (pynvml.NVMLError, AttributeError, RuntimeError) as error:
            self.problem = f"clocks are unknown: {error}"

    def sample(self) -> None:
        """Read, at most every half second."""
        if self.problem is None and time.monotonic() - self._last >= self.EVERY:
            self._readings.append(self._read())
            self._last = time.monotonic()

    def take(self) -> dict[str, Any]:
        """The range of what was read since the last call, for rows; empty if nothing was."""
        readings, self._readings = self._readings, []
        if not readings:
            return {"problem": self.problem} if self.problem else {}
        found: dict[str, Any] = {}
        for name in ("sm_mhz", "memory_mhz", "celsius", "watts"):
            values = [reading[name] for reading in readings]
            found[name] = [min(values), max(values)]
        found["slowed_by"] = sorted({reason for reading in readings for reason in reading["slowed_by"]})
        return found

    def _read(self) -> dict[str, Any]:
        nvml, handle = self._nvml, self._handle
        # The names changed from throttle to event reasons; older drivers and newer ones know one of them.
        name = "nvmlDeviceGetCurrentClocks{}Reasons"
        read = getattr(nvml, name.format("Event"), None) or getattr(nvml, name.format("Throttle"))
        bits = read(handle)
        slowed = [
            reason
            for reason in SLOWED
            if bits
            & getattr(nvml, f"nvmlClocksEventReason{reason}", getattr(nvml, f"nvmlClocksThrottleReason{reason}", 0))
        ]
        return {
            "sm_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "celsius": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "watts": round(nvml.nvmlDeviceGetPowerUsage(handle) / 1e3, 1),
            "slowed_by": slowed,
        }
