"""What only a real device can show; parity over random configurations is `prefixmem verify`, which `make gpu` runs."""

import pytest
import torch

from prefixmem_fast import (
    AddressSpec,
    Catalogue,
    DecodingState,
    PrefixMem,
    PrefixMemConfig,
    SIDTrie,
    SIDVocabulary,
    attach,
    optim,
    prefix_memory,
    prefix_rows,
    token_memory,
)
from prefixmem_fast.checks.report import exact_sums
from prefixmem_fast.operation import reference

PAPER = AddressSpec((2048,) * 5, table_rows=200_000, active_levels=(3, 4))


def case(spec=PAPER, sids=10_000, width=64, dtype=torch.bfloat16):
    codes = torch.randint(0, 2048, (sids, spec.levels), device="cuda")
    weight = torch.randn(spec.total_rows, width, device="cuda", dtype=dtype, requires_grad=True)
    return codes, weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_forward_rounds_as_the_reference_does(dtype):
    """Both add the orders in turn in float32 and round once to nearest: equal bit for bit on a device."""
    codes, weight = case(dtype=dtype)
    assert torch.equal(prefix_memory(codes, weight, PAPER), reference.forward(codes, weight, PAPER))


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("hot", [False, True], ids=["uniform", "hot"])
def test_gradient(deterministic, hot):
    codes, weight = case(dtype=torch.float32)
    if hot:
        codes[::2] = codes[0]
    out = prefix_memory(codes, weight, PAPER, deterministic=deterministic)
    grad = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, weight, grad)
    exact, bound = exact_sums(lambda g: reference.dense_gradient(g, codes, PAPER), grad)
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
        assert torch.equal(out, reference.forward(codes, weight, PAPER))
        assert torch.equal(found, reference.dense_gradient(grad, codes, PAPER)), "sums of ones are exact"


OPTIMIZERS = [optim.SGD, optim.RowWiseAdagrad, optim.RowWiseAdam, optim.LazyAdam]


def steps(weight, batches, optimizer, grad, backend):
    for codes in batches:
        prefix_memory(codes, weight, PAPER, grad=grad, backend=backend).float().sin().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("grad", ["sparse", "fused"])
@pytest.mark.parametrize("hot", [False, True], ids=["uniform", "hot"])
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_optimizers(make, hot, grad):
    """Three steps against the definition in PyTorch on the same device."""
    codes, weight = case(dtype=torch.float32, sids=20_000)
    batches = [codes, codes.roll(1, 1), codes.flip(1)]
    if hot:
        for batch in batches:
            batch[::2] = batch[0]
    found = []
    for backend in ("triton", "reference"):
        table = torch.nn.Parameter(weight.detach().clone())
        steps(table, batches, make([table], lr=0.01, weight_decay=0.1), grad, backend)
        found.append(table.detach())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_bfloat16_updates_repeat_their_bits(make):
    codes, weight = case(sids=50_000)
    codes[::3] = codes[0]
    found = []
    for seed in (1, 1, 2):
        table = torch.nn.Parameter(weight.detach().clone())
        steps(table, [codes, codes.flip(0)], make([table], lr=0.01, seed=seed), "fused", "triton")
        found.append(table.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_random_bits_are_those_of_the_definition():
    """bfloat16 on the device and in PyTorch: gradients of small integers, so that sums are exact in any order."""
    codes, weight = case(sids=3_000)
    found = []
    for backend in ("triton", "reference"):
        table = torch.nn.Parameter(weight.detach().clone())
        optimizer = optim.SGD([table], lr=0.125, seed=5)
        out = prefix_memory(codes, table, PAPER, grad="fused", backend=backend)
        out.backward(torch.arange(out.numel(), device="cuda").remainder(5).view_as(out).to(out))
        optimizer.step()
        found.append(table.detach())
    assert torch.equal(*found)


def test_fused_step_in_a_cuda_graph():
    """Captured once, replayed on other codes with another learning rate: the steps of the eager loop."""
    codes, weight = case(sids=512, dtype=torch.float32)
    batches = [torch.randint(0, 2048, codes.shape, device="cuda") for _ in range(3)]
    rates = (0.1, 0.05, 0.2)
    grad = torch.randn(512, 2, 256, device="cuda")
    table = torch.nn.Parameter(weight.detach().clone())
    rate = torch.tensor(0.0, device="cuda")
    optimizer = optim.LazyAdam([table], lr=rate)

    def step():
        prefix_memory(codes, table, PAPER, grad="fused").backward(grad)
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    table.data.copy_(weight.detach())
    for state in optimizer.state[table].values():
        state.zero_()
    for batch, value in zip(batches, rates, strict=True):
        codes.copy_(batch)
        rate.fill_(value)
        graph.replay()

    expected = torch.nn.Parameter(weight.detach().clone())
    optimizer = optim.LazyAdam([expected], lr=0.0)
    for batch, value in zip(batches, rates, strict=True):
        optimizer.param_groups[0]["lr"] = value
        prefix_memory(batch, expected, PAPER, grad="fused").backward(grad)
        optimizer.step()
    torch.testing.assert_close(table, expected)


def test_fused_training_of_a_table_past_2_31_elements():
    spec = AddressSpec((2048,) * 5, table_rows=2_500_000, addressing="hash", active_levels=(3, 4))
    codes, weight = case(spec)
    weight = torch.nn.Parameter(weight.detach())
    rows = prefix_rows(codes, spec)[:, 3].flatten().unique()
    before = weight[rows].detach()
    assert rows.max() * 64 > 1 << 31
    optimizer = optim.RowWiseAdagrad([weight], lr=0.5)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    prefix_memory(codes, weight, spec, grad="fused").float().sum().backward()
    optimizer.step()
    assert (weight[rows] != before).any(1).all()
    state = spec.total_rows * 4
    assert torch.cuda.max_memory_allocated() - held - state <= 3 * len(rows) * 64 * 4 + (64 << 20)


def test_no_host_synchronisation():
    codes, weight = case(sids=500)
    table = torch.zeros(2048 * 5 + 1, 2, dtype=torch.int32, device="cuda")
    table[1:, 0] = torch.arange(5, device="cuda").repeat_interleave(2048) + 1
    table[1:, 1] = torch.arange(2048, device="cuda").repeat(5)
    ids = (1 + codes + 2048 * torch.arange(5, device="cuda")).reshape(4, -1)

    optimizer = optim.RowWiseAdam([weight], lr=0.1)

    def run(deterministic):
        prefix_memory(codes, weight, PAPER, deterministic=deterministic).sum().backward()
        token_memory(ids, table, weight, PAPER, deterministic=deterministic).sum().backward()
        weight.grad = None
        for grad in ("sparse", "fused"):
            prefix_memory(codes, weight, PAPER, grad=grad).sum().backward()
            optimizer.step()
            weight.grad = None
            token_memory(ids, table, weight, PAPER, grad=grad).sum().backward()
            optimizer.step()
            weight.grad = None

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


def decoding(dtype=torch.bfloat16):
    """An encoder on the device, its vocabulary, and tokens [64, 15] of whole and broken SIDs."""
    encoder = PrefixMem(PrefixMemConfig(PAPER, 256, 512), device="cuda", dtype=dtype)
    tokens = {5 + l * 2048 + c: (l + 1, c) for l in range(5) for c in range(2048)}
    vocabulary = SIDVocabulary.from_table(tokens, (2048,) * 5)
    ids = torch.randint(0, 2048, (64, 3, 5), device="cuda") + 5 + 2048 * torch.arange(5, device="cuda")
    ids[::4, 1, 2] = 0
    return encoder, vocabulary, ids.flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoding_steps(dtype):
    encoder, vocabulary, ids = decoding(dtype)
    whole = encoder.memory.read_tokens(ids, vocabulary)
    state = DecodingState(encoder, vocabulary, len(ids))
    state.prefill(ids[:, :4])
    for t in range(4, ids.shape[1]):
        state.step(ids[:, t])
        assert torch.equal(encoder.memory.read_window(state.tokens, vocabulary), whole[:, t])


def test_a_decoding_step_in_a_cuda_graph():
    encoder, vocabulary, ids = decoding()
    whole = encoder.encode_tokens(ids, vocabulary)
    state, token = DecodingState(encoder, vocabulary, len(ids)), ids[:, 0].clone()
    state.step(token)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        m = state.step(token)
    state.prefill(ids[:, :1])
    for t in range(1, ids.shape[1]):
        token.copy_(ids[:, t])
        graph.replay()
        torch.testing.assert_close(m, whole[:, t], rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_window_allocates_nothing_and_waits_for_nothing(dtype):
    encoder, vocabulary, ids = decoding(dtype)
    whole = encoder.encode_tokens(ids, vocabulary)
    windows = ids[:, :4].clone()
    out, workspace = (
        torch.empty(len(ids), 512, device="cuda", dtype=dtype),
        torch.empty(len(ids), 256, device="cuda", dtype=dtype),
    )
    encoder.encode_window(windows, vocabulary, out=out, workspace=workspace)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        encoder.encode_window(windows, vocabulary, out=out, workspace=workspace)
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = torch.cuda.memory_stats()["allocation.all.allocated"]
        encoder.encode_window(windows, vocabulary, out=out, workspace=workspace)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == made
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for t in range(4, ids.shape[1] + 1):
        windows.copy_(ids[:, t - 4 : t])
        graph.replay()
        expected = encoder.encode_window(windows, vocabulary)
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=1e-4)
        if t >= 5:
            torch.testing.assert_close(out, whole[:, t - 1], rtol=2e-2, atol=1e-4)


def test_generation_on_the_device():
    """Cached beam search is recomputation, with the kernels behind the hooks; static shapes and a trie too."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from prefixmem_fast import generate_items
    from tests.helpers import models

    model = attach(models.tiny_model().cuda(), models.encoder().cuda(), models.vocabulary())
    inputs = {name: value.cuda() for name, value in models.prompts().items()}
    options = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 7}
    expected = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(model.generate(**inputs, **options), expected)
    static = model.generate(**inputs, max_new_tokens=7, cache_implementation="static")
    assert torch.equal(static, model.generate(**inputs, max_new_tokens=7, use_cache=False))
    catalogue = Catalogue(["a", "b", "c"], torch.tensor([[1, 3, 4], [0, 1, 5], [3, 3, 3]]), models.SIZES)
    found = generate_items(model, SIDTrie(catalogue, models.vocabulary()), inputs, num_beams=2)
    assert all(len(row[0]) == 1 for row in found.items)
