"""Bytes and launches of the kernels against their floors; the same figures on every machine.

`prefixmem verify --traffic` counts more cases; here stand those that a change is most likely to move.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from prefixmem_fast import optim, prefix_memory
from prefixmem_fast._launch import forget
from prefixmem_fast.checks import traffic
from prefixmem_fast.checks.traffic import A, H, L, N, W, counted
from prefixmem_fast.cli import main
from prefixmem_fast.kernels import atomic_backward, forward, sorted_backward

ROOT = Path(__file__).parents[2]
FLOAT = torch.float32  # without the stochastic rounding that takes half of an update's time in the interpreter


@pytest.mark.parametrize("kind", ["uniform", pytest.param("zipf 1.05", marks=pytest.mark.slow), "ended"])
def test_forward_reads_each_row_once_a_sid(kind):
    count = traffic.forward(kind)
    assert not count.excess
    orders = 2 if kind == "ended" else N
    repeated = {"uniform": 16, "zipf 1.05": 64, "ended": 16}[kind]  # rows that a program needs twice, and reads once
    assert 0 <= traffic.READ * orders * H - count.traffic.loaded["weight"] / (W * 2) <= repeated
    assert sum(count.traffic.stored.values()) == traffic.READ * A * H * W * 2


@pytest.mark.parametrize(("mode", "dtype"), [("suffix", torch.float32), ("full", torch.bfloat16)], ids=str)
def test_forward_of_the_other_modes(mode, dtype):
    assert not traffic.forward(mode=mode, dtype=dtype).excess


def test_forward_of_a_quantized_table_reads_a_row_in_64_bytes_and_its_scale():
    count = traffic.quantized("fp8")
    assert not count.excess
    for name, size in (("values", W), ("scales", 4)):
        assert 0 <= traffic.READ * N * H - count.traffic.loaded[name] / size <= 16, "rows that a program needs twice"
    assert sum(count.traffic.stored.values()) == traffic.READ * A * H * W * 2


def test_rows_and_their_limit():
    count = traffic.rows()
    assert not count.excess
    assert count.traffic.total == count.floor


@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["forward", "update"])
def test_cross_item_orders(training):
    """Rows of one order a token, every output element once, and one launch forward."""
    count = traffic.cross_item(training, items=24)
    assert not count.excess
    if not training:
        tokens = 24 * L
        without = 2 * (L - 1)  # the first item of each of two rows has none before it but for its last token
        assert count.traffic.loaded["weight"] == (tokens - without) * H * W * 2
        assert sum(count.traffic.stored.values()) == tokens * H * W * 2


@pytest.mark.parametrize("text", [pytest.param(0, marks=pytest.mark.slow), 3], ids=["SIDs only", "3 text tokens a SID"])
def test_token_stream(text):
    """Rows once a SID, every output element once, one launch, and little else."""
    count = traffic.tokens(text)
    assert not count.excess
    assert count.traffic.launches == 1
    # Once more where the end of a program's tokens falls between the active levels of a SID.
    assert 48 * N * H * W * 2 <= count.traffic.loaded["weight"] <= 1.1 * 48 * N * H * W * 2
    assert sum(count.traffic.stored.values()) == 48 * (L + text) * H * W * 2
    assert count.ratio <= 1.06


@pytest.mark.parametrize("level", [1, 3])
def test_a_window_reads_the_rows_of_its_last_token(level):
    """None of the item before, and none at a level that is not active."""
    count = traffic.decoding(level, sequences=32)
    assert count.traffic.launches == 1
    assert count.traffic.loaded["weight"] == (32 * level * H * W * 2 if level == 3 else 0)
    assert count.ratio <= 1.05


@pytest.mark.parametrize("text", [None, 3], ids=["codes", "tokens"])
def test_backward_reads_the_gradient_once_and_adds_each_row_once(text):
    sids = 32 if text is None else 16
    count = traffic.backward(text, sids)
    assert not count.excess
    assert count.traffic.launches == 1
    assert count.traffic.loaded["grad"] == sids * A * H * W * 2
    assert sum(count.traffic.added.values()) == sids * N * H * W * 4


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(lambda: traffic.dense("zipf 1.05", sids=32), id="dense"),
        pytest.param(lambda: traffic.update("zipf 1.05", optim.RowWiseAdagrad, dtype=FLOAT, sids=32), id="update"),
        pytest.param(lambda: traffic.sparse(sids=32), id="sparse", marks=pytest.mark.slow),
        pytest.param(lambda: traffic.update(text=3, dtype=FLOAT, sids=32), id="tokens", marks=pytest.mark.slow),
    ],
)
def test_sorting_backward_and_update(count):
    """All kernels together, without torch's sorts; atomics claim rows and enter them into chains, and add nothing."""
    count = count()
    assert not count.excess, count.name
    assert sum(count.traffic.added.values()) <= count.sids * N * H * 3 * 4
    itemsize = 4 if "float32" in count.name else 2
    assert count.traffic.loaded["grad"] == count.sids * A * H * W * itemsize, "dS is read once"


def test_the_gradient_of_a_sid_without_codes_is_not_read():
    """Padding: half of the batch."""
    spec, codes = traffic.spec_of(), traffic.codes_of(32)
    codes[::2] = -1
    grad = torch.randn(32, A, H * W)
    with counted(grad=grad) as count:
        traffic.backend.dense_gradient(grad, codes, spec, deterministic=True)
    assert count.loaded["grad"] == 16 * A * H * W * 4


def once_a_level(monkeypatch):
    """Without the running sum, levels 3 and 4 read 3 + 4 orders and not 4."""
    address = forward.address_of(traffic.spec_of(table_rows=3000))
    monkeypatch.setattr(forward, "address_of", lambda spec: address._replace(mode="suffix"))


def twice(monkeypatch):
    run = forward.prefix_memory_fwd

    def again(*arguments):
        run(*arguments)
        return run(*arguments)

    monkeypatch.setattr(forward, "prefix_memory_fwd", again)


@pytest.mark.parametrize("fault", [once_a_level, twice])
def test_a_forward_that_reads_too_much_is_caught(fault, monkeypatch):
    fault(monkeypatch)
    forget()  # launches of this kind that were worked out before
    try:
        assert traffic.forward().excess
    finally:
        forget()


def test_a_gradient_read_once_an_order_is_caught(monkeypatch):
    run = atomic_backward.prefix_memory_bwd
    monkeypatch.setattr(atomic_backward, "prefix_memory_bwd", lambda *inputs: run(*inputs) + run(*inputs))
    assert traffic.backward(sids=16).excess


def test_a_sort_that_marks_every_run_as_shared_is_caught(monkeypatch):
    """All rows would go through memory, as if each prefix collided with another."""
    monkeypatch.setattr(sorted_backward, "crowded", lambda most, plan, spec: True)
    sort_prefixes = sorted_backward.sort_prefixes

    def all_shared(*inputs):
        prefixes = sort_prefixes(*inputs)
        return prefixes._replace(targets=prefixes.targets.clamp(max=0))

    monkeypatch.setattr(sorted_backward, "sort_prefixes", all_shared)
    assert traffic.dense(sids=32).excess


def test_sectors_are_distinct_within_a_launch():
    spec, codes = traffic.spec_of(table_rows=3000), torch.zeros(64, L, dtype=torch.int64)
    weight = torch.randn(spec.total_rows, W).bfloat16()
    with counted(weight=weight) as count:
        prefix_memory(codes, weight, spec, backend="triton")
    rows, lines = N * H, W * 2 // traffic.SECTOR
    out = 64 * A * H * W * 2 // traffic.SECTOR
    given = 64 * L * 8 // traffic.SECTOR
    # Sectors may lie askew to rows, by one each; codes of the fifth level are not read.
    assert rows * lines + out + given / 2 <= count.sectors <= rows * (lines + 1) + out + given + 2
    assert count.loaded["weight"] == 64 // 8 * rows * W * 2  # once for each program of 8 SIDs


def test_the_command_prints_a_table_and_fails_where_a_limit_is_exceeded(monkeypatch, capsys):
    rows = traffic.rows()
    monkeypatch.setattr(traffic, "COUNTS", (lambda: rows,))
    assert main(["verify", "--traffic", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["ratio"], row["within_limit"]) == (1.0, True)
    counts = (rows, rows._replace(limit=0.8), rows._replace(most_launches=0))
    monkeypatch.setattr(traffic, "COUNTS", [lambda count=count: count for count in counts])
    assert main(["verify", "--traffic"]) == 1
    lines = capsys.readouterr().out.splitlines()[1:]
    assert all(line.startswith("rows ") for line in lines)
    assert "EXCEEDS" not in lines[0]
    assert lines[1].endswith("EXCEEDS its limit by 25.0%")
    assert lines[2].endswith("EXCEEDS its limit of 0 launches")
    assert main(["verify", "--traffic", "--json"]) == 1
    assert [json.loads(line)["within_limit"] for line in capsys.readouterr().out.splitlines()] == [True, False, False]


def test_counts_repeat():
    assert traffic.rows().as_row() == traffic.rows().as_row()


def stored():
    return [json.loads(line) for line in (ROOT / "bench" / "results" / "traffic.jsonl").read_text().splitlines()]


def test_the_stored_table_is_that_of_the_kernels():
    """A few of its lines; the slow test below takes all."""
    assert len(stored()) == len(traffic.COUNTS)
    assert all(count().as_row() in stored() for count in (traffic.forward, traffic.rows))


@pytest.mark.slow
def test_every_kernel_keeps_its_limit_and_the_stored_table_is_current():
    """From a process that does not ask for the interpreter, as a user's."""
    command = [sys.executable, "-m", "prefixmem_fast.cli", "verify", "--traffic", "--json"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [json.loads(line) for line in done.stdout.splitlines()] == stored()


def test_the_command_asks_for_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    asked = []

    def run(command, env):
        asked.append((command[2:], env["TRITON_INTERPRET"]))
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(subprocess, "run", run)
    assert main(["verify", "--traffic", "--json"]) == 1
    assert asked == [(["prefixmem_fast.cli", "verify", "--traffic", "--json"], "1")]
