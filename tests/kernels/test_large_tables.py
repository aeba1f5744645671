"""Tables past 2^31 elements and past 2^31 rows. Pages are lazily mapped: only the rows that are read take memory."""

import numpy as np
import pytest
import torch

from prefixmem_fast import AddressSpec, prefix_rows
from prefixmem_fast.kernels import atomic_backward as backward
from prefixmem_fast.kernels import forward, sorted_backward

# 4 x 10^7 rows of 64: 2.56 x 10^9 elements, past 2^31 = 2.147 x 10^9.
SPEC = AddressSpec((2048,) * 4, heads=2, table_rows=5_000_000, addressing="hash")
WIDTH = 64


@pytest.fixture
def unpoisoned():
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


def lazy_zeros(dtype=np.float32):
    return torch.from_numpy(np.zeros((SPEC.total_rows, WIDTH), dtype))


def far_codes():
    """SIDs whose rows lie on both sides of element 2^31."""
    codes = torch.randint(0, 2048, (40, 4))
    rows = prefix_rows(codes, SPEC)[:, 3]
    assert (rows.max() * WIDTH > 1 << 31) & (rows.min() * WIDTH < 1 << 31)
    return codes, rows  # rows [M, N, H] at level 4


def test_forward_past_2_31_elements(unpoisoned):
    codes, rows = far_codes()
    weight = lazy_zeros()
    weight[rows.flatten()] = torch.randn(rows.numel(), WIDTH)
    out = forward.prefix_memory_fwd(codes, weight, SPEC)
    expected = weight[rows].sum(1)  # [M, H, W], N = 4 rows each
    torch.testing.assert_close(out[:, 3], expected.flatten(1), rtol=0, atol=1e-5)


def _deterministic(grad, codes, spec):
    return sorted_backward.dense(grad, codes, spec)


@pytest.mark.parametrize(
    ("module", "gradient"),
    [(backward, backward.prefix_memory_bwd), (sorted_backward, _deterministic)],
    ids=["fast", "deterministic"],
)
def test_gradient_past_2_31_elements(module, gradient, monkeypatch, unpoisoned):
    codes, rows = far_codes()
    monkeypatch.setattr(module, "zero_table", lambda *_: lazy_zeros())
    grad = torch.randint(-4, 5, (40, 4, 2 * WIDTH)).float()
    found = gradient(grad, codes, SPEC)
    by_order = grad.flip(1).cumsum(1).flip(1).unflatten(-1, (2, WIDTH))  # [M, N, H, W]: levels n .. 4
    unique, place = rows.flatten().unique(return_inverse=True)
    expected = torch.zeros(len(unique), WIDTH).index_add_(0, place, by_order.reshape(-1, WIDTH))
    assert torch.equal(found[unique], expected)


def test_rows_past_2_31():
    """Rows themselves beyond 32 bits, hashed and exact; nothing of the table exists."""
    for spec in (
        AddressSpec((70_000,) * 3, table_rows=3_000_000_000, addressing="hash"),
        AddressSpec((70_000,) * 3, table_rows=10_000_000_000),
    ):
        codes = torch.randint(0, 70_000, (50, 3))
        rows = prefix_rows(codes, spec, backend="triton")
        assert rows.max() > 1 << 32
        assert torch.equal(rows, prefix_rows(codes, spec, backend="reference"))
