"""No kernel loads what a warp or a program beside it stores; and the audit that says so finds what it should."""

import pytest
import torch
import triton
import triton.language as tl

from prefixmem_fast import AddressSpec, optim
from prefixmem_fast.addressing import TokenStream
from prefixmem_fast.checks.aliases import audited
from prefixmem_fast.kernels import sorted_backward
from prefixmem_fast.operation import triton as backend
from prefixmem_fast.operation.quantization import quantize
from tests.helpers.cases import mostly_slow, token_case


def case(mode="prefix", width=20, sids=24):
    spec = AddressSpec((6, 30, 9, 4), max_order=4, heads=3, table_rows=500, mode=mode, addressing="hash")
    codes = torch.randint(0, 6, (sids, 4)) % torch.tensor(spec.codebook_sizes)
    weight = torch.nn.Parameter(torch.randn(spec.total_rows, width))
    return spec, codes, weight


def every_function(mode, width=20):
    """All that the backend launches, over codes and over a token stream."""
    spec, codes, weight = case(mode, width)
    stream = TokenStream(*token_case(spec, (2, 19)), None)
    backend.prefix_rows(codes, spec)
    for source in (codes, stream):
        grad = torch.randn_like(backend.forward(source, weight.detach(), spec))
        for deterministic in (False, True):
            backend.dense_gradient(grad, source, spec, deterministic)
        backend.row_sums(grad, source, spec, torch.float32)
        for make in (optim.RowWiseAdagrad, optim.RowWiseAdam):
            optimizer = make([weight], lr=0.1)
            update = optimizer.begin(weight)
            update.squares = []
            backend.fused_update(grad, source, spec, update)
            optimizer.release()
    optimizer = optim.RowWiseAdam([weight], lr=0.1)
    sparse = torch.sparse_coo_tensor(torch.randint(0, 9, (1, 50)), torch.randn(50, width), weight.shape)
    backend.sparse_update(sparse, optimizer.begin(weight))
    optimizer.release()
    quantized = quantize(weight.detach(), "int8"), spec, torch.float32
    for source in (codes, stream):
        backend.quantized_forward(source, *quantized)
    out = torch.empty(2, 3 * width)
    backend.read_windows(stream.input_ids[:, :7], stream.token_table, weight.detach(), spec, out)
    backend.read_windows(stream.input_ids[:, :7], stream.token_table, quantized[0], spec, out)


KERNELS = {
    "prefix_rows_kernel",
    "prefix_memory_fwd_kernel",
    "token_memory_fwd_kernel",
    "prefix_memory_bwd_kernel",
    "token_memory_bwd_kernel",
    "token_codes_kernel",
    "window_memory_kernel",
    "sum_rows_kernel",
}
SORTING = {"pack_codes_kernel", "prefixes_kernel", "mark_sorted_kernel", "sum_prefixes_kernel", "sum_edges_kernel"}
CLAIMING = {"mark_claims_kernel", "merge_rows_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "crowded"),
    mostly_slow(lambda mode, crowded: mode == "prefix" and not crowded, ["prefix", "suffix", "full"], [False, True]),
)
def test_no_kernel_has_a_hazard(mode, crowded, monkeypatch):
    monkeypatch.setattr(sorted_backward, "crowded", lambda most, plan, spec: crowded)
    with audited() as audit:
        every_function(mode)
    assert not audit.hazards
    expected = KERNELS | (SORTING if mode != "suffix" else set())
    assert audit.kernels == expected | (CLAIMING if mode != "suffix" and not crowded else set())


@pytest.mark.slow
def test_rows_wider_than_a_warp():
    """Several warps hold one row, and each has to read it before one writes."""
    with audited() as audit:
        every_function("prefix", width=260)
    assert not audit.hazards


@triton.jit
def shift_kernel(p, BARRIER: tl.constexpr):
    o = tl.program_id(0) * 4 + tl.arange(0, 4)
    b = tl.load(p + o)
    if BARRIER:
        tl.debug_barrier()
    tl.store(p + o + 1, b)


@triton.jit
def count_kernel(p, ATOMIC: tl.constexpr):
    if ATOMIC:
        tl.atomic_add(p, 1)
    else:
        tl.store(p, 1)


def hazards(kernel, grid, argument, **options):
    with audited() as audit:
        kernel[(grid,)](torch.zeros(16, dtype=torch.int32), argument, **options)
    return [hazard.what for hazard in audit.hazards]


def test_each_kind_of_hazard_is_found():
    within = "loads and then stores with no barrier in between"
    across = "has one program load and another store"
    assert hazards(shift_kernel, 1, False) == [within]
    assert hazards(shift_kernel, 1, False, num_warps=1) == []
    assert hazards(shift_kernel, 1, True) == []
    assert hazards(shift_kernel, 2, True) == [across]
    assert hazards(count_kernel, 2, False) == ["has two programs store"]
    assert hazards(count_kernel, 2, True) == []
