"""Rows that prefixes share: claimed, chained and merged, with the same bits whatever the order of the programs."""

import pytest
import torch
from triton.runtime import interpreter

from prefixmem_fast import AddressSpec, optim
from prefixmem_fast.kernels import shared_rows, sorted_backward, sorted_codes
from prefixmem_fast.operation import reference
from prefixmem_fast.operation import triton as backend
from tests.helpers.cases import mostly_slow


@pytest.fixture(autouse=True)
def nothing_is_crowded(monkeypatch):
    """Small tables too go the way of large ones."""
    monkeypatch.setattr(sorted_backward, "crowded", lambda most, plan, spec: False)


@pytest.fixture
def in_any_order(monkeypatch):
    """Programs run in an order drawn for each launch, as on a GPU."""
    builder = interpreter.InterpreterBuilder
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    generator = torch.Generator().manual_seed(5)

    def drawn_dim(self, x, y, z):
        self.drawn = torch.randperm(x, generator=generator).tolist()
        set_dim(self, x, y, z)

    monkeypatch.setattr(builder, "set_grid_dim", drawn_dim)
    monkeypatch.setattr(builder, "set_grid_idx", lambda self, x, y, z: set_index(self, self.drawn[x], y, z))


def case(rows, sizes=(5, 9, 9), mode="prefix", sids=60):
    spec = AddressSpec(sizes, max_order=3, heads=2, table_rows=rows, mode=mode, addressing="hash")
    codes = torch.stack([torch.randint(-1, size, (sids,)) for size in sizes], 1)
    return spec, codes, torch.randn(sids, len(spec.active_levels), 6)


@pytest.fixture
def few(monkeypatch):
    """Sets which orders have few prefixes."""
    yield lambda most: (monkeypatch.setattr(sorted_codes, "FEW", most), sorted_codes.sort_plan_of.cache_clear())
    sorted_codes.sort_plan_of.cache_clear()


@pytest.mark.parametrize(
    ("mode", "rows", "most"),
    mostly_slow(
        lambda mode, rows, most: (rows == 3) == (mode == "full") and rows in (3, 40) and most == 45,
        ["prefix", "full"],
        [1, 3, 40, 1000],
        [0, 45, 4096],
    ),
)
def test_sums_are_exact(mode, rows, most, few):
    """From tables in which all prefixes share one row to such in which hardly two do; sums of integers, exact."""
    few(most)
    spec, codes, grad = case(rows, mode=mode)
    grad = grad.round()
    assert torch.equal(
        backend.dense_gradient(grad, codes, spec, deterministic=True), reference.dense_gradient(grad, codes, spec)
    )
    found = backend.row_sums(grad, codes, spec, torch.float32)
    listed = torch.zeros(spec.total_rows, 3).index_add_(0, found.rows, found.sums)
    assert torch.equal(listed, reference.dense_gradient(grad, codes, spec))


def updated(spec, codes, grad, dtype):
    weight = torch.nn.Parameter(torch.ones(spec.total_rows, 3, dtype=dtype))
    optimizer = optim.RowWiseAdagrad([weight], lr=0.1)
    for _ in range(2):
        update = optimizer.begin(weight)
        update.squares = []
        backend.fused_update(grad.to(dtype), codes, spec, update)
    return weight.detach(), torch.cat(update.squares).sum()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_an_update_has_the_same_bits_in_any_order_of_the_programs(dtype, few, request):
    few(5)
    spec, codes, grad = case(20)
    in_order, squares = updated(spec, codes, grad, dtype)
    assert not torch.equal(in_order, torch.ones_like(in_order))
    request.getfixturevalue("in_any_order")
    shuffled, _ = updated(spec, codes, grad, dtype)
    assert torch.equal(shuffled, in_order)
    expected = reference.dense_gradient(grad.to(dtype).double(), codes, spec).square().sum()
    torch.testing.assert_close(squares.double(), expected, rtol=1e-5, atol=0)


def test_a_filter_of_few_bits_marks_more_and_changes_nothing(few, monkeypatch):
    few(0)
    spec, codes, grad = case(4000)
    marked = []
    for bits in (32, 1):
        monkeypatch.setattr(shared_rows, "BITS_A_RUN", bits)
        mark = shared_rows.mark_claims

        def counting(targets, claims, layout, mark=mark):
            mark(targets, claims, layout)
            marked.append(claims.count.item())
            assert sorted(claims.shared[: claims.count].tolist()) == sorted(set(claims.shared[: claims.count].tolist()))

        monkeypatch.setattr(sorted_backward, "mark_claims", counting)
        found = backend.dense_gradient(grad, codes, spec, deterministic=True)
        torch.testing.assert_close(found, reference.dense_gradient(grad, codes, spec))
    assert marked[0] < marked[1]


def test_two_runs_of_one_row_are_both_marked():
    """Whichever claims it second."""
    claims = shared_rows.make_claims(8, torch.device("cpu"))
    targets = torch.tensor([[[7]], [[3]], [[7]], [[-1]], [[3 + 32 * len(claims.once)]]], dtype=torch.int32)
    rows = targets.flatten()
    for row in rows[rows >= 0].tolist():
        word, bit = row % (32 * len(claims.once)) // 32, 1 << row % 32
        claims.twice[word] |= claims.once[word] & bit
        claims.once[word] |= bit
    claims = claims._replace(links=claims.links[:5])
    shared_rows.mark_claims(targets, claims, shared_rows.Layout(1, 1, 1))
    alias = 3 + 32 * len(claims.once)
    assert targets.flatten().tolist() == [-9, -5, -9, -1, -2 - alias]
    assert claims.count == 4


@pytest.mark.parametrize("slots", [1, 3, 1 << 20, 1 << 27, (1 << 31) - 1])
def test_sizes_of_claims_are_powers_of_two_that_fit_32_bits(slots):
    claims = shared_rows.make_claims(slots, torch.device("meta"))
    for size in (32 * len(claims.once), 32 * len(claims.twice), len(claims.heads)):
        assert 4 <= size <= 1 << 30
        assert size & (size - 1) == 0
    assert len(claims.links) == len(claims.shared) == slots


def test_crowded_is_decided_by_the_smallest_table_that_may_overflow(monkeypatch):
    """The tables of other orders do not make room: chains of one order's rows would be long."""
    monkeypatch.undo()
    spec = AddressSpec((2048,) * 4, max_order=4, heads=4, table_rows=(2048, 100, 2_000_000, 2_000_000))
    plan = sorted_codes.sort_plan_of(spec)
    assert not sorted_backward.crowded(100, plan, spec)
    assert sorted_backward.crowded(101, plan, spec)
    exact = AddressSpec((8,) * 3, max_order=3, heads=1, table_rows=512)  # no order has more prefixes than rows
    assert not sorted_backward.crowded(1 << 40, sorted_codes.sort_plan_of(exact), exact)
