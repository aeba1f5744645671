"""What only a real device can show; parity over random configurations is `prefixmem verify`, which `make gpu` runs."""

import pytest
import torch

from prefixmem_fast import AddressSpec, prefix_memory, prefix_rows, reference, token_memory
from prefixmem_fast.verify import exact_sums

PAPER = AddressSpec((2048,) * 5, table_rows=200_000, active_levels=(3, 4))


def case(spec=PAPER, sids=10_000, width=64, dtype=torch.bfloat16):
    codes = torch.randint(0, 2048, (sids, spec.levels), device="cuda")
    weight = torch.randn(spec.total_rows, width, device="cuda", dtype=dtype, requires_grad=True)
    return codes, weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_forward_rounds_as_the_reference_does(dtype):
    """Both add the orders in turn in float32 and round once to nearest: equal bit for bit on a device."""
    codes, weight = case(dtype=dtype)
    assert torch.equal(prefix_memory(codes, weight, PAPER), reference.prefix_memory(codes, weight, PAPER))


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("hot", [False, True], ids=["uniform", "hot"])
def test_gradient(deterministic, hot):
    codes, weight = case(dtype=torch.float32)
    if hot:
        codes[::2] = codes[0]
    out = prefix_memory(codes, weight, PAPER, deterministic=deterministic)
    grad = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, weight, grad)
    exact, bound = exact_sums(lambda g: reference.prefix_memory_backward(g, codes, PAPER), grad)
    assert ((found - exact).abs() <= bound).all()


def test_deterministic_bits():
    codes, weight = case(sids=300_000, dtype=torch.float32)
    codes[::3] = codes[0]
    found = []
    for _ in range(3):
        out = prefix_memory(codes, weight, PAPER, deterministic=True)
        found.append(torch.autograd.grad(out, weight, torch.sin(out.detach() * 100))[0])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_table_past_2_31_elements():
    spec = AddressSpec((2048,) * 5, table_rows=2_500_000, addressing="hash", active_levels=(3, 4))
    assert spec.total_rows * 64 > 1 << 31
    codes, weight = case(spec)
    rows = prefix_rows(codes, spec)[:, 3]
    assert rows.max() * 64 > 1 << 31
    out = prefix_memory(codes, weight, spec)
    with torch.no_grad():
        assert torch.equal(out[:, 1], weight[rows].float().sum(1).to(weight.dtype).flatten(1))
    (grad,) = torch.autograd.grad(out.float().sum(), weight)
    last = rows[:, 3].flatten().unique()
    assert (grad[last].float() >= 1).all(), "rows of order 4 lie past element 2^31 and each was read at level 4"


def test_forward_and_backward_in_a_cuda_graph():
    codes, weight = case(sids=64)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for deterministic in (False, True):
            prefix_memory(codes, weight, PAPER, deterministic=deterministic).sum().backward()
            weight.grad = None
    torch.cuda.current_stream().wait_stream(stream)
    grad = torch.ones(64, 2, 256, device="cuda", dtype=weight.dtype)
    for deterministic in (False, True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = prefix_memory(codes, weight, PAPER, deterministic=deterministic)
            (found,) = torch.autograd.grad(out, weight, grad)
        codes.copy_(torch.randint(0, 2048, codes.shape, device="cuda"))
        graph.replay()
        assert torch.equal(out, reference.prefix_memory(codes, weight, PAPER))
        assert torch.equal(found, reference.prefix_memory_backward(grad, codes, PAPER)), "sums of ones are exact"


def test_no_host_synchronisation():
    codes, weight = case(sids=500)
    table = torch.zeros(2048 * 5 + 1, 2, dtype=torch.int32, device="cuda")
    table[1:, 0] = torch.arange(5, device="cuda").repeat_interleave(2048) + 1
    table[1:, 1] = torch.arange(2048, device="cuda").repeat(5)
    ids = (1 + codes + 2048 * torch.arange(5, device="cuda")).reshape(4, -1)

    def run(deterministic):
        prefix_memory(codes, weight, PAPER, deterministic=deterministic).sum().backward()
        token_memory(ids, table, weight, PAPER, deterministic=deterministic).sum().backward()

    for deterministic in (False, True):
        run(deterministic)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for deterministic in (False, True):
            run(deterministic)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compile_whole_graph():
    codes, weight = case(sids=200)
    compiled = torch.compile(lambda codes: prefix_memory(codes, weight, PAPER).float().tanh().sum(), fullgraph=True)
    found = compiled(codes)
    found.backward()
    torch.testing.assert_close(found, prefix_memory(codes, weight, PAPER).float().tanh().sum())
    assert weight.grad.any()
