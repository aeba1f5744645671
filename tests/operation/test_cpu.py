"""The fast CPU path against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixmem_fast import AddressSpec
from prefixmem_fast.addressing import TokenStream
from prefixmem_fast.operation import cpu, reference
from tests.helpers.cases import assert_row_sums, token_case
from tests.helpers.strategies import codes_for, specs


@given(specs(largest_code=3_000_000_000), st.sampled_from((1, 3, 64)), st.data())
@settings(max_examples=100)
def test_any_spec(spec, width, data):
    """Forward bit for bit (both add the orders in turn); the rows that are touched exactly; sums within their bound."""
    codes = data.draw(codes_for(spec))
    weight = torch.randn(spec.total_rows, width)
    out = cpu.forward(codes, weight, spec)
    assert torch.equal(out, reference.forward(codes, weight, spec))
    grad = torch.randn_like(out)
    assert_row_sums(cpu, grad, codes, spec)


@given(specs(), st.integers(0, 10**6), st.booleans())
@settings(max_examples=60)
def test_any_token_stream(spec, seed, packed):
    ids, table = token_case(spec, (2, 29), seed)
    segments = torch.arange(29).expand(2, 29).div(7, rounding_mode="floor") if packed else None
    weight = torch.randn(spec.total_rows, 5)
    stream = TokenStream(ids, table, segments)
    out = cpu.forward(stream, weight, spec)
    assert torch.equal(out, reference.forward(stream, weight, spec))
    assert_row_sums(cpu, torch.randn_like(out), stream, spec)


@pytest.mark.parametrize("mode", ["prefix", "suffix", "full"])
def test_many_chunks(mode, monkeypatch):
    """Chunks of three rows: runs, duplicates and ended prefixes on both sides of every cut."""
    monkeypatch.setattr(cpu, "_CHUNK_BYTES", 3 * 2 * 8 * 4)
    spec = AddressSpec((9,) * 4, heads=2, table_rows=30, mode=mode, active_levels=(2, 4))
    codes = torch.randint(-1, 9, (200, 4))
    codes[::3] = codes[0]
    weight = torch.randn(spec.total_rows, 8)
    out = cpu.forward(codes, weight, spec)
    assert torch.equal(out, reference.forward(codes, weight, spec))
    grad = torch.randn_like(out)
    assert len(list(cpu._in_chunks(cpu._groups(grad, codes, spec)))) > 10
    assert_row_sums(cpu, grad, codes, spec)


def test_nan_in_unread_rows_does_not_leak():
    spec = AddressSpec((4, 4), heads=2, table_rows=40)
    codes = torch.tensor([[1, -1], [1, 2], [-1, 0]])
    weight = torch.full((spec.total_rows, 3), torch.nan)
    rows = reference.prefix_rows(codes, spec)
    weight[rows[rows >= 0]] = 1.0
    assert torch.equal(cpu.forward(codes, weight, spec), reference.forward(codes, weight, spec))
