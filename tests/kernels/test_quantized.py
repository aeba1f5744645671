"""The kernels over quantized tables in the Triton interpreter, against the reference: float32 sums bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixmem_fast import AddressSpec
from prefixmem_fast.addressing import TokenStream
from prefixmem_fast.operation import reference
from prefixmem_fast.operation import triton as backend
from prefixmem_fast.operation.interface import QuantizedTable
from prefixmem_fast.operation.quantization import dequantized, quantize
from tests.helpers.cases import MODES, assert_exact_sums, mostly_slow, token_case
from tests.helpers.quantized import KINDS
from tests.helpers.strategies import codes_for, specs


def table_of(kind, spec, width):
    return quantize(torch.randn(spec.total_rows, width), kind)


def assert_same(source, table, spec):
    found = backend.quantized_forward(source, table, spec, torch.float32)
    assert found.any()
    assert torch.equal(found, reference.quantized_forward(source, table, spec, torch.float32))


@given(specs(largest_code=3_000_000_000), st.sampled_from((1, 3, 64)), st.sampled_from(KINDS), st.data())
@settings(max_examples=8)
def test_any_spec(spec, width, kind, data):
    codes, table = data.draw(codes_for(spec)), table_of(kind, spec, width)
    found = backend.quantized_forward(codes, table, spec, torch.float32)
    assert torch.equal(found, reference.quantized_forward(codes, table, spec, torch.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_several_column_tiles_and_many_heads(kind):
    for heads, width in ((3, 2100), (40, 1)):
        spec = AddressSpec((5, 70_000), heads=heads, table_rows=7)
        assert_same(torch.randint(0, 5, (3, 2)), table_of(kind, spec, width), spec)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_in_float32_and_rounded_once(kind, dtype):
    """Of 63 SIDs, three heads and a width of 20."""
    spec = AddressSpec((6, 300, 9, 4, 7), heads=3, table_rows=50, active_levels=(2, 3, 5))
    codes, table = torch.randint(-1, 10, (63, 5), dtype=torch.int32), table_of(kind, spec, 20)
    out = backend.quantized_forward(codes, table, spec, dtype)
    assert out.dtype == dtype
    weight = dequantized(table, torch.arange(spec.total_rows))
    wide = reference.forward(codes, weight, spec)
    # The interpreter truncates to bfloat16 where a GPU rounds: a unit, not half of one.
    assert ((out.float() - wide).abs() <= torch.finfo(dtype).eps * wide.abs() + torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize("kind", KINDS)
def test_strided_tables_and_codes(kind):
    spec = AddressSpec((9, 9, 9), table_rows=20)
    codes = torch.empty(3, 12, dtype=torch.int64)[:, ::2].T.copy_(torch.randint(-1, 10, (6, 3)))
    values, scales = table_of(kind, spec, 4)
    wide = torch.zeros(spec.total_rows, 8, dtype=torch.int8)[:, ::2].copy_(values.view(torch.int8))
    far = torch.zeros(2 * spec.total_rows)[::2].copy_(scales)
    strided = QuantizedTable(wide.view(values.dtype), far)
    assert not any(tensor.is_contiguous() for tensor in (codes, *strided))
    found = backend.quantized_forward(codes, strided, spec, torch.float32)
    assert torch.equal(found, reference.quantized_forward(codes, QuantizedTable(values, scales), spec, torch.float32))


@pytest.mark.parametrize(
    ("mode", "kind"), mostly_slow(lambda mode, kind: (mode, kind) == ("prefix", "fp8"), MODES, KINDS)
)
def test_the_kernel_of_windows_is_the_reference(mode, kind):
    """Several blocks of windows and, of wide rows, several column tiles."""
    spec = AddressSpec((6, 30, 9), heads=3, max_order=2, table_rows=50, mode=mode, active_levels=(1, 2))
    ids, token_table = token_case(spec, (5, 9))
    table, met = table_of(kind, spec, 1100), False
    for end in range(1, 10):
        found, expected = torch.full((2, 5, 3300), torch.nan)
        backend.read_windows(ids[:, :end], token_table, table, spec, found)
        reference.read_windows(ids[:, :end], token_table, table, spec, expected)
        assert torch.equal(found, expected)
        met = met or bool(found.any())
    assert met


def test_float_tables_take_no_scales():
    """One kernel serves both: without scales nothing is multiplied."""
    spec = AddressSpec((6, 30, 9), heads=3, table_rows=50)
    ids, token_table = token_case(spec, (2, 19))
    stream, weight = TokenStream(ids, token_table, None), torch.randn(spec.total_rows, 8).bfloat16()
    assert_exact_sums(backend.forward(stream, weight, spec), lambda w: reference.forward(stream, w, spec), weight)
