"""Tables of 8 bits a number: what quantizing is off by, and every backend against sums in numpy, bit for bit."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixmem_fast import AddressSpec, prefix_memory
from prefixmem_fast._dtypes import QUANTIZED_DTYPES
from prefixmem_fast.addressing import TokenStream
from prefixmem_fast.checks import oracle
from prefixmem_fast.checks.launches import WIDTH, paper_spec
from prefixmem_fast.operation import operators, quantization, reference
from prefixmem_fast.operation.interface import QuantizedTable
from prefixmem_fast.operation.quantization import dequantized, quantize
from prefixmem_fast.operation.quantized import quantized_prefix_memory, quantized_token_memory
from tests.helpers.cases import BACKENDS, MODES, token_case
from tests.helpers.quantized import KINDS, element_bound, sum_error_bound
from tests.helpers.strategies import codes_for, specs

README = Path(__file__).parents[2] / "README.md"
SPEC = AddressSpec((6, 300, 9, 4), max_order=3, heads=3, table_rows=50, active_levels=(1, 3, 4))
SUMS = [torch.float32, torch.bfloat16, torch.float16]


def codes(sids=40):
    return torch.randint(-1, 10, (sids, SPEC.levels))


def table_of(kind, spec=SPEC, width=20):
    return quantize(0.02 * torch.randn(spec.total_rows, width), kind)


def numbers(table):
    return dequantized(table, torch.arange(len(table.scales)))


# Quantizing


@st.composite
def tables(draw):
    """Rows of any magnitude, subnormal ones too, of zeros, and of a few large numbers among small ones."""
    rows, width = draw(st.integers(1, 9)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from(SUMS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    weight = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight *= 2.0 ** torch.randint(-14, 3, (rows, width), generator=generator) if draw(st.booleans()) else 1
    lowest, highest = (-24, 12) if dtype == torch.float16 else (-149, 124)
    weight *= 2.0 ** torch.randint(lowest, highest, (rows, 1), generator=generator).double()
    weight[torch.randint(rows, (), generator=generator)] *= draw(st.sampled_from((0, 1)))
    return weight.to(dtype)


@given(tables(), st.sampled_from(KINDS))
@settings(max_examples=150)
def test_a_number_is_off_by_half_a_step_at_most(weight, kind):
    table = quantize(weight, kind)
    assert table.values.dtype == QUANTIZED_DTYPES[kind]
    assert table.scales.dtype == torch.float32
    error = (numbers(table).double() - weight.double()).abs()
    assert (error <= element_bound(weight, table.scales, kind)).all()
    zero = ~weight.any(1)
    assert not table.scales[zero].any()
    assert not numbers(table)[zero].any()
    assert (table.scales[~zero] >= torch.finfo(torch.float32).tiny).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_is_not_generous(kind):
    """Some number is off by nearly all of it; of e4m3 by 16/17, in the middle between 1 and 1 1/8."""
    weight = torch.randn(200, 64)
    table = quantize(weight, kind)
    share = (numbers(table).double() - weight.double()).abs() / element_bound(weight, table.scales, kind)
    assert share.max() > {"int8": 0.99, "fp8": 0.93}[kind]


def test_values_are_those_of_the_definition():
    weight = torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0], [0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 254.0, 1.0, 3.0, -3.1]])
    table = quantize(weight, "int8")
    assert table.values.tolist() == [[127, 0, 2, -2, -127], [0] * 5, [0, 127, 0, 2, -2]]  # ties to even
    assert table.scales.tolist() == [1.0, 0.0, 2.0]
    table = quantize(torch.tensor([[448.0, 17.0, 19.0, 2.0**-9, 2.0**-10, 3 * 2.0**-10]]), "fp8")
    assert table.scales.tolist() == [1.0]
    assert table.values.float().tolist() == [[448.0, 16.0, 20.0, 2.0**-9, 0.0, 2.0**-8]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_rows_that_are_not_finite_are_refused(kind, bad, monkeypatch):
    weight = torch.randn(50, 4)
    whole = quantize(weight, kind)
    monkeypatch.setattr(quantization, "_CHUNK_BYTES", 7 * 4 * 4)  # chunks of 7 rows
    parts = quantize(weight, kind)
    assert torch.equal(numbers(parts), numbers(whole))
    weight[38, 2] = weight[45, 0] = bad
    with pytest.raises(ValueError, match=r"weight\[38\] holds an infinity or NaN, which has no scale; give rows of"):
        quantize(weight, kind)


def test_what_is_no_table_is_refused():
    with pytest.raises(TypeError, match=r"torch.float64, and quantized tables are read in float32; convert"):
        quantize(torch.zeros(3, 4, dtype=torch.float64), "int8")
    with pytest.raises(TypeError, match=r"weight has dtype torch.int8; allowed are torch.float32"):
        quantize(torch.zeros(3, 4, dtype=torch.int8), "int8")
    with pytest.raises(TypeError, match="weight is a list"):
        quantize([[1.0]], "int8")
    with pytest.raises(ValueError, match=r"weight has shape \(3,\); give \[R, w\]"):
        quantize(torch.zeros(3), "int8")
    with pytest.raises(ValueError, match="kind = 'int4' is unknown; allowed are 'int8', 'fp8'"):
        quantize(torch.zeros(3, 4), "int4")


def test_peak_memory_is_the_two_tables_and_a_little(monkeypatch):
    """No temporary tensor is larger than a chunk of float32."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            result = operator(*args, **(kwargs or {}))
            if not operator.is_view and isinstance(result, torch.Tensor) and result.dtype == torch.float32:
                self.bytes = max(self.bytes, result.nbytes)
            return result

    monkeypatch.setattr(quantization, "_CHUNK_BYTES", 1 << 12)
    weight = torch.randn(3000, 16).bfloat16()
    with Largest() as largest:
        quantize(weight, "int8")
    assert largest.bytes == 3000 * 4, "the scales; a chunk has 4096"


# Sums


def sums_in_numpy(codes, table, spec):
    """float32 sums of float32 products, order by order."""
    rows = oracle.prefix_rows(codes.numpy(), spec.to_dict())  # [M, L, N, H]
    values, scales = table.values.float().numpy(), table.scales.numpy()
    total = np.zeros((*rows.shape[:2], rows.shape[3], values.shape[1]), np.float32)
    for n in range(rows.shape[2]):
        row = rows[:, :, n]
        total += np.where((row >= 0)[..., None], values[row] * scales[row][..., None], np.float32(0))
    return torch.from_numpy(total[:, [level - 1 for level in spec.active_levels]]).flatten(2)


@given(specs(), st.sampled_from((1, 3, 20)), st.sampled_from(KINDS), st.data())
@settings(max_examples=25)
def test_sums_are_those_of_the_definition_bit_for_bit(spec, width, kind, data):
    given_codes = data.draw(codes_for(spec, max_sids=12))
    weight = torch.randn(spec.total_rows, width)
    table = quantize(weight, kind)
    expected = sums_in_numpy(given_codes, table, spec)
    for backend in BACKENDS[:3] if data.draw(st.integers(0, 2)) else BACKENDS:  # the interpreter is slow
        S = quantized_prefix_memory(given_codes, table, spec, backend=backend)
        assert S.dtype == torch.float32
        assert torch.equal(S, expected), backend
    exact = reference.forward(given_codes, weight.double(), spec)
    assert ((S.double() - exact).abs() <= sum_error_bound(given_codes, weight, table, spec, kind)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_float_table(kind, mode, backend):
    """With the segments of packed rows. The float32 table that a quantized one stands for gives the same bits."""
    spec = AddressSpec((6, 300, 9, 4), max_order=3, heads=3, table_rows=50, mode=mode, active_levels=(1, 3, 4))
    ids, token_table = token_case(spec, (2, 47))
    segments = torch.tensor([4, 0, 9, 2, 1]).repeat_interleave(10)[:47].expand_as(ids)
    table = table_of(kind, spec)
    S = quantized_token_memory(ids, token_table, table, spec, segment_ids=segments, backend=backend)
    assert S.abs().sum(-1).count_nonzero() > 20
    assert torch.equal(S, reference.forward(TokenStream(ids, token_table, segments), numbers(table), spec))


@pytest.mark.parametrize("dtype", SUMS[1:], ids=str)
@pytest.mark.parametrize("backend", BACKENDS[:3])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_rounded_once(kind, backend, dtype):
    table, some = table_of(kind), codes()
    wide = quantized_prefix_memory(some, table, SPEC, backend=backend)
    S = quantized_prefix_memory(some, table, SPEC, dtype=dtype, backend=backend)
    assert S.dtype == dtype
    assert torch.equal(S, wide.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_8_bits_is_read_as_it_is(kind, backend):
    """Of e4m3 subnormal ones and zeros of both signs too; with one order nothing is summed."""
    bits = torch.arange(256, dtype=torch.uint8)
    if kind == "fp8":
        bits = bits[(bits & 0x7F) != 0x7F]  # NaN
    values = bits.view(QUANTIZED_DTYPES[kind])[:, None]
    spec = AddressSpec((len(bits),), max_order=1, heads=1, table_rows=len(bits))
    for scale in (1.0, 3.0e-5, 2.0**-126, 2.0**118):
        table = QuantizedTable(values, torch.full((len(bits),), scale))
        S = quantized_prefix_memory(torch.arange(len(bits))[:, None], table, spec, backend=backend)
        exact = values.double() * torch.tensor(scale).double()
        assert torch.equal(S.flatten(), exact.float().flatten())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_not_read_do_not_leak(kind, backend):
    table, some = table_of(kind), torch.tensor([[1, -1, 0, 0], [-1, 0, 0, 0]])
    S = quantized_prefix_memory(some, table, SPEC, backend=backend)
    read = reference.prefix_rows(some, SPEC)
    unread = torch.ones(SPEC.total_rows, dtype=torch.bool)
    unread[read[read >= 0]] = False
    poisoned = QuantizedTable(table.values, table.scales.masked_fill(unread, torch.nan))
    assert torch.equal(quantized_prefix_memory(some, poisoned, SPEC, backend=backend), S)
    assert not S[1].any()


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (2, 1)])
def test_any_leading_shape(shape):
    some = torch.randint(-1, 10, (*shape, SPEC.levels))
    S = quantized_prefix_memory(some, table_of("int8"), SPEC)
    assert S.shape == (*shape, 3, 60)
    ids, token_table = token_case(SPEC, (0, 7))
    assert quantized_token_memory(ids, token_table, table_of("fp8"), SPEC, backend="triton").shape == (0, 7, 60)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_named_backend_runs(backend, backend_calls):
    ids, token_table = token_case(SPEC, (1, 9))
    quantized_prefix_memory(codes(3), table_of("int8"), SPEC, backend=backend)
    quantized_token_memory(ids, token_table, table_of("int8"), SPEC, backend=backend)
    assert backend_calls == [(backend, "quantized_forward")] * 2


# The operators


@pytest.mark.parametrize("kind", KINDS)
def test_operators(kind):
    table = table_of(kind)
    ids, token_table = token_case(SPEC, (2, 9))
    rest = (*table, SPEC.key, torch.bfloat16, "reference")
    for operator, source in (
        (operators.quantized_prefix_memory, (codes(5),)),
        (operators.quantized_token_memory, (ids, token_table, None)),
    ):
        # test_schema multiplies the arguments, and torch multiplies no float8.
        utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(operator, (*source, *rest), test_utils=utils if kind == "int8" else utils[2:3])


def test_there_is_no_gradient():
    table = table_of("int8")
    S = quantized_prefix_memory(codes(), table, SPEC)
    assert not S.requires_grad
    asked = QuantizedTable(table.values, table.scales.clone().requires_grad_())
    with pytest.raises(NotImplementedError, match="scales require a gradient, and a quantized table has none; train,"):
        quantized_prefix_memory(codes(), asked, SPEC)
    with torch.no_grad():
        quantized_prefix_memory(codes(), asked, SPEC)


def test_errors_name_the_argument():
    values, scales = table_of("int8")
    ids, token_table = token_case(SPEC, (2, 9))

    def bad(table, error, message, **options):
        with pytest.raises(error, match=message):
            quantized_prefix_memory(codes(), table, SPEC, **options)
        with pytest.raises(error, match=message):
            quantized_token_memory(ids, token_table, table, SPEC, **options)

    bad(values, TypeError, "table is a Tensor; give the QuantizedTable that quantize returned")
    bad(QuantizedTable(values.float(), scales), TypeError, "values has dtype torch.float32; allowed are torch.int8")
    bad(QuantizedTable(values[:-1], scales), ValueError, rf"values has shape .*needs \[{SPEC.total_rows}, w\]")
    bad(QuantizedTable(values, scales[:-1]), ValueError, rf"give one for each of the {SPEC.total_rows} rows")
    bad(QuantizedTable(values, scales.double()), TypeError, "scales has dtype torch.float64; allowed are torch.float32")
    bad(QuantizedTable(values, scales.to("meta")), ValueError, "values is on cpu, scales is on meta; move them")
    whole = QuantizedTable(values, scales)
    bad(whole, TypeError, "dtype = torch.float64, and S of a quantized table is summed in float32", dtype=torch.float64)
    bad(whole, ValueError, "backend = 'cuda' is unknown", backend="cuda")
    with pytest.raises(ValueError, match=r"codes has shape \(4, 2\)"):
        quantized_prefix_memory(torch.zeros(4, 2, dtype=torch.int64), whole, SPEC)


# The README


def test_bytes_and_errors_in_the_readme():
    """The root mean square of the error of S, over that of S, which is summed in float32."""
    rows = paper_spec().total_rows
    spec = AddressSpec((2048,) * 5, table_rows=20_000, active_levels=(3, 4))
    weight = 0.02 * torch.randn(spec.total_rows, WIDTH)
    some = torch.randint(0, 2048, (500, 5))
    exact = prefix_memory(some, weight.double(), spec)
    read = [quantized_prefix_memory(some, quantize(weight, kind), spec) for kind in KINDS]
    read.append(prefix_memory(some, weight.bfloat16().float(), spec))
    errors = [((S.double() - exact).square().mean() / exact.square().mean()).sqrt().item() for S in read]
    (sentence,) = re.findall(r"`encoder.quantize.*?\.\n", README.read_text(), flags=re.DOTALL)
    sizes = [round(rows * row / 1e9, 2) for row in (WIDTH + 4, 2 * WIDTH)]  # of 8 bits and of bfloat16
    assert [float(size) for size in re.findall(r"([\d.]+) GB", sentence)] == sizes
    shares = [float(f"{100 * error:.2g}") for error in errors]
    assert [float(share) for share in re.findall(r"([\d.]+) %", sentence)] == shares
