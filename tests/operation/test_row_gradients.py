"""grad="sparse" and grad="fused": what they give, what they never hold, and what they refuse."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from prefixmem_fast import (
    AddressSpec,
    PrefixMem,
    PrefixMemConfig,
    optim,
    prefix_memory,
    token_memory,
)
from prefixmem_fast.addressing import TokenStream
from prefixmem_fast.operation import reference
from tests.helpers.cases import BACKENDS, MODES, assert_exact_sums, mostly_slow, token_case


def case(mode="prefix", dtype=torch.float32, sids=24):
    """Duplicates, a prefix that a third of the batch shares, ended prefixes, and far more prefixes than rows."""
    spec = AddressSpec((40,) * 4, heads=2, max_order=3, table_rows=11, mode=mode, active_levels=(1, 3, 4))
    codes = torch.randint(0, 40, (sids, 4))
    codes[::3, :2] = codes[0, :2]
    codes[5] = codes[7]
    codes[3, 1] = -1
    weight = torch.nn.Parameter(torch.randn(spec.total_rows, 5).to(dtype))
    return spec, codes, weight


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_sparse_is_the_dense_gradient(mode, backend):
    spec, codes, weight = case(mode)
    out = prefix_memory(codes, weight, spec, backend=backend, grad="sparse")
    grad = torch.randn_like(out)
    out.backward(grad)
    assert weight.grad.is_sparse
    if backend == "triton":
        assert weight.grad._nnz() == _most_rows(spec, len(codes)), "the number of entries depends on the shape alone"
    found = weight.grad.coalesce()
    assert torch.equal(found.indices()[0], reference.row_sums(grad, codes, spec, grad.dtype).rows)
    assert_exact_sums(found.to_dense(), lambda g: reference.dense_gradient(g, codes, spec), grad)


def _most_rows(spec, sids):
    if spec.mode == "suffix":
        return sids * spec.heads * sum(len(spec.orders_at(level)) for level in spec.active_levels)
    orders = [n for n in (1, 2, 3) if spec.mode == "prefix" or n in spec.active_levels]
    return sids * spec.heads * len(orders)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_of_a_token_stream(backend):
    spec, _, weight = case()
    ids, table = token_case(spec, (2, 31))
    out = token_memory(ids, table, weight, spec, backend=backend, grad="sparse")
    grad = torch.randn_like(out)
    out.backward(grad)
    found = weight.grad.coalesce()
    assert torch.equal(found.indices()[0], reference.row_sums(grad, TokenStream(ids, table), spec, grad.dtype).rows)
    assert_exact_sums(found.to_dense(), lambda g: reference.dense_gradient(g, TokenStream(ids, table), spec), grad)


@pytest.mark.parametrize(
    ("mode", "block", "addressing"),
    mostly_slow(
        lambda mode, block, addressing: block == 8 and (mode == "prefix") == (addressing == "hash"),
        ["prefix", "full"],
        [8, 32],
        ["auto", "hash"],
    ),
)
def test_a_hot_prefix_over_many_blocks(mode, block, addressing, monkeypatch):
    """Runs that fill blocks, end at their edges, and reach over several levels of partial sums; sums of ones, exact."""
    from prefixmem_fast.kernels import sorted_prefixes

    monkeypatch.setattr(sorted_prefixes, "block_of", lambda sids, enough: block)
    rows = 5 if addressing == "hash" else 27
    spec = AddressSpec((3,) * 3, heads=1, max_order=3, table_rows=rows, mode=mode, addressing=addressing)
    codes = torch.zeros(9 * block + 5, 3, dtype=torch.int64)
    codes[: 2 * block, 0] = 1
    codes[2 * block : 3 * block, 2] = 2
    codes[4 * block : 4 * block + 6] = torch.randint(0, 3, (6, 3))
    codes[-3:] = -1
    weight = torch.zeros(spec.total_rows, 2, requires_grad=True)
    out = prefix_memory(codes, weight, spec, backend="triton", deterministic=True)
    expected = reference.dense_gradient(torch.ones_like(out), codes, spec)
    (dense,) = torch.autograd.grad(out, weight, torch.ones_like(out))
    assert torch.equal(dense, expected)
    out = prefix_memory(codes, weight, spec, backend="triton", grad="sparse")
    out.backward(torch.ones_like(out))
    assert torch.equal(weight.grad.to_dense(), expected)


@pytest.mark.parametrize("largest", [5, 200, 2**9, 2**20, 2**40])
def test_sorts_are_lexicographic_and_stable(largest):
    """In one key of 63 bits or in several; colliding rows would be merged, and hide a wrong order."""
    from prefixmem_fast.addressing.addresses import cut_prefix
    from prefixmem_fast.kernels import sorted_codes
    from prefixmem_fast.operation import cpu

    spec = AddressSpec((largest,) * 4, table_rows=7, addressing="hash")
    codes = torch.randint(0, 3, (200, 4)) * (largest // 3)
    codes[::7, 2] = -1
    cut, _ = cut_prefix(codes, spec)
    expected = torch.from_numpy(np.lexsort(cut.numpy().T[::-1]))
    assert torch.equal(cpu._argsort_prefixes(cut, spec), expected)
    found = sorted_codes.sort_prefixes(codes, None, spec, sorted_codes.sort_plan_of(spec), None)
    assert torch.equal(found.sids.long(), expected)
    in_order = cut[expected]
    for i in range(1, 200):
        differing = (in_order[i] != in_order[i - 1]).nonzero().flatten()
        assert found.differs[i] == (differing[0] + 1 if len(differing) else 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_no_token_reads_are_not_touched(backend):
    """A SID cut after level 2 where levels 1 and 4 are active: its order 2 has a row, and no token reads it."""
    spec = AddressSpec((4,) * 4, heads=1, table_rows=50, active_levels=(1, 4), addressing="hash")
    table = torch.tensor([[0, 0], *([level, 1] for level in range(1, 5))], dtype=torch.int32)
    weight = torch.randn(spec.total_rows, 2, requires_grad=True)
    for ids, touched in (([1, 2, 0, 0, 0], 1), ([1, 2, 3, 4, 0], 4), ([2, 3, 4, 0, 0], 0)):
        weight.grad = None
        out = token_memory(torch.tensor([ids]), table, weight, spec, backend=backend, grad="sparse")
        out.backward(torch.ones_like(out))
        found = weight.grad.coalesce()
        assert found.values().any(1).sum() == touched
        expected = max(touched, 1) if backend == "triton" else touched  # its fixed entries have to lie somewhere
        assert len(found.indices()[0]) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice(backend):
    spec, codes, weight = case(sids=50)
    found = []
    for _ in range(2):
        weight.grad = None
        prefix_memory(codes.clone(), weight, spec, backend=backend, grad="sparse").sin().sum().backward()
        found.append(weight.grad.coalesce())
    assert torch.equal(found[0].indices(), found[1].indices())
    assert torch.equal(found[0].values(), found[1].values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_summed_in_float32(backend):
    """1 + 300 x 2^-9 survives; a bfloat16 running sum would stay at 1."""
    spec = AddressSpec((1,), heads=1, max_order=1, table_rows=1)
    weight = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    out = prefix_memory(torch.zeros(301, 1, dtype=torch.int64), weight, spec, backend=backend, grad="sparse")
    grad = torch.full_like(out, 2**-9)
    grad[0] = 1
    out.backward(grad)
    assert abs(weight.grad.to_dense().item() - (1 + 300 * 2**-9)) <= 2**-7 * 1.6


@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_accumulates_over_micro_batches(backend):
    spec, codes, weight = case()
    expected = weight.detach().clone().requires_grad_()
    for part in codes.split(9):
        prefix_memory(part, weight, spec, backend=backend, grad="sparse").sin().sum().backward()
        prefix_memory(part, expected, spec, backend="reference").sin().sum().backward()
    torch.testing.assert_close(weight.grad.to_dense(), expected.grad)
    dense_optimizer, optimizer = torch.optim.SGD([expected], lr=0.5), optim.SGD([weight], lr=0.5)
    dense_optimizer.step()
    optimizer.step()
    torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize("torch_optimizer", [torch.optim.SparseAdam, torch.optim.SGD])
@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_optimizers_take_it(torch_optimizer, backend):
    spec, codes, weight = case()
    untouched = torch.ones(spec.total_rows, dtype=torch.bool)
    untouched[reference.prefix_rows(codes, spec)[:, [0, 2, 3]].clamp(min=0).unique()] = False
    before = weight.detach().clone()
    prefix_memory(codes, weight, spec, backend=backend, grad="sparse").sin().sum().backward()
    torch_optimizer([weight], lr=0.1).step()
    changed = (weight != before).any(1)
    assert changed.any()
    assert not changed[untouched].any()


def fused(weight, spec, codes, backend="cpu"):
    return prefix_memory(codes, weight, spec, backend=backend, grad="fused").sin().sum()


def test_fused_refuses_accumulation():
    spec, codes, weight = case()
    optimizer = optim.SGD([weight], lr=0.1)
    fused(weight, spec, codes).backward()
    after = weight.detach().clone()
    with pytest.raises(RuntimeError, match=r'accumulated over backward passes.*use grad="sparse"'):
        fused(weight, spec, codes).backward()
    assert torch.equal(weight, after), "the second micro-batch changed nothing"
    for end_step in (optimizer.step, optimizer.zero_grad, lambda: optimizer.zero_grad(set_to_none=False)):
        end_step()
        fused(weight, spec, codes).backward()


def test_fused_refuses_clipping_and_scaling():
    spec, codes, weight = case()
    optim_ = optim.SGD([weight], lr=0.1)
    fused(weight, spec, codes).backward()
    assert "spent" in repr(weight.grad)
    for call in (
        lambda: torch.nn.utils.clip_grad_norm_([weight], 0.01),
        lambda: torch.nn.utils.clip_grad_value_([weight], 1.0),
        lambda: optim.clip_grad_norm_([weight], 0.01),
        lambda: weight.grad.abs(),
        lambda: torch.linalg.vector_norm(weight.grad, 1),
    ):
        with pytest.raises(RuntimeError, match='use grad="sparse"'):
            call()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match='use grad="sparse"'):
        scaler.unscale_(optim_)
    optim_.zero_grad()
    before = weight.detach().clone()
    with torch.autocast("cpu", torch.float16), pytest.raises(RuntimeError, match="GradScaler"):
        fused(weight, spec, codes)
    assert torch.equal(weight, before)


def test_both_differentiate_once():
    spec, codes, weight = case()
    optimizer = optim.SGD([weight], lr=0.1)
    before = weight.detach().clone()
    for grad in ("sparse", "fused"):
        out = prefix_memory(codes, weight, spec, grad=grad).sin().sum()
        with pytest.raises(RuntimeError, match='differentiates once; use grad="dense"'):
            torch.autograd.grad(out, weight, create_graph=True)
    assert torch.equal(weight, before)
    del optimizer


def test_fused_needs_an_optimizer():
    spec, codes, weight = case()
    with pytest.raises(RuntimeError, match="found no optimizer for the table"):
        fused(weight, spec, codes)
    optimizer = optim.SGD([weight], lr=0.1)
    with pytest.raises(RuntimeError, match="weight was computed from one"):
        fused(weight * 2, spec, codes)
    with torch.no_grad():
        prefix_memory(codes, weight * 2, spec, grad="fused")
    del optimizer
    with pytest.raises(RuntimeError, match="found no optimizer"):
        fused(weight, spec, codes)


def test_copies_and_pickles_are_bound_to_no_optimizer():
    spec, codes, weight = case()
    optimizer = optim.SGD([weight], lr=0.1)
    stream = io.BytesIO()
    torch.save(weight, stream)
    stream.seek(0)
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), torch.load(stream, weights_only=False)):
        assert torch.equal(other, weight)
        with pytest.raises(RuntimeError, match="found no optimizer"):
            fused(other, spec, codes)
    fused(weight, spec, codes).backward()
    optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_fused_update_is_seen_by_saved_tensors(backend):
    """The update counts as an in-place change: what saved the table for its own backward pass says so."""
    spec, codes, weight = case()
    optimizer = optim.SGD([weight], lr=0.1)
    penalty = weight.square().sum()
    fused(weight, spec, codes, backend).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()
    del optimizer


@pytest.mark.parametrize("grad", ["sparse", "fused"])
def test_under_checkpointing_and_compile(grad):
    spec, codes, weight = case()
    other = torch.nn.Parameter(weight.detach().clone())
    optimizers = [optim.SGD([w], lr=0.1) for w in (weight, other)]
    checkpoint(lambda w: prefix_memory(codes, w, spec, grad=grad).sin(), weight, use_reentrant=False).sum().backward()
    step = torch.compile(lambda w: prefix_memory(codes * 1, w, spec, grad=grad).sin().sum())
    step(other).backward()
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(weight, other)


def test_modules_take_the_modes():
    spec = AddressSpec((5, 4, 3), table_rows=7, heads=2)
    config = PrefixMemConfig(spec, memory_dim=8, hidden_size=3, output_init_std=1.0)
    codes = torch.randint(0, 3, (6, 3))
    found = {}
    for grad in ("dense", "sparse", "fused"):
        torch.manual_seed(0)
        encoder = PrefixMem(config, grad=grad)
        optimizer = torch.optim.SGD if grad == "dense" else optim.SGD
        optimizer = optimizer([encoder.memory.weight], lr=0.1)
        encoder(codes).sin().sum().backward()
        optimizer.step()
        found[grad] = encoder.memory.weight
    torch.testing.assert_close(found["sparse"], found["dense"])
    assert torch.equal(found["sparse"], found["fused"])


@pytest.mark.parametrize("grad", ["sparse", "fused"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batches_and_batches_without_a_sid(backend, grad):
    spec, codes, weight = case()
    optimizer = optim.LazyAdam([weight], lr=0.1)
    before = weight.detach().clone()
    for batch in (codes[:0], torch.full_like(codes, -1)):
        prefix_memory(batch, weight, spec, backend=backend, grad=grad).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(weight, before)


def test_fused_refuses_autograd_grad_and_leaves_the_table():
    """It would give None for the gradient, and update the table all the same."""
    spec = AddressSpec((6, 5, 4), table_rows=20, heads=2)
    weight = torch.nn.Parameter(torch.randn(spec.total_rows, 3))
    before = weight.detach().clone()
    optimizer = optim.SGD([weight], 0.1)
    batch = torch.randint(0, 4, (9, 3))
    with pytest.raises(RuntimeError, match=r"torch.autograd.grad would get no gradient of it; use"):
        torch.autograd.grad(prefix_memory(batch, weight, spec, grad="fused").sum(), weight)
    assert torch.equal(weight, before)
    prefix_memory(batch, weight, spec, grad="fused").sum().backward(inputs=[weight])
    optimizer.step()
    assert not torch.equal(weight, before)


@pytest.mark.parametrize("grad", ["dense", "sparse", "fused"])
def test_torchs_deterministic_mode_without_its_fill(grad, monkeypatch):
    """What the documents advise: memory that nobody filled, and the bits are those of filled memory."""

    def step():
        spec, codes, _ = case()
        weight = torch.nn.Parameter(torch.linspace(-1, 1, spec.total_rows * 5).view(-1, 5))
        optimizer = optim.SGD([weight], lr=0.1)
        out = prefix_memory(codes, weight, spec, backend="triton", grad=grad)
        out.backward(out.detach().sin())
        if grad == "dense":
            return weight.grad
        optimizer.step()
        return weight.detach()

    torch.use_deterministic_algorithms(True)
    torch.manual_seed(1)
    expected = step()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.manual_seed(1)
    assert torch.equal(step(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_has_a_norm_of_zero(backend):
    spec, codes, weight = case()
    optimizer = optim.SGD([weight], lr=0.1)
    out = prefix_memory(codes[:0], weight, spec, backend=backend, grad="fused")
    out.sum().backward()
    assert torch.linalg.vector_norm(weight.grad) == 0
    optimizer.step()


def test_more_orders_than_a_byte_counts():
    spec = AddressSpec((2,) * 130, max_order=130, heads=1, table_rows=50, mode="full", active_levels=(130,))
    codes = torch.randint(0, 2, (3, 130))[[0, 1, 0, 2, 1, 0]]
    weight = torch.randn(spec.total_rows, 2, requires_grad=True)
    out = prefix_memory(codes, weight, spec, backend="triton", deterministic=True)
    grad = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, weight, grad)
    assert_exact_sums(found, lambda g: reference.dense_gradient(g, codes, spec), grad)


@pytest.mark.parametrize("grad", ["sparse", "fused"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["negative", "zero"])
def test_gradients_that_torch_keeps_apart_from_their_memory(backend, grad, kind):
    """A sign that is a bit of the tensor, and zeros without memory."""
    spec = AddressSpec((8,) * 2, table_rows=9)
    codes = torch.arange(6).view(3, 2)
    ones = torch.ones(3, len(spec.active_levels), spec.heads * 4)
    pairs = {"negative": (-ones, torch._neg_view(ones)), "zero": (0 * ones, torch._efficientzerotensor(ones.shape))}
    changes = []
    for gradient in pairs[kind]:
        weight = torch.nn.Parameter(torch.ones(spec.total_rows, 4))
        optimizer = optim.SGD([weight], lr=1.0)
        prefix_memory(codes, weight, spec, backend=backend, grad=grad).backward(gradient)
        optimizer.step()
        changes.append(weight.detach() - 1)
    assert torch.equal(*changes)
    assert bool(changes[0].any()) == (kind == "negative")
