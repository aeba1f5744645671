"""The C++ kernels against the reference and the oracle: any spec, any batch, any number of threads."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from prefixmem_fast import AddressSpec, DecodingState, PrefixMem, PrefixMemConfig, SIDVocabulary, optim, prefix_memory
from prefixmem_fast._choices import QUANTIZATIONS
from prefixmem_fast._dtypes import SUM_DTYPES
from prefixmem_fast.addressing import TokenStream
from prefixmem_fast.checks import oracle
from prefixmem_fast.operation import native, reference
from prefixmem_fast.operation.interface import QuantizedTable
from prefixmem_fast.operation.quantization import quantize
from tests.helpers.cases import FLOATS, MODES, assert_row_sums, token_case
from tests.helpers.strategies import codes_for, specs

THREADS = (1, 2, 5)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@given(specs(largest_code=3_000_000_000), st.sampled_from((1, 3, 64)), st.sampled_from(FLOATS), st.data())
@settings(max_examples=600)
def test_any_spec(spec, width, dtype, data):
    codes = data.draw(codes_for(spec))
    weight = torch.randn(spec.total_rows, width).to(dtype)
    assert torch.equal(native.prefix_rows(codes, spec), reference.prefix_rows(codes, spec))
    out = native.forward(codes, weight, spec)
    assert torch.equal(out, reference.forward(codes, weight, spec))
    assert_row_sums(native, torch.randn(out.shape).to(dtype), codes, spec)


def test_an_exact_order_after_a_hashed_one():
    """Its index counts the codes of hashed orders too."""
    spec = AddressSpec((3, 4, 2), max_order=3, heads=2, table_rows=(3, 5, 64), active_levels=(1, 2, 3))
    assert spec.exact_orders == (1, 3)
    codes = torch.cartesian_prod(*map(torch.arange, spec.codebook_sizes))
    weight = torch.randn(spec.total_rows, 3)
    out = native.forward(codes, weight, spec)
    assert torch.equal(out, reference.forward(codes, weight, spec))
    assert_row_sums(native, torch.randn_like(out), codes, spec)


@given(specs(), st.data())
@settings(max_examples=200)
def test_rows_are_those_of_the_oracle(spec, data):
    codes = data.draw(codes_for(spec, max_sids=8))
    narrow = codes.clamp(-1, 2**15 - 1).to(torch.int16)
    for given_codes in (codes, codes.clamp(-1, 2**31 - 1).int(), narrow):
        expected = torch.from_numpy(oracle.prefix_rows(given_codes.numpy(), spec.to_dict()))
        assert torch.equal(native.prefix_rows(given_codes, spec), expected)


@given(specs(), st.integers(0, 10**6), st.booleans())
@settings(max_examples=200)
def test_any_token_stream(spec, seed, packed):
    ids, table = token_case(spec, (2, 29), seed)
    segments = torch.arange(29).expand(2, 29).div(7, rounding_mode="floor") if packed else None
    weight = torch.randn(spec.total_rows, 5)
    stream = TokenStream(ids if seed % 2 else ids.int(), table, segments)
    out = native.forward(stream, weight, spec)
    assert torch.equal(out, reference.forward(stream, weight, spec))
    assert_row_sums(native, torch.randn_like(out), stream, spec)


# Tables of 8 bits a number


def assert_same_windows(ids, token_table, table, spec, dtype):
    """The windows of each length that end in a token, as parts of a larger tensor; every element is written."""
    width = (table.values if isinstance(table, QuantizedTable) else table).shape[1] * spec.heads
    for end in range(1, ids.shape[1] + 1):
        for windows in (ids[:, :end], ids[:, max(end - 3, 0) : end]):
            found, expected = (torch.full((len(ids), width), torch.nan, dtype=dtype) for _ in range(2))
            native.read_windows(windows, token_table, table, spec, found)
            reference.read_windows(windows, token_table, table, spec, expected)
            assert torch.equal(found, expected)


@given(specs(), st.sampled_from((1, 3, 64)), st.sampled_from(QUANTIZATIONS), st.sampled_from(SUM_DTYPES), st.data())
@settings(max_examples=200)
def test_any_quantized_table(spec, width, kind, dtype, data):
    """Codes, tokens and windows, and what is not contiguous."""
    codes, seed = data.draw(codes_for(spec)), data.draw(st.integers(0, 10**6))
    ids, token_table = token_case(spec, (3, 11), seed)
    ids = ids if seed % 2 else ids.int()
    table = quantize(torch.randn(spec.total_rows, width), kind)
    if seed % 3 == 0:
        table = QuantizedTable(table.values.t().contiguous().t(), table.scales[:1].expand(len(table.scales)))
    for source in (codes, TokenStream(ids, token_table, None)):
        S = native.quantized_forward(source, table, spec, dtype)
        assert S.dtype == dtype
        assert torch.equal(S, reference.quantized_forward(source, table, spec, dtype))
    assert_same_windows(ids, token_table, table, spec, dtype)


@pytest.mark.parametrize(("mode", "dtype"), list(zip(MODES, SUM_DTYPES, strict=True)))
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_quantized_table_by_any_threads(kind, mode, dtype):
    """Of a size that threads share, with a result in kept memory."""
    spec = AddressSpec((300,) * 4, max_order=3, heads=3, table_rows=400, mode=mode, active_levels=(1, 3, 4))
    codes, (ids, token_table) = torch.randint(-20, 320, (3000, 4)), token_case(spec, (700, 4))
    table = quantize(torch.randn(spec.total_rows, 64), kind)
    sources = codes, TokenStream(ids, token_table, None)
    expected = [reference.quantized_forward(source, table, spec, dtype) for source in sources]
    for count in THREADS:
        torch.set_num_threads(count)
        for source, S in zip(sources, expected, strict=True):
            assert torch.equal(native.quantized_forward(source, table, spec, dtype), S)
        assert_same_windows(ids, token_table, table, spec, dtype)


KINDS = {
    "distinct prefixes": lambda: torch.randint(0, 300, (3000, 4)),
    "few prefixes": lambda: torch.randint(0, 3, (3000, 4)),
    "one SID": lambda: torch.tensor([[4, 3, 2, 1]]).expand(3000, 4).clone(),
    "half one SID": lambda: torch.where(torch.arange(3000)[:, None] % 2 == 0, 7, torch.randint(0, 300, (3000, 4))),
    "one first code": lambda: torch.cat([torch.full((3000, 1), 5), torch.randint(0, 300, (3000, 3))], 1),
    "ended prefixes": lambda: torch.randint(-60, 330, (3000, 4)),
    "as many as blocks hold": lambda: torch.randint(0, 40, (2560, 4)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_and_threads(kind, mode):
    """Prefixes that begin, end and go on at the edges of blocks, rows that many share: the same bits by any threads."""
    spec = AddressSpec((300,) * 4, max_order=3, heads=2, table_rows=400, mode=mode, active_levels=(1, 3, 4))
    codes = KINDS[kind]()
    weight = torch.randn(spec.total_rows, 6)
    grad = torch.randn(len(codes), 3, 12)
    found = []
    for count in THREADS:
        torch.set_num_threads(count)
        assert torch.equal(native.forward(codes, weight, spec), reference.forward(codes, weight, spec))
        found.append(native.row_sums(grad, codes, spec, torch.float32))
    assert all(torch.equal(found[0].sums, other.sums) for other in found)
    assert_row_sums(native, grad, codes, spec)


def test_keys_of_many_digits():
    """36 bits are sorted in four passes. All orders are exact, so a prefix sorted apart would be there twice."""
    spec = AddressSpec((2,) * 18, max_order=18, heads=1, table_rows=1 << 18, active_levels=(18,))
    codes = torch.randint(0, 2, (200, 18))
    assert spec.exact_orders == tuple(range(1, 19))
    assert_row_sums(native, torch.randn(200, 1, 2), codes, spec)


@pytest.mark.parametrize("count", THREADS)
def test_long_token_streams(count):
    """Chunks of SIDs between long texts, text before the first and after the last, rows of text alone."""
    torch.set_num_threads(count)
    spec = AddressSpec((50, 50, 50), heads=2, table_rows=300, active_levels=(2, 3))
    ids, table = token_case(spec, (40, 150), 3)
    ids[:, 70:100] = ids[0, :30] = ids[-1] = -1
    weight = torch.randn(spec.total_rows, 3)
    stream = TokenStream(ids, table, None)
    out = native.forward(stream, weight, spec)
    assert torch.equal(out, reference.forward(stream, weight, spec))
    assert_row_sums(native, torch.randn_like(out), stream, spec)


@pytest.mark.parametrize("make", [optim.SGD, optim.RowWiseAdagrad, optim.RowWiseAdam, optim.LazyAdam])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_same_update_by_any_threads(make, dtype):
    spec = AddressSpec((300,) * 3, heads=2, table_rows=500)
    batches = [torch.randint(0, 300, (2600, 3)) for _ in range(3)]
    start = torch.randn(spec.total_rows, 8).to(dtype)
    tables = []
    for count in THREADS:
        torch.set_num_threads(count)
        weight = torch.nn.Parameter(start.clone())
        optimizer = make([weight], lr=0.1, weight_decay=0.01)
        for codes in batches:
            prefix_memory(codes, weight, spec, grad="fused", backend="native").float().square().sum().backward()
            optimizer.step()
        tables.append(weight.detach())
    assert not torch.equal(tables[0], start)
    assert all(torch.equal(tables[0], other) for other in tables)


def test_state_of_another_dtype_is_left_to_pytorch():
    """A table that became float64 after its state was made in float32: it says so, and nothing is written past it."""
    spec = AddressSpec((9, 9), heads=2, table_rows=30)
    weight = torch.nn.Parameter(torch.randn(spec.total_rows, 4))
    optimizer = optim.RowWiseAdagrad([weight], lr=0.1)
    prefix_memory(torch.randint(0, 9, (20, 2)), weight, spec, grad="fused", backend="native").sum().backward()
    optimizer.step()
    weight.data = weight.data.double()
    with pytest.raises(RuntimeError, match="same dtype"):
        prefix_memory(torch.randint(0, 9, (20, 2)), weight, spec, grad="fused", backend="native").sum().backward()


SMALL = AddressSpec((9, 9), heads=2, table_rows=30)


def fused_step(weight, optimizer):
    prefix_memory(torch.randint(0, 9, (20, 2)), weight, SMALL, grad="fused", backend="native").sum().backward()
    optimizer.step()


@pytest.mark.parametrize("fault", ["state", "table", "moved state"])
def test_what_does_not_fit_is_refused_and_not_written_past(fault):
    """A state of fewer rows, a table that is taken away before the backward pass, a state on another device."""
    weight = torch.nn.Parameter(torch.randn(SMALL.total_rows, 4))
    optimizer = optim.RowWiseAdagrad([weight], lr=0.1)
    fused_step(weight, optimizer)
    if fault == "state":
        optimizer.state[weight]["sum"] = torch.zeros(3)
    elif fault == "moved state":
        optimizer.state[weight]["sum"] = optimizer.state[weight]["sum"].to("meta")
    S = prefix_memory(torch.randint(0, 9, (20, 2)), weight, SMALL, grad="fused", backend="native")
    if fault == "table":
        weight.data = torch.empty(0, 4)
    with pytest.raises((RuntimeError, IndexError)):
        S.sum().backward()


def test_a_sparse_gradient_of_rows_that_are_not_there():
    weight = torch.nn.Parameter(torch.randn(SMALL.total_rows, 4))
    optimizer = optim.SGD([weight])
    rows = torch.tensor([[1, SMALL.total_rows]])
    weight.grad = torch.sparse_coo_tensor(rows, torch.ones(2, 4), weight.shape, check_invariants=False)
    before = weight.detach().clone()
    with pytest.raises(IndexError, match="row that the table has not"):
        optimizer.step()
    assert torch.equal(weight.detach(), before)


def test_a_default_device_is_not_that_of_results():
    """Beside a model that is made on another device."""
    weight = torch.nn.Parameter(torch.randn(SMALL.total_rows, 4))
    codes = torch.randint(0, 9, (20, 2))
    with torch.device("meta"):
        S = prefix_memory(codes, weight, SMALL, grad="sparse", backend="native")
        S.backward(S.detach())
    assert torch.equal(S, reference.forward(codes, weight, SMALL))
    assert weight.grad.device.type == "cpu"


def test_tensors_elsewhere_are_refused():
    table = torch.randn(SMALL.total_rows, 4, device="meta")
    with pytest.raises(RuntimeError, match="is on meta"):
        native.forward(torch.zeros(1, 2, dtype=torch.int64), table, SMALL)


def test_a_decoding_state_of_another_dtype_than_the_table():
    encoder = PrefixMem(PrefixMemConfig(SMALL, memory_dim=8, hidden_size=4))
    vocabulary = SIDVocabulary.from_table({i: (1 + i // 9, i % 9) for i in range(18)}, (9, 9))
    state = DecodingState(encoder, vocabulary, 5)
    encoder.double()
    for tokens in (torch.arange(5), torch.arange(9, 14)):
        m = state.step(tokens)
    assert m.dtype == torch.float64
    expected = encoder(torch.stack([torch.arange(5), torch.arange(5)], 1))[:, 1]
    torch.testing.assert_close(m, expected, rtol=1e-5, atol=1e-8)


def test_float64_gradients_of_a_table_that_became_half():
    codes, grad = torch.randint(0, 9, (20, 2)), torch.randn(20, 2, 8, dtype=torch.float64)
    found, expected = (backend.row_sums(grad, codes, SMALL, torch.bfloat16) for backend in (native, reference))
    assert torch.equal(found.rows, expected.rows)
    torch.testing.assert_close(found.sums, expected.sums)


@pytest.mark.parametrize("dtype", FLOATS)
def test_extremes_are_rounded_as_torch_rounds(dtype):
    """Ties, subnormal numbers, overflow, infinities, NaN and both zeros, read and written."""
    spec = AddressSpec((3,), heads=1, table_rows=3, addressing="hash")
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    halves = bits.view(dtype) if dtype in (torch.float16, torch.bfloat16) else bits.to(dtype)
    weight = halves.expand(3, -1).contiguous()
    S = native.forward(torch.tensor([[1]]), weight, spec)
    torch.testing.assert_close(S, reference.forward(torch.tensor([[1]]), weight, spec), rtol=0, atol=0, equal_nan=True)
    near = torch.cat([halves.float() * (1 + k * 2**-12) for k in range(-2, 3)] + [torch.randn(999) * 7e4])
    grad = torch.cat([near, -near])[None, None]
    sums = native.row_sums(grad, torch.tensor([[1]]), spec, dtype).sums
    torch.testing.assert_close(sums[0], grad.flatten().to(dtype), rtol=0, atol=0, equal_nan=True)


def test_nan_in_unread_rows_does_not_leak():
    spec = AddressSpec((4, 4), heads=2, table_rows=40)
    codes = torch.tensor([[1, -1], [1, 2], [-1, 0]])
    weight = torch.full((spec.total_rows, 3), torch.nan)
    rows = reference.prefix_rows(codes, spec)
    weight[rows[rows >= 0]] = 1.0
    assert torch.equal(native.forward(codes, weight, spec), reference.forward(codes, weight, spec))


def test_auto_takes_it_on_the_cpu(backend_calls):
    spec = AddressSpec((4, 4), table_rows=40)
    prefix_memory(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(spec.total_rows, 3), spec)
    assert backend_calls == [("native", "forward")]


# Kept memory

LARGE = AddressSpec((64, 64), heads=4, table_rows=5000)
SIDS = 2000  # 2 MB of S


@pytest.fixture
def kept_memory():
    """Results come in kept memory, which torch does not fill for a test."""
    torch.use_deterministic_algorithms(False)
    native._library().keep_at_most(0)
    native._library().keep_at_most(1 << 29)
    return native._library()


def read(seed, weight):
    codes = torch.randint(0, 64, (SIDS, 2), generator=torch.Generator().manual_seed(seed))
    return native.forward(codes, weight, LARGE), reference.forward(codes, weight, LARGE)


def test_a_result_takes_the_memory_of_one_that_is_gone(kept_memory):
    weight = torch.randn(LARGE.total_rows, 32)
    first, expected = read(0, weight)
    second, _ = read(1, weight)
    assert torch.equal(first, expected), "of a result that is there, the memory is not taken"
    assert kept_memory.bytes_kept() == 0
    places = {first.data_ptr(), second.data_ptr()}
    view = first[5:]
    del first, second
    assert kept_memory.bytes_kept() > 0
    third, expected = read(2, weight)
    assert torch.equal(third, expected)
    assert third.data_ptr() in places - {view.data_ptr() - 5 * 2 * 128 * 4}


def test_kept_memory_has_a_limit(kept_memory):
    weight = torch.randn(LARGE.total_rows, 32)
    kept_memory.keep_at_most(3 << 20)
    results = [read(seed, weight)[0] for seed in range(4)]
    del results
    assert kept_memory.bytes_kept() <= 3 << 20


def test_a_result_in_kept_memory_is_an_ordinary_tensor(kept_memory):
    weight = torch.randn(LARGE.total_rows, 32, requires_grad=True)
    S = prefix_memory(torch.randint(0, 64, (SIDS, 2)), weight, LARGE, backend="native")
    assert S.is_contiguous()
    assert S.data_ptr() % 64 == 0
    S.mul_(2).sum().backward()
    assert weight.grad.count_nonzero() > 0
    shared = S.detach().share_memory_()
    assert torch.equal(shared, S)


# Processes and threads


def test_callers_at_the_same_time():
    """Two threads of Python: one has the pool, the other works alone; both are right."""
    torch.set_num_threads(3)
    spec = AddressSpec((300,) * 4, table_rows=5000)
    weight = torch.randn(spec.total_rows, 16)
    batches = [torch.randint(0, 300, (1000, 4)) for _ in range(4)]
    expected = [reference.forward(codes, weight, spec) for codes in batches]
    wrong = []

    def work(i):
        for _ in range(20):
            if not torch.equal(native.forward(batches[i], weight, spec), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_fork_before_the_first_call():
    """The child finds OpenMP in the process, and its threads gone."""
    code = """
import os, torch
from prefixmem_fast import AddressSpec
from prefixmem_fast.operation import native
torch.set_num_threads(2)
(torch.randn(1 << 20) * 2).sum()  # makes OpenMP's threads
spec = AddressSpec((300,) * 4, table_rows=500)
weight, codes = torch.zeros(spec.total_rows, 16), torch.ones(1000, 4, dtype=torch.int64)
child = os.fork()
if child == 0:
    native.forward(codes, weight, spec)
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_fork_has_threads_of_its_own(kept_memory):
    torch.set_num_threads(2)
    spec = AddressSpec((300,) * 4, table_rows=5000)
    weight, codes = torch.randn(spec.total_rows, 16), torch.randint(0, 300, (1000, 4))
    expected = native.forward(codes, weight, spec)
    child = os.fork()
    if child == 0:  # torch's own threads do not survive a fork, so numpy compares
        os._exit(0 if (native.forward(codes, weight, spec).numpy() == expected.numpy()).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(native.forward(codes, weight, spec), expected)


def test_a_tensor_without_memory():
    spec = AddressSpec((8,) * 2, table_rows=9)
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight = torch.nn.Parameter(torch.ones(spec.total_rows, 4))
        with pytest.raises(RuntimeError, match='has no memory, as those of FakeTensorMode have not; backend="cpu"'):
            prefix_memory(torch.ones(3, 2, dtype=torch.int64), weight, spec, grad="sparse", backend="native")
