"""What the kernels make of a row's sum: numbers in full, NaN kept, sums put aside and taken up again."""

import pytest
import torch
import triton
import triton.language as tl

from prefixmem_fast import AddressSpec, optim
from prefixmem_fast.kernels.aside import put_aside, room_for_sums, take_aside
from prefixmem_fast.kernels.update import round_stochastically
from prefixmem_fast.operation import reference
from prefixmem_fast.operation import triton as backend

SPEC = AddressSpec((4, 5), max_order=2, heads=1, table_rows=30, addressing="hash")
CODES = torch.tensor([[0, 1], [2, 2], [3, 4], [0, 2]])


@triton.jit
def put_and_take_kernel(p_in, p_aside, p_out, half, N: tl.constexpr):
    o = tl.arange(0, N)
    put_aside(p_aside + o, tl.load(p_in + o), o < N, half)
    tl.store(p_out + o, take_aside(p_aside + o, o < N, half))


@triton.jit
def round_kernel(p_in, p_out, N: tl.constexpr):
    o = tl.arange(0, N)
    b = tl.load(p_in + o)[None, None, :]
    b_row = tl.full([1, 1], 3, tl.int32)
    tl.store(p_out + o[None, None, :], round_stochastically(b, b_row, o, tl.full([], 7, tl.uint32)))


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, 0x7F800000, -0x00800000], ids=hex)
def test_stochastic_rounding_keeps_what_is_not_finite(bits):
    """A GPU's NaN is 0x7FFFFFFF, to which nothing can be added."""
    values = torch.full((64,), bits, dtype=torch.int32).view(torch.float32)
    found = torch.zeros(64, dtype=torch.bfloat16)
    round_kernel[(1,)](values, found, 64)
    torch.testing.assert_close(found.float(), values, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_sums_put_aside_come_back_bit_for_bit(dtype):
    sums = torch.randn(64, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    sums[:3] = torch.tensor([float("nan"), float("inf"), -0.0])
    room = room_for_sums(4, 16, dtype, torch.device("cpu"))
    found = torch.zeros_like(sums)
    put_and_take_kernel[(1,)](sums, room, found, 64, 64)
    integers = torch.int64 if dtype == torch.float64 else torch.int32
    assert torch.equal(found.view(integers), sums.view(integers))


@pytest.mark.parametrize("make", [optim.SGD, optim.RowWiseAdagrad, optim.RowWiseAdam, optim.LazyAdam])
def test_numbers_of_a_float64_table_are_float64(make):
    """Triton passes a float in 32 bits: 0.1 would be off by 1e-8."""
    tables = []
    for functions in (backend, reference):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, SPEC.total_rows * 3, dtype=torch.float64).view(-1, 3))
        optimizer = make([weight], lr=0.1, weight_decay=0.3)
        for _ in range(3):
            update = optimizer.begin(weight)
            update.squares = []
            functions.fused_update(torch.full((4, 2, 3), 0.7, dtype=torch.float64), CODES, SPEC, update)
        tables.append(weight.detach())
    torch.testing.assert_close(tables[0], tables[1], rtol=1e-13, atol=1e-13)


def test_triton_gets_each_number_in_two_floats():
    from prefixmem_fast.kernels.update import logarithm, pair

    for number in (0.1, 1e-8, 0.999, 3.0, 0.0):
        upper, rest = pair(number)
        assert upper == torch.tensor(number).item()
        assert abs(upper + torch.tensor(rest).item() - number) <= 2.0**-47 * number
    assert logarithm(0.0) == (float("-inf"), 0.0)


@pytest.mark.parametrize("make", [optim.SGD, optim.RowWiseAdagrad, optim.RowWiseAdam, optim.LazyAdam])
def test_a_gradient_that_is_not_finite_stays_in_its_row(make):
    """In bfloat16 with stochastic rounding, which adds to the bits of NaN and of infinity too."""
    weight = torch.nn.Parameter(torch.ones(SPEC.total_rows, 4, dtype=torch.bfloat16))
    update = make([weight], lr=0.5).begin(weight)
    grad = torch.ones(4, 2, 4, dtype=torch.bfloat16)
    grad[1, 1, 2] = torch.tensor(0x7FFF, dtype=torch.int16).view(torch.bfloat16)
    backend.fused_update(grad, CODES, SPEC, update)
    rows = reference.prefix_rows(CODES, SPEC)[:, 1, :, 0]
    bad = weight.detach().float().isnan().any(1).nonzero().flatten()
    assert set(bad.tolist()) == set(rows[1].tolist())
    assert not torch.equal(weight.detach()[rows[0]], torch.ones(2, 4, dtype=torch.bfloat16))
