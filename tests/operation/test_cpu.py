"""The fast CPU path against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixmem_fast import AddressSpec, prefix_memory
from prefixmem_fast.operation import cpu, reference
from tests.kernels.test_parity import assert_exact_sums, token_case
from tests.strategies import codes_for, specs


def rows_of(groups):
    """All rows, ascending; no row may come twice."""
    rows = [torch.empty(0, dtype=torch.int64)]
    for group in groups:
        assert (group.rows[1:] > group.rows[:-1]).all()
        assert sum(map(len, group.sums)) == len(group.rows)
        rows.append(group.rows)
    found = torch.cat(rows)
    assert len(found.unique()) == len(found)
    return found.sort()[0]


@given(specs(largest_code=3_000_000_000), st.sampled_from((1, 3, 64)), st.data())
@settings(max_examples=100)
def test_any_spec(spec, width, data):
    """Forward bit for bit (both add the orders in turn); the rows that are touched exactly; sums within their bound."""
    codes = data.draw(codes_for(spec))
    weight = torch.randn(spec.total_rows, width)
    out = cpu.prefix_memory(codes, weight, spec)
    assert torch.equal(out, reference.prefix_memory(codes, weight, spec))
    grad = torch.randn_like(out)
    assert torch.equal(rows_of(cpu.row_gradient(grad, codes, spec)), reference.row_gradient(grad, codes, spec)[0])
    found = cpu.prefix_memory_backward(grad, codes, spec)
    assert_exact_sums(found, lambda g: reference.prefix_memory_backward(g, codes, spec), grad)


@given(specs(), st.integers(0, 10**6), st.booleans())
@settings(max_examples=60)
def test_any_token_stream(spec, seed, packed):
    ids, table = token_case(spec, (2, 29), seed)
    segments = torch.arange(29).expand(2, 29).div(7, rounding_mode="floor") if packed else None
    weight = torch.randn(spec.total_rows, 5)
    out = cpu.token_memory(ids, table, weight, spec, segments)
    assert torch.equal(out, reference.token_memory(ids, table, weight, spec, segments))
    grad = torch.randn_like(out)
    given_ = (ids, table, spec, segments)
    rows = rows_of(cpu.token_row_gradient(grad, *given_))
    assert torch.equal(rows, reference.token_row_gradient(grad, *given_)[0])
    found = cpu.token_memory_backward(grad, *given_)
    assert_exact_sums(found, lambda g: reference.token_memory_backward(g, *given_), grad)


@pytest.mark.parametrize("mode", ["prefix", "suffix", "full"])
def test_many_chunks(mode, monkeypatch):
    """Chunks of three rows: runs, duplicates and ended prefixes on both sides of every cut."""
    monkeypatch.setattr(cpu, "_CHUNK_BYTES", 3 * 2 * 8 * 4)
    spec = AddressSpec((9,) * 4, heads=2, table_rows=30, mode=mode, active_levels=(2, 4))
    codes = torch.randint(-1, 9, (200, 4))
    codes[::3] = codes[0]
    weight = torch.randn(spec.total_rows, 8)
    out = cpu.prefix_memory(codes, weight, spec)
    assert torch.equal(out, reference.prefix_memory(codes, weight, spec))
    grad = torch.randn_like(out)
    assert len(list(cpu.in_chunks(cpu.row_gradient(grad, codes, spec)))) > 10
    rows, values = reference.row_gradient(grad, codes, spec)
    found_rows, found = cpu.as_list(cpu.row_gradient(grad, codes, spec), 9_999, 8, torch.float32)
    assert torch.equal(found_rows, rows)
    torch.testing.assert_close(found, values)
    found = cpu.prefix_memory_backward(grad, codes, spec)
    assert_exact_sums(found, lambda g: reference.prefix_memory_backward(g, codes, spec), grad)


def test_nan_in_unread_rows_does_not_leak():
    spec = AddressSpec((4, 4), heads=2, table_rows=40)
    codes = torch.tensor([[1, -1], [1, 2], [-1, 0]])
    weight = torch.full((spec.total_rows, 3), torch.nan)
    rows = reference.prefix_rows(codes, spec)
    weight[rows[rows >= 0]] = 1.0
    assert torch.equal(cpu.prefix_memory(codes, weight, spec), reference.prefix_memory(codes, weight, spec))


def test_auto_takes_it_on_the_cpu(monkeypatch):
    called = []
    kept = cpu.prefix_memory
    monkeypatch.setattr(cpu, "prefix_memory", lambda *given: called.append(1) or kept(*given))
    spec = AddressSpec((4, 4), table_rows=40)
    prefix_memory(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(spec.total_rows, 3), spec)
    assert called
