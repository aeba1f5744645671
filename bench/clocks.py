"""Clocks for the phases of a step, on a CPU and on a GPU, and the state of the GPU while it worked."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Hashable
from typing import Any

import torch

from .registry import Mark
from .rows import SLOWED

COLD_BYTES = {"cpu": 1 << 26, "cuda": 1 << 28}  # written before each step: more than the caches hold
BETWEEN_READINGS = 0.5  # seconds, of the driver
LONGEST_LEAD = 0.02  # seconds of such writes that may give the host a head start


class HostClock:
    """Times steps on a CPU. Each begins with caches that hold none of its data."""

    device = "cpu"

    def __init__(self) -> None:
        self._cold = torch.zeros(COLD_BYTES["cpu"] // 4)

    def time(self, step: Callable[[Mark], None], key: Hashable = 0) -> dict[str, float]:
        """Seconds of each phase that the step marks; `key` is for the other clock."""
        self._cold.add_(1)
        seconds: dict[str, float] = {}
        last = time.perf_counter()

        def mark(phase: str) -> None:
            nonlocal last
            now = time.perf_counter()
            seconds[phase] = now - last
            last = now

        step(mark)
        return seconds

    def state(self) -> dict[str, Any]:
        """Nothing: a CPU's clocks are not read."""
        return {}


class DeviceClock:
    """Times steps on a GPU by events, from a cold L2 cache.

    The writes that empty the cache are as many as the host took to launch the step the last time, so that the device
    does not wait for launches between the events. A step that waits for the device itself is timed with its waits.
    """

    device = "cuda"

    def __init__(self) -> None:
        self._cold = torch.zeros(COLD_BYTES["cuda"] // 4, device=self.device)
        self._lead: dict[Hashable, float] = {}
        self._readings: list[dict[str, Any]] = []
        self._last_reading, self._problem = 0.0, ""
        try:
            self._read = driver_reader()
        except Exception as error:  # no nvidia-ml-py, an old driver, a container that hides it
            self._problem = f"clocks are unknown, nvidia-ml-py says: {error}"
        first = self._event()
        for _ in range(10):
            self._cold.zero_()
        last = self._event()
        torch.cuda.synchronize()
        self._write = max(first.elapsed_time(last) / 1e4, 1e-6)  # seconds

    def time(self, step: Callable[[Mark], None], key: Hashable = 0) -> dict[str, float]:
        """Seconds of each phase on the device, and under "host" those of launching them; `key` tells steps apart."""
        for _ in range(1 + int(min(1.5 * self._lead.get(key, 0.0), LONGEST_LEAD) / self._write)):
            self._cold.zero_()
        events = [("", self._event())]
        began = time.perf_counter()
        step(lambda phase: events.append((phase, self._event())))
        self._lead[key] = host = time.perf_counter() - began
        if not self._problem and began - self._last_reading >= BETWEEN_READINGS:  # while the device works
            self._readings.append(self._read())
            self._last_reading = began
        torch.cuda.synchronize()
        pairs = itertools.pairwise(events)
        return {phase: before.elapsed_time(event) / 1e3 for (_, before), (phase, event) in pairs} | {"host": host}

    def state(self) -> dict[str, Any]:
        """The range of each of the driver's readings since the last call."""
        if self._problem:
            return {"problem": self._problem}
        readings, self._readings = self._readings, []
        slowed_by = sorted({why for reading in readings for why in reading.pop("slowed_by")})
        columns = {name: [reading[name] for reading in readings] for name in (readings[0] if readings else ())}
        ranges = {name: [min(values), max(values)] for name, values in columns.items()}
        return {**ranges, "slowed_by": slowed_by} if readings else {}

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def driver_reader() -> Callable[[], dict[str, Any]]:
    """Reads clocks, temperature, power and the reasons for slower clocks of the GPU; fails where that is impossible."""
    import pynvml as nvml  # of the package nvidia-ml-py

    nvml.nvmlInit()
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    gpu = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")

    def read() -> dict[str, Any]:
        bits = nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu)
        return {
            "sm_mhz": nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
            "memory_mhz": nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
            "celsius": nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
            "watts": round(nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3, 1),
            "slowed_by": [why for why in SLOWED if bits & getattr(nvml, f"nvmlClocksEventReason{why}", 0)],
        }

    read()
    return read


Clock = HostClock | DeviceClock
