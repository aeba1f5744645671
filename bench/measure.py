"""Clocks, quantiles, the ceilings of a machine, and the most memory that something took."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Hashable
from pathlib import Path

import torch

Mark = Callable[[str], None]  # ends a phase of a step: the time since the phase before is its own

COLD_BYTES = {"cpu": 1 << 26, "cuda": 1 << 28}  # written before each step: more than the caches hold
LONGEST_LEAD = 0.02  # seconds of such writes that may give the host a head start


def unmarked(phase: str) -> None:
    """The `Mark` of a step that nobody times."""


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


class DeviceClock:
    """Times steps on a GPU by events, from a cold L2 cache.

    The writes that empty the cache are as many as the host took to launch the step the last time, so that the device
    does not wait for launches between the events. A step that waits for the device itself is timed with its waits.
    """

    device = "cuda"

    def __init__(self, sample: Callable[[], None] = lambda: None) -> None:
        self._cold = torch.zeros(COLD_BYTES["cuda"] // 4, device=self.device)
        self._sample = sample  # reads the state of the device while it works
        self._lead: dict[Hashable, float] = {}
        self._one_write = self._seconds_of_a_write()

    def time(self, step: Callable[[Mark], None], key: Hashable = 0) -> dict[str, float]:
        """Seconds of each phase on the device, and under "host" those of launching them; `key` tells steps apart."""
        writes = 1 + int(min(1.5 * self._lead.get(key, 0.0), LONGEST_LEAD) / self._one_write)
        for _ in range(writes):
            self._cold.zero_()
        events = [("", self._event())]
        began = time.perf_counter()
        step(lambda phase: events.append((phase, self._event())))
        host = time.perf_counter() - began
        self._lead[key] = host
        self._sample()
        torch.cuda.synchronize()
        seconds = {
            phase: before.elapsed_time(event) / 1e3 for (_, before), (phase, event) in itertools.pairwise(events)
        }
        return {**seconds, "host": host}

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds_of_a_write(self) -> float:
        self._cold.zero_()
        first = self._event()
        for _ in range(10):
            self._cold.zero_()
        last = self._event()
        torch.cuda.synchronize()
        return max(first.elapsed_time(last) / 1e4, 1e-6)


Clock = HostClock | DeviceClock


def quantiles(values: list[float]) -> dict[str, float]:
    """Median, 20 % and 80 % quantile, within the range of the values."""
    if len(values) == 1:
        return dict.fromkeys(("p50", "p20", "p80"), values[0])
    low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    return {"p50": statistics.median(values), "p20": low, "p80": high}


def copy_bandwidth(device: str) -> float:
    """Bytes read and written a second by a plain copy."""
    source = torch.randn((1 << 30 if device == "cuda" else 1 << 26) // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _least_seconds(device, lambda: target.copy_(source))


def matrix_rate(device: str) -> float:
    """Operations a second of a large matrix product of random values: bfloat16 on a GPU, float32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / _least_seconds(device, lambda: torch.mm(left, right, out=out))


def _least_seconds(device: str, work: Callable[[], object]) -> float:
    """The least of 20: a ceiling, whatever else the machine did; on a GPU of ten in a row, so that launches hide."""
    in_a_row = 10 if device == "cuda" else 1
    seconds = []
    for _ in range(20 // in_a_row + 1):  # the first one warms up
        began = now(device)
        for _ in range(in_a_row):
            work()
        seconds.append((now(device) - began) / in_a_row)
    return min(seconds[1:])


def now(device: str) -> float:
    """Seconds; on a GPU, once all that was launched has ended."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak() -> int:
    """Resident bytes of this process now, from where the peak counts. Linux alone counts it."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def peak_bytes() -> int:
    """Most resident bytes since `reset_peak`."""
    return _resident("VmHWM")


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024
