"""The command that times the host. Counts are held in `tests/operation/test_host_work.py`."""

import itertools
import json
import os
import subprocess
import sys

import pytest

from bench import host
from bench.cli import main
from bench.rows import read_rows


def test_batches_take_turns_until_each_has_had_its_time():
    order = []
    batches = host.take_turns({name: lambda name=name: order.append(name) for name in "ab"}, 0.02, batch_seconds=0.001)
    assert min(map(len, batches.values())) >= 3
    assert all(time > 0 for times in batches.values() for time in times)
    changes = sum(before != after for before, after in itertools.pairwise(order))
    assert changes >= 2 * min(map(len, batches.values())) - 1


def test_the_interpreter_has_no_host_time(capsys):
    assert main(["host"]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_seconds_are_above_0(capsys):
    assert main(["host", "--seconds", "0"]) == 2
    assert "--seconds 0.0 is not above 0" in capsys.readouterr().err


INTERRUPTED = """
import sys
from bench import host
from bench.cli import main

def interrupted(seconds):
    name = "forward, of it the backend"
    launches = host.single_launches(dict.fromkeys((name, "step, of it the backend"), host.calls()[name]))
    [launch() for launch in launches.values()]
    raise KeyboardInterrupt

host._measure_all = interrupted
sys.exit(main(["host"]))
"""


def test_kernels_that_an_interruption_holds_are_not_unloaded():
    """By a driver that is not there."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], env=environment, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr[-2000:]
    assert "interrupted" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr[-2000:]


@pytest.mark.slow
def test_rows_of_every_call(tmp_path):
    """The kernels are compiled, which takes a minute where no cache holds them."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "host", "--json", "--seconds", "0.001", "--out", str(tmp_path / "rows")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Error" not in done.stderr, "kernels outlive the driver that loaded them"
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows == read_rows(tmp_path / "rows")
    times = {(row["workload"]["call"], row["metric"]): row["least"] for row in rows if row["unit"] == "us"}
    calls = {call for call, _ in times}
    assert {call.split(",")[0] for call in calls} == {"forward", "step", "launch of forward", "launch of step"}
    for call in calls:
        assert 0 <= times[call, "launches"] <= 2 * times[call, "call"]
