"""Bytes and launches of the kernels against their floors; the same figures on every machine.

`python -m bench traffic` counts more cases; here stand those that a change is most likely to move.
"""

import json

import numpy as np
import pytest
import torch

from bench.cli import main
from prefixmem_fast import optim, prefix_memory
from prefixmem_fast.checks import traffic
from prefixmem_fast.checks.traffic import A, H, L, N, W, counted
from prefixmem_fast.kernels import atomic_backward as backward
from prefixmem_fast.kernels import forward
from prefixmem_fast.kernels import sorted_backward as row_gradient


@pytest.mark.parametrize("kind", ["uniform", "zipf 1.05", "ended"])
def test_forward_reads_each_row_once_a_sid(kind):
    count = traffic.forward(kind)
    assert count.passed
    orders = 2 if kind == "ended" else N
    assert count.traffic.loaded["weight"] == traffic.READ * orders * H * W * 2
    assert sum(count.traffic.stored.values()) == traffic.READ * A * H * W * 2


@pytest.mark.parametrize(("mode", "dtype"), [("suffix", torch.float32), ("full", torch.bfloat16)], ids=str)
def test_forward_of_the_other_modes(mode, dtype):
    assert traffic.forward(mode=mode, dtype=dtype).passed


def test_rows_and_their_limit():
    count = traffic.rows()
    assert count.passed
    assert count.traffic.total == count.floor


@pytest.mark.parametrize("text", [0, 3], ids=["SIDs only", "3 text tokens a SID"])
def test_token_stream(text):
    """Rows once a SID, every output element once, one launch, and little else."""
    count = traffic.tokens(text)
    assert count.passed
    assert count.traffic.launches == 1
    assert count.traffic.loaded["weight"] == 48 * N * H * W * 2
    assert sum(count.traffic.stored.values()) == 48 * (L + text) * H * W * 2
    assert count.ratio <= 1.05


@pytest.mark.parametrize("level", [1, 3])
def test_a_decoding_step_reads_the_rows_of_one_order(level):
    count = traffic.decoding(level)
    assert count.traffic.launches == 1
    assert count.traffic.loaded["weight"] == traffic.READ * H * W * 2
    assert count.ratio <= 1.05


@pytest.mark.parametrize("text", [None, 3], ids=["codes", "tokens"])
def test_backward_reads_the_gradient_once_and_adds_each_row_once(text):
    count = traffic.backward(text)
    sids = traffic.READ if text is None else 48
    assert count.passed
    assert count.traffic.launches == 1
    assert count.traffic.loaded["grad"] == sids * A * H * W * 2
    assert sum(count.traffic.added.values()) == sids * N * H * W * 4


@pytest.mark.parametrize(
    "count",
    [
        lambda: traffic.dense("zipf 1.05"),
        lambda: traffic.sparse(),
        lambda: traffic.update("zipf 1.05", optim.RowWiseAdagrad, sids=96),
        lambda: traffic.update(text=3, sids=64),
    ],
    ids=["dense", "sparse", "update, Zipf", "update, tokens"],
)
def test_sorting_backward_and_update(count):
    """All kernels together, without torch's sorts, and no atomics."""
    found = count()
    assert found.passed, f"{found.name}: {found.ratio:.3f} of the floor"
    assert not sum(found.traffic.added.values())
    assert found.traffic.loaded["grad"] == found.sids * A * H * W * 2, "dS is read once"


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
    assert not traffic.forward().passed


def test_a_gradient_read_once_an_order_is_caught(monkeypatch):
    run = backward.prefix_memory_bwd
    monkeypatch.setattr(backward, "prefix_memory_bwd", lambda *given: run(*given) + run(*given))
    assert not traffic.backward().passed


def test_an_update_that_marks_every_run_as_shared_is_caught(monkeypatch):
    """All rows would go through memory, as if each prefix collided with another."""
    find = row_gradient.sort_prefixes

    def all_shared(*given):
        found = find(*given)
        return found._replace(rows=found.rows.clamp(max=0))

    monkeypatch.setattr(row_gradient, "sort_prefixes", all_shared)
    assert not traffic.update(sids=64).passed


def test_sectors_are_distinct_within_a_launch():
    spec, codes = traffic.spec_of(table_rows=3000), torch.zeros(64, L, dtype=torch.int64)
    weight = torch.randn(spec.total_rows, W).bfloat16()
    with counted(weight=weight) as found:
        prefix_memory(codes, weight, spec, backend="triton")
    rows, lines = N * H, W * 2 // traffic.SECTOR
    out = 64 * A * H * W * 2 // traffic.SECTOR
    given = 64 * L * 8 // traffic.SECTOR
    # Sectors may lie askew to rows, by one each; codes of the fifth level are not read.
    assert rows * lines + out + given / 2 <= found.sectors <= rows * (lines + 1) + out + given + 2
    assert found.loaded["weight"] == 64 * rows * W * 2


def test_the_command_prints_a_table_and_fails_on_a_passed_limit(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(traffic, "COUNTS", (traffic.rows, traffic.tokens))
    out = tmp_path / "deep" / "traffic.jsonl"
    assert main(["traffic", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "| rows " in text
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["passed"] for row in rows] == [True, True]
    assert rows[0]["ratio"] == 1.0
    monkeypatch.setattr(traffic, "STREAM", 0.9)
    assert main(["traffic", "--json"]) == 1
    found = [json.loads(line)["passed"] for line in capsys.readouterr().out.splitlines()]
    assert found == [True, False]


def test_counts_repeat():
    assert np.all([traffic.rows().as_row() == traffic.rows().as_row()])
