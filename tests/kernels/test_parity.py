"""Every kernel in the Triton interpreter against the reference: rows and copies bit for bit, sums within bounds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixmem_fast import AddressSpec, prefix_memory, prefix_rows, token_memory
from prefixmem_fast.addressing import TokenStream
from prefixmem_fast.operation import reference
from tests.helpers.cases import FLOATS, MODES, assert_exact_sums, dtype_name, mostly_slow, slow, token_case
from tests.helpers.strategies import codes_for, specs


@given(specs(largest_code=3_000_000_000), st.data())
@settings(max_examples=30)
def test_rows(spec, data):
    codes = data.draw(codes_for(spec))
    assert torch.equal(prefix_rows(codes, spec, backend="triton"), prefix_rows(codes, spec, backend="reference"))


@given(specs(), st.sampled_from((1, 3, 64)), st.data())
@settings(max_examples=8)
def test_any_spec(spec, width, data):
    """Forward bit for bit in float32 (both add the orders in turn); both gradients within the derived bound."""
    codes = data.draw(codes_for(spec))
    weight = torch.randn(spec.total_rows, width, requires_grad=True)
    out = prefix_memory(codes, weight, spec, backend="triton")
    assert torch.equal(out, reference.forward(codes, weight, spec))
    grad = torch.randn_like(out)
    for deterministic in (False, True):
        out = prefix_memory(codes, weight, spec, backend="triton", deterministic=deterministic)
        (found,) = torch.autograd.grad(out, weight, grad)
        assert_exact_sums(found, lambda g: reference.dense_gradient(g, codes, spec), grad)


@pytest.mark.parametrize(
    ("mode", "dtype", "deterministic"),
    mostly_slow(
        lambda mode, dtype, deterministic: dtype == torch.float32 if deterministic else mode == "prefix",
        MODES,
        FLOATS,
        [False, True],
    ),
    ids=dtype_name,
)
def test_dtypes(mode, dtype, deterministic):
    """Odd shapes: 63 SIDs, three heads, a width of 20."""
    spec = AddressSpec((6, 300, 9, 4, 7), max_order=4, heads=3, table_rows=50, mode=mode, active_levels=(2, 3, 5))
    codes = torch.randint(-1, 10, (63, 5), dtype=torch.int32)
    weight = torch.randn(spec.total_rows, 20).to(dtype).requires_grad_()
    out = prefix_memory(codes, weight, spec, backend="triton", deterministic=deterministic)
    assert_exact_sums(out.detach(), lambda w: reference.forward(codes, w, spec), weight.detach())
    grad = torch.randn(out.shape).to(dtype)
    out.backward(grad)
    assert weight.grad.dtype == dtype
    assert_exact_sums(weight.grad, lambda g: reference.dense_gradient(g, codes, spec), grad)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_one_row_is_copied_exactly(dtype):
    """With one order there is nothing to sum: an off-by-one would not hide behind a tolerance."""
    spec = AddressSpec((11,), max_order=1, heads=4, table_rows=11)
    weight = torch.randn(spec.total_rows, 64).to(dtype)
    codes = torch.randint(0, 11, (70, 1))
    out = prefix_memory(codes, weight, spec, backend="triton")
    rows = prefix_rows(codes, spec)[:, 0, 0]
    assert torch.equal(out[:, 0], weight[rows].flatten(1))


@pytest.mark.parametrize(("mode", "packed"), mostly_slow(lambda mode, packed: packed, MODES, [False, True]), ids=str)
def test_token_stream(mode, packed):
    spec = AddressSpec((6, 300, 9, 4), max_order=3, heads=3, table_rows=50, mode=mode, active_levels=(1, 3, 4))
    ids, table = token_case(spec, (3, 83))
    segments = torch.tensor([4, 0, 9, 2, 1]).repeat_interleave(17)[:83].expand_as(ids) if packed else None
    weight = torch.randn(spec.total_rows, 12, requires_grad=True)
    out = token_memory(ids, table, weight, spec, segment_ids=segments, backend="triton")
    assert out.detach().abs().sum(-1).count_nonzero() > 50
    assert torch.equal(out, reference.forward(TokenStream(ids, table, segments), weight, spec))
    grad = torch.randn_like(out)
    for deterministic in (False, True):
        out = token_memory(
            ids, table, weight, spec, segment_ids=segments, backend="triton", deterministic=deterministic
        )
        (found,) = torch.autograd.grad(out, weight, grad)
        assert_exact_sums(found, lambda g: reference.dense_gradient(g, TokenStream(ids, table, segments), spec), grad)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_token_stream_dtypes(dtype):
    spec = AddressSpec((6, 300, 9), heads=2, table_rows=50, active_levels=(2, 3))
    ids, table = token_case(spec, (2, 31), seed=1)
    weight = torch.randn(spec.total_rows, 8).to(dtype).requires_grad_()
    out = token_memory(ids.int(), table, weight, spec, backend="triton")
    assert_exact_sums(out.detach(), lambda w: reference.forward(TokenStream(ids, table), w, spec), weight.detach())
    grad = torch.randn(out.shape).to(dtype)
    for deterministic in (False, True):
        out = token_memory(ids, table, weight, spec, backend="triton", deterministic=deterministic)
        (found,) = torch.autograd.grad(out, weight, grad)
        assert_exact_sums(found, lambda g: reference.dense_gradient(g, TokenStream(ids, table), spec), grad)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (5, 1), (1, 200)], ids=str)
def test_token_shapes(shape):
    """Empty batches, single decoding steps, and SIDs that cross the tile of a program."""
    spec = AddressSpec((3, 3, 3), heads=2, table_rows=9)
    ids, table = token_case(spec, shape)
    weight = torch.randn(spec.total_rows, 4, requires_grad=True)
    for deterministic in (False, True):
        out = token_memory(ids, table, weight, spec, backend="triton", deterministic=deterministic)
        assert torch.equal(out, reference.forward(TokenStream(ids, table), weight, spec))
        out.sum().backward()


def test_a_sid_never_spans_two_rows():
    """Rows that end inside a SID, each followed by a row that begins with the levels that are missing."""
    spec = AddressSpec((3, 3, 3), heads=2, table_rows=9)
    table = torch.tensor([[0, 0], [1, 1], [2, 2], [3, 0]], dtype=torch.int32)
    ids = torch.tensor([[1, 2], [3, 1], [2, 3], [1, 2], [3, 0], [1, 2]])
    whole = torch.tensor([[1, 1], [0, 1], [0, 0], [1, 1], [0, 0], [1, 1]]).bool()
    weight = torch.randn(spec.total_rows, 4, requires_grad=True)
    for backend in ("reference", "triton"):
        for deterministic in (False, True):
            out = token_memory(ids, table, weight, spec, backend=backend, deterministic=deterministic)
            assert torch.equal(out.any(-1), whole)
            (found,) = torch.autograd.grad(out, weight, torch.ones_like(out))
            # Tokens of level 1 read H rows of 4, those of level 2 twice as many; all of them exactly.
            assert found.sum() == (4 * 1 + 3 * 2) * 2 * 4


def test_wide_rows_are_split_into_column_tiles():
    spec = AddressSpec((5, 5), heads=3, table_rows=7)
    codes = torch.randint(0, 5, (3, 2))
    weight = torch.randn(spec.total_rows, 2100, requires_grad=True)
    out = prefix_memory(codes, weight, spec, backend="triton")
    assert torch.equal(out, reference.forward(codes, weight, spec))
    for deterministic in (False, True):
        out = prefix_memory(codes, weight, spec, backend="triton", deterministic=deterministic)
        (found,) = torch.autograd.grad(out, weight, torch.ones_like(out))
        assert torch.equal(found, reference.dense_gradient(torch.ones_like(out), codes, spec))


def test_many_heads():
    spec = AddressSpec((5, 70_000), heads=40, table_rows=7)
    codes = torch.randint(0, 5, (3, 2))
    weight = torch.randn(spec.total_rows, 1)
    out = prefix_memory(codes, weight, spec, backend="triton")
    assert torch.equal(out, reference.forward(codes, weight, spec))


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("rows", [1, slow(2), 500])
def test_all_sids_equal(rows, deterministic):
    """One prefix for the whole batch: runs longer than many blocks, and every sum of small integers exact."""
    spec = AddressSpec((500,) * 3, heads=2, max_order=2, table_rows=rows, addressing="hash")
    codes = torch.tensor([[7, 8, 9]]).expand(300, 3)
    weight = torch.zeros(spec.total_rows, 4, requires_grad=True)
    out = prefix_memory(codes, weight, spec, backend="triton", deterministic=deterministic)
    grad = torch.randint(-8, 9, out.shape).float()
    out.backward(grad)
    assert torch.equal(weight.grad, reference.dense_gradient(grad, codes, spec))


@pytest.mark.parametrize("mode", MODES)
def test_deterministic_bits(mode):
    """Two runs, and a batch whose duplicates stand elsewhere in memory, give the same bits."""
    spec = AddressSpec((40,) * 4, heads=2, table_rows=30, mode=mode)
    codes = torch.randint(0, 40, (120, 4)) // 13 * 13
    weight = torch.randn(spec.total_rows, 8, requires_grad=True)
    grad = torch.randn(120, 4, 16)
    found = []
    for _ in range(2):
        out = prefix_memory(codes.clone(), weight, spec, backend="triton", deterministic=True)
        found.append(torch.autograd.grad(out, weight, grad.clone())[0])
    assert torch.equal(*found)
    assert_exact_sums(found[0], lambda g: reference.dense_gradient(g, codes, spec), grad)


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
def test_bfloat16_gradients_are_summed_in_float32(deterministic):
    """1 + 300 x 2^-9 survives; a bfloat16 running sum would stay at 1."""
    spec = AddressSpec((1,), heads=1, max_order=1, table_rows=1)
    weight = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    codes = torch.zeros(301, 1, dtype=torch.int64)
    out = prefix_memory(codes, weight, spec, backend="triton", deterministic=deterministic)
    grad = torch.full_like(out, 2**-9)
    grad[0] = 1
    out.backward(grad)
    assert abs(weight.grad.item() - (1 + 300 * 2**-9)) <= 2**-7 * 1.6


def test_nan_in_unread_rows_does_not_leak():
    spec = AddressSpec((4, 4), heads=2, table_rows=40)
    codes = torch.tensor([[1, -1], [1, 2], [-1, 0]])
    weight = torch.full((spec.total_rows, 3), torch.nan)
    rows = prefix_rows(codes, spec)
    weight[rows[rows >= 0]] = 1.0
    out = prefix_memory(codes, weight, spec, backend="triton")
    assert out.isfinite().all()
    assert torch.equal(out, reference.forward(codes, weight, spec))


@pytest.mark.parametrize("mode", MODES)
def test_a_row_of_tokens_begins_anew(mode):
    """Levels 1 and 2 at the end of a row, 3 and 4 at the start of the next: no SID. The tokens before a tensor are not
    looked at either."""
    spec = AddressSpec((6, 30, 9, 4), max_order=4, heads=2, table_rows=50, mode=mode)
    table = torch.tensor([[0, 0], *([level, 1] for level in range(1, 5))], dtype=torch.int32)
    ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 0, 1, 2], [3, 4, 1, 2, 3, 4, 0, 0, 2, 3, 4, 1, 2, 3]])
    weight = torch.randn(spec.total_rows, 4)
    whole = torch.cat([ids.new_tensor([1, 2]), ids.flatten()])[2:].view(
        2, 14
    )  # levels 1 and 2 stand before it in memory
    found = token_memory(whole, table, weight, spec, backend="triton")
    assert torch.equal(found, reference.forward(TokenStream(ids, table, None), weight, spec))
    assert not found[1, :2].any()
    starts = ids.clone()
    starts[0, :2] = torch.tensor([3, 4])
    whole = torch.cat([ids.new_tensor([1, 2]), starts.flatten()])[2:].view(2, 14)
    assert not token_memory(whole, table, weight, spec, backend="triton")[0, :2].any()


@pytest.mark.parametrize("mode", MODES)
def test_a_code_that_is_none_ends_a_prefix_of_tokens(mode):
    """In suffix mode too, where the orders behind it would not take it in."""
    spec = AddressSpec((6, 5, 9, 4), max_order=3, heads=2, table_rows=50, mode=mode)
    table = torch.tensor([[0, 0], [1, 1], [2, 5], [3, 1], [4, 1], [2, 4], [2, -1]], dtype=torch.int32)
    ids = torch.tensor([[1, 2, 3, 4, 0, 1, 5, 3, 4, 1, 6, 3, 4]])  # codes 5 of 5, 4 and -1 at level 2
    weight = torch.randn(spec.total_rows, 4)
    found = token_memory(ids, table, weight, spec, backend="triton")
    assert torch.equal(found, reference.forward(TokenStream(ids, table, None), weight, spec))
    assert found[0, 5:8].any(1).all()
