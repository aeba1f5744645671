"""The reference against the integer oracle, central differences and sums by hand."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixmem_fast import AddressSpec, prefix_memory, prefix_rows, token_memory
from prefixmem_fast.addressing import TokenStream
from prefixmem_fast.checks import oracle
from prefixmem_fast.operation import reference
from tests.helpers.cases import BACKENDS, slow
from tests.helpers.strategies import codes_for, specs

# "auto" would take the fast path of the CPU.
prefix_rows, prefix_memory, token_memory = (
    partial(function, backend="reference") for function in (prefix_rows, prefix_memory, token_memory)
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@given(specs(largest_code=3_000_000_000), st.data())
def test_rows_equal_the_oracle(spec, data):
    codes = data.draw(codes_for(spec))
    assert prefix_rows(codes, spec).numpy().tolist() == oracle.prefix_rows(codes.numpy(), spec.to_dict()).tolist()


@given(specs(), st.sampled_from((1, 3, 8)), st.data())
def test_sums_and_gradient_equal_the_oracle(spec, width, data):
    codes = data.draw(codes_for(spec, max_sids=12))
    weight = torch.randn(spec.total_rows, width, dtype=torch.float64, requires_grad=True)
    memory = prefix_memory(codes, weight, spec)
    exact = oracle.prefix_memory(codes.numpy(), weight.detach().numpy(), spec.to_dict())
    np.testing.assert_allclose(memory.detach().numpy(), exact, rtol=0, atol=1e-14)
    grad = torch.randn_like(memory)
    memory.backward(grad)
    exact = oracle.prefix_memory_backward(grad.numpy(), codes.numpy(), spec.to_dict())
    np.testing.assert_allclose(weight.grad.numpy(), exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["prefix", slow("suffix"), slow("full")])
def test_gradcheck(mode):
    """Central differences, first and second order, with collisions and an ended prefix."""
    spec = AddressSpec((5, 4, 3), heads=2, max_order=3, table_rows=3, mode=mode, active_levels=(2, 3))
    codes = torch.tensor([[0, 1, 2], [0, 1, 2], [4, 3, 0], [1, -1, 2], [0, 0, 3]])
    weight = torch.randn(spec.total_rows, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: prefix_memory(codes, w, spec), weight)
    assert torch.autograd.gradgradcheck(lambda w: prefix_memory(codes, w, spec), weight)
    table = torch.tensor([[0, 0], [1, 0], [1, 4], [2, 3], [3, 2]], dtype=torch.int32)
    ids = torch.tensor([[1, 3, 4, 0, 2, 3, 0], [2, 3, 4, 1, 3, 4, 4]])
    assert torch.autograd.gradcheck(lambda w: token_memory(ids, table, w, spec), weight)
    assert torch.autograd.gradgradcheck(lambda w: token_memory(ids, table, w, spec), weight)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (2, 0, 3), (2, 1, 2, 1)])
def test_any_leading_shape(shape):
    spec = AddressSpec((9, 9, 9), table_rows=20, active_levels=(1, 3))
    codes = torch.randint(-1, 10, (*shape, 3))
    weight = torch.randn(spec.total_rows, 2)
    memory = prefix_memory(codes, weight, spec)
    assert memory.shape == (*shape, 2, 8)
    assert prefix_rows(codes, spec).shape == (*shape, 3, 4, 4)
    flat = prefix_memory(codes.reshape(-1, 3), weight, spec)
    assert torch.equal(memory.reshape(-1, 2, 8), flat)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "size"), [(torch.int16, 66_298), (torch.int16, 1 << 16), (torch.int32, 3 << 30)])
def test_a_codebook_larger_than_the_dtype_of_the_codes(dtype, size, backend):
    """Its size, cut to that dtype, would end prefixes that go on."""
    spec = AddressSpec((size, size), table_rows=64, heads=2, max_order=2)
    largest = torch.iinfo(dtype).max
    codes = torch.tensor([[5, largest], [largest, 7], [largest, largest], [-1, 3]], dtype=dtype)
    rows = prefix_rows(codes, spec, backend=backend)
    assert torch.equal(rows, torch.from_numpy(oracle.prefix_rows(codes.numpy(), spec.to_dict())))
    weight = torch.randn(spec.total_rows, 4, requires_grad=True)
    for options in ({"grad": "sparse"}, {"deterministic": True}, {}):
        S = prefix_memory(codes, weight, spec, backend=backend, **options)
        assert torch.equal(S, prefix_memory(codes.long(), weight, spec, backend="reference"))
        (found,) = torch.autograd.grad(S, weight, torch.ones_like(S))
        touched = torch.zeros(spec.total_rows).index_fill_(0, rows[rows >= 0].unique(), 1.0)
        assert torch.equal((found.to_dense() != 0).any(1).float(), touched)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_code_dtypes_and_strides(dtype, backend):
    spec = AddressSpec((9, 9, 9), table_rows=20)
    codes = torch.randint(-1, 10, (6, 3))
    weight = torch.randn(spec.total_rows, 2)
    expected = prefix_memory(codes, weight, spec)
    strided = torch.empty(3, 12, dtype=dtype)[:, ::2].T.copy_(codes)
    assert not strided.is_contiguous()
    wide = torch.empty(spec.total_rows, 4)[:, ::2].copy_(weight)
    assert torch.equal(prefix_memory(strided, wide, spec, backend=backend), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_sums_are_rounded_once(dtype):
    """Four rows that a half-precision running sum would lose: the accumulator is float32 or wider."""
    spec = AddressSpec((1, 1, 1, 1), heads=1, table_rows=1, active_levels=(4,))
    weight = torch.tensor([[1.0], [2**-9], [2**-9], [2**-8]]).to(dtype)
    memory = prefix_memory(torch.zeros(1, 4, dtype=torch.int64), weight, spec)
    assert memory.dtype == dtype
    assert memory.item() == torch.tensor(1 + 2**-7, dtype=torch.float64).to(dtype).item()


def test_a_bad_code_ends_the_prefix():
    spec = AddressSpec((4, 4, 4), max_order=3, heads=1, table_rows=50)
    weight = torch.randn(spec.total_rows, 1, requires_grad=True)
    whole = prefix_memory(torch.tensor([1, 2, 3]), weight, spec)
    for bad in (-1, 4, 1 << 40, -(1 << 40)):
        cut = prefix_memory(torch.tensor([1, bad, 3]), weight, spec)
        assert torch.equal(cut, whole[:1].expand(3, 1)), "orders before the bad code stay, orders from it on are zero"
        rows = prefix_rows(torch.tensor([1, bad, 3]), spec)
        assert (rows[:, 0] >= 0).all()
        assert (rows[:, 1:] == -1).all()
        weight.grad = None
        cut.sum().backward()
        assert weight.grad.count_nonzero() == 1
        weight.grad = None
        prefix_memory(torch.tensor([bad, 2, 3]), weight, spec).sum().backward()
        assert not weight.grad.any()


def test_a_code_means_different_things_behind_different_prefixes():
    """The point of the encoder: (505 behind 1273) and (505 behind 974) read different rows of order 2."""
    spec = AddressSpec((2048,) * 5)
    rows = prefix_rows(torch.tensor([[1273, 505, 0, 0, 0], [974, 505, 0, 0, 0]]), spec)
    assert (rows[0, 1, 1] != rows[1, 1, 1]).all()


@given(st.data())
@settings(max_examples=60)
def test_token_recognition_equals_the_oracle(data):
    levels = data.draw(st.integers(1, 4))
    spec = AddressSpec((7,) * levels, table_rows=30, heads=2)
    table = torch.tensor(
        data.draw(
            st.lists(st.tuples(st.integers(0, levels + 1), st.integers(0, 6)), min_size=1, max_size=8).map(
                lambda entries: [(0, 0), *((level, 1) for level in range(1, levels + 1)), *entries]
            )
        ),
        dtype=torch.int32,
    )
    row = st.lists(st.integers(-1, len(table)), min_size=12, max_size=12)
    ids = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=2)))
    segments = data.draw(st.sampled_from((None, torch.tensor([4, 0, 9]).repeat_interleave(4).expand_as(ids))))
    weight = torch.randn(spec.total_rows, 2, dtype=torch.float64)
    found = reference.forward(TokenStream(ids, table, segments), weight, spec)
    exact = oracle.token_memory(
        ids.numpy(), table.numpy(), weight.numpy(), spec.to_dict(), None if segments is None else segments.numpy()
    )
    np.testing.assert_allclose(found.numpy(), exact, rtol=0, atol=1e-14)


def test_tokens_of_whole_sids_read_what_their_codes_read():
    spec = AddressSpec((7, 7, 7), table_rows=30, active_levels=(2, 3))
    table = torch.zeros(40, 2, dtype=torch.int32)
    for level in range(3):
        table[10 + 7 * level : 17 + 7 * level, 0] = level + 1
        table[10 + 7 * level : 17 + 7 * level, 1] = torch.arange(7)
    codes = torch.randint(0, 7, (5, 3))
    tokens = codes + torch.tensor([10, 17, 24])
    row = [3, *tokens[:2].flatten().tolist(), 0, 1, *tokens[2:].flatten().tolist()]
    ids = torch.tensor([row])
    weight = torch.randn(spec.total_rows, 2)
    out = token_memory(ids, table, weight, spec)[0]
    by_sid = torch.cat([out[1:7], out[9:]]).reshape(5, 3, -1)
    assert not out[[0, 7, 8]].any()
    assert not by_sid[:, 0].any(), "level 1 is not active"
    assert torch.equal(by_sid[:, 1:], prefix_memory(codes, weight, spec))
