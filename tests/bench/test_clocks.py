"""Device times and the state of a GPU, with a device that is only said to be there."""

import sys
import types

import torch

from bench import clocks
from tests.bench.cases import SMALL_CACHE


class FakeEvent:
    """A device whose time is the number of events so far, in milliseconds."""

    count = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        FakeEvent.count += 1
        self.at = FakeEvent.count

    def elapsed_time(self, other):
        return other.at - self.at


def device_clock(monkeypatch):
    monkeypatch.setattr(clocks.DeviceClock, "device", "cpu")
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with SMALL_CACHE:
        return clocks.DeviceClock()


def test_the_state_of_a_gpu_is_read(monkeypatch):
    reads = iter([(1980, 0), (1500, 0x4 | 0x1), (1980, 0)])

    def clock(handle, kind):
        return current[0] if kind == "sm" else 3201

    current = [0]

    def reasons(handle):
        current[0], bits = next(reads)
        return bits

    fake = types.SimpleNamespace(
        NVMLError=OSError,
        NVML_CLOCK_SM="sm",
        NVML_CLOCK_MEM="memory",
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetCurrentClocksEventReasons=reasons,
        nvmlDeviceGetClockInfo=clock,
        nvmlDeviceGetTemperature=lambda *_: 50,
        nvmlDeviceGetPowerUsage=lambda _: 612_345,
        nvmlClocksEventReasonSwPowerCap=0x4,
        nvmlClocksEventReasonHwSlowdown=0x8,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: types.SimpleNamespace(uuid="7"))
    monkeypatch.setattr(clocks, "BETWEEN_READINGS", 0.0)
    clock = device_clock(monkeypatch)
    clock.time(lambda mark: mark("step"))
    clock.time(lambda mark: mark("step"))
    expected = {"sm_mhz": [1500, 1980], "memory_mhz": [3201, 3201], "celsius": [50, 50], "watts": [612.3, 612.3]}
    assert clock.state() == {**expected, "slowed_by": ["SwPowerCap"]}
    assert clock.state() == {}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py" in device_clock(monkeypatch).state()["problem"]


def test_device_times_are_those_between_events(monkeypatch):
    clock = device_clock(monkeypatch)

    def step(mark):
        mark("forward")
        torch.cuda.Event(enable_timing=True).record()  # a phase of two milliseconds
        mark("backward")

    times = clock.time(step, key="a")
    assert (times["forward"], times["backward"]) == (1e-3, 2e-3)
    assert times["host"] > 0
    assert clock._lead == {"a": times["host"]}
