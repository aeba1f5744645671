import re

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from prefixmem_fast import AddressSpec, prefix_memory, prefix_rows, token_memory
from prefixmem_fast.operation import operators
from prefixmem_fast.operation.backends import BackendError
from tests.helpers.cases import slow

SPEC = AddressSpec((5, 4, 3), heads=2, max_order=3, table_rows=7, active_levels=(2, 3))
TABLE = torch.tensor([[0, 0], [1, 0], [1, 4], [2, 3], [3, 2]], dtype=torch.int32)
IDS = torch.tensor([[1, 3, 4, 0, 2, 3, 0], [2, 3, 4, 1, 3, 4, 4]])


def codes():
    return torch.tensor([[0, 1, 2], [0, 1, 2], [4, 3, 0], [1, -1, 2]])


def weight(dtype=torch.float32):
    return torch.randn(SPEC.total_rows, 4, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(
    ("backend", "deterministic"),
    [("reference", False), ("cpu", False), ("native", False), slow("triton", False), slow("triton", True)],
)
def test_opcheck(backend, deterministic):
    """Schema, fakes, autograd registration and AOT dispatch of every operator."""
    options = (SPEC.key, backend, deterministic)
    grad = torch.randn(4, 2, 8, requires_grad=True)
    token_grad = torch.randn(2, 7, 8, requires_grad=True)
    torch.library.opcheck(operators.prefix_rows, (codes(), SPEC.key, backend))
    torch.library.opcheck(operators.prefix_memory, (codes(), weight(), *options))
    torch.library.opcheck(operators.prefix_memory_backward, (grad, codes(), *options))
    for segments in (None, torch.zeros_like(IDS)):
        torch.library.opcheck(operators.token_memory, (IDS, TABLE, segments, weight(), *options))
        torch.library.opcheck(operators.token_memory_backward, (token_grad, IDS, TABLE, segments, *options))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_whole_graph(backend):
    w = weight()

    def step(codes, ids):
        out = prefix_memory(codes * 1, w * 2, SPEC).tanh().sum()
        return out + token_memory(ids, TABLE, w, SPEC).square().sum() + prefix_rows(codes, SPEC).sum()

    expected = step(codes(), IDS)
    expected.backward()
    grad, w.grad = w.grad, None
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    found = compiled(codes(), IDS)
    found.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(w.grad, grad)


def test_compile_with_a_dynamic_batch():
    w = weight()
    counter = CompileCounter()
    compiled = torch.compile(lambda codes: prefix_memory(codes, w, SPEC), fullgraph=True, dynamic=True, backend=counter)
    for sids in (11, 13, 17):  # no size of another tensor, or torch ties the two together
        batch = torch.randint(0, 3, (sids, 3))
        assert torch.equal(compiled(batch), prefix_memory(batch, w, SPEC))
    assert counter.frame_count == 1


def test_activation_checkpointing():
    w = weight()
    prefix_memory(codes(), w, SPEC).tanh().sum().backward()
    grad, w.grad = w.grad, None
    checkpoint(lambda w: prefix_memory(codes(), w, SPEC).tanh(), w, use_reentrant=False).sum().backward()
    assert torch.equal(w.grad, grad)


def test_autocast_keeps_the_table_dtype():
    w = weight()
    with torch.autocast("cpu", torch.bfloat16):
        out = prefix_memory(codes(), w, SPEC)
        assert out.dtype == torch.float32
        (out @ torch.randn(8, 3)).sum().backward()
    assert w.grad.dtype == torch.float32
    assert w.grad.any()


def test_double_backward_is_the_forward():
    """The operation is linear in the table, so the derivative of its backward is the operation itself."""
    w = weight(torch.float64)
    grad = torch.randn(4, 2, 8, dtype=torch.float64, requires_grad=True)
    for backend in ("reference", "triton"):
        (first,) = torch.autograd.grad(prefix_memory(codes(), w, SPEC, backend=backend), w, grad, create_graph=True)
        direction = torch.randn_like(first)
        (second,) = torch.autograd.grad(first, grad, direction)
        assert torch.equal(second, prefix_memory(codes(), direction, SPEC))


def test_forward_mode_is_refused():
    """torch's custom operators drop tangents without a word."""
    w = weight().detach()
    message = "forward-mode tangent, and there is no forward mode; differentiate by backward"
    bad(lambda: torch.func.jvp(lambda w: prefix_memory(codes(), w, SPEC), (w,), (w,)), NotImplementedError, message)
    bad(lambda: torch.func.jvp(lambda w: token_memory(IDS, TABLE, w, SPEC), (w,), (w,)), NotImplementedError, message)


def test_operators_take_strided_tensors():
    wide = torch.empty(SPEC.total_rows, 8)[:, ::2].copy_(weight().detach())
    strided = codes().T.contiguous().T
    for backend in ("reference", "triton"):
        found = operators.prefix_memory(strided, wide, SPEC.key, backend, False)
        assert torch.equal(found, prefix_memory(codes(), wide.contiguous(), SPEC))


def test_torch_can_ask_for_determinism(monkeypatch):
    from prefixmem_fast.kernels import sorted_backward

    called = []
    dense = sorted_backward.dense
    monkeypatch.setattr(sorted_backward, "dense", lambda *arguments: called.append(1) or dense(*arguments))
    torch.use_deterministic_algorithms(True)
    prefix_memory(codes(), weight(), SPEC, backend="triton").sum().backward()
    assert called


def test_an_empty_token_table_is_all_text():
    for backend in ("reference", "triton"):
        assert not token_memory(IDS, TABLE[:0], weight(), SPEC, backend=backend).any()


def test_frozen_tables_need_no_gradient():
    out = prefix_memory(codes(), weight().detach(), SPEC)
    assert not out.requires_grad


def bad(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_errors_name_the_argument():
    w = weight()
    bad(lambda: prefix_memory(codes()[:, :2], w, SPEC), ValueError, r"codes has shape \(4, 2\).*3 levels")
    bad(lambda: prefix_memory(torch.tensor(3), w, SPEC), ValueError, "codes has shape")
    bad(lambda: prefix_memory(codes().float(), w, SPEC), TypeError, "codes has dtype torch.float32; allowed")
    bad(lambda: prefix_memory([[0, 1, 2]], w, SPEC), TypeError, "codes is a list")
    bad(lambda: prefix_memory(codes(), w[:-1], SPEC), ValueError, rf"weight has shape .*\[{SPEC.total_rows}, w\]")
    bad(lambda: prefix_memory(codes(), w.int(), SPEC), TypeError, "weight has dtype torch.int32")
    bad(lambda: prefix_memory(codes(), w, SPEC.to_dict()), TypeError, "spec is a dict")
    bad(lambda: prefix_memory(codes(), w, SPEC, grad="lazy"), ValueError, "grad = 'lazy' is unknown; allowed")
    bad(lambda: prefix_memory(codes(), w, SPEC, backend="cuda"), ValueError, "backend = 'cuda' is unknown")
    bad(lambda: prefix_memory(codes(), w.to("meta"), SPEC), ValueError, "codes is on cpu, weight is on meta; move")
    bad(lambda: prefix_memory(codes(), w, SPEC, deterministic="yes"), TypeError, "deterministic = 'yes' is not a bool")
    bad(lambda: prefix_memory(codes(), w.detach().to_sparse(), SPEC), TypeError, "weight is sparse or nested")
    bad(lambda: token_memory(IDS, TABLE, w, None), TypeError, "spec is a NoneType")
    bad(lambda: prefix_rows(codes().float(), SPEC), TypeError, "codes has dtype")
    bad(lambda: token_memory(IDS[0], TABLE, w, SPEC), ValueError, r"input_ids has shape \(7,\); give \[B, T\]")
    bad(lambda: token_memory(IDS, TABLE.long(), w, SPEC), TypeError, "token_table has dtype")
    bad(lambda: token_memory(IDS, TABLE[:, :1], w, SPEC), ValueError, r"token_table .*\[V, 2\]")
    segments = torch.zeros(2, 3, dtype=torch.int64)
    bad(lambda: token_memory(IDS, TABLE, w, SPEC, segment_ids=segments), ValueError, "segment_ids has shape")


def test_triton_on_cpu_tensors_says_what_to_do(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    message = re.escape("set TRITON_INTERPRET=1")
    bad(lambda: prefix_memory(codes(), weight(), SPEC, backend="triton"), BackendError, message)
    assert prefix_memory(codes(), weight(), SPEC).shape == (4, 2, 8)


def test_an_old_triton_says_what_to_do(monkeypatch):
    from prefixmem_fast import _triton
    from prefixmem_fast.operation import backends

    assert backends.TRITON_PROBLEM is None
    for installed in ("3.2.0", "3.3rc1"):
        monkeypatch.setattr(_triton, "version", lambda _, installed=installed: installed)
        monkeypatch.setattr(backends, "TRITON_PROBLEM", _triton._find_problem())
        message = f"triton {installed} is older than 3.4; install torch"
        bad(lambda: prefix_memory(codes(), weight(), SPEC, backend="triton"), BackendError, message)
