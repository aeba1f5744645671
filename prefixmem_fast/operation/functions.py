"""The operation as users call it: arguments are checked and the backend is chosen here, once."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _checks
from .._choices import BACKENDS, GRADS
from .._dtypes import CODE_DTYPES, TABLE_DTYPES
from ..addressing import AddressSpec, TokenStream
from . import operators
from .backends import choose_backend, functions_of
from .interface import QuantizedTable
from .row_gradients import read_memory

_ID_DTYPES = (torch.int32, torch.int64)


def prefix_rows(codes: Tensor, spec: AddressSpec, *, backend: str = "auto") -> Tensor:
    """Row in the one fused table of every level, order and head (PrefixMem, arXiv 2606.00324; see `AddressSpec`).

    Args:
        codes: int16, int32 or int64 ``[..., L]``. A code below 0 or at least K_l ends the prefix.
        spec: the address spec.
        backend: "auto", "triton", "native", "cpu" or "reference"; "auto" takes Triton for tensors on a GPU, and on
            a CPU the C++ kernels where they can be built, else "cpu".

    Returns:
        int64 ``[..., L, N, H]``; -1 where the order does not exist at the level or the prefix has ended.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape or value is not as stated.
        BackendError: the backend cannot run on these tensors.
    """
    check_spec(spec)
    check_codes(codes, spec.levels)
    backend = choose_backend(backend, codes=codes)
    rows = operators.prefix_rows(two_dimensional(codes), spec.key, backend)
    return as_given(rows, codes)


def prefix_memory(
    codes: Tensor,
    weight: Tensor,
    spec: AddressSpec,
    *,
    backend: str = "auto",
    grad: str = "dense",
    deterministic: bool = False,
) -> Tensor:
    """Memory of every active level: ``S_a = sum_{n <= min(a, N)} concat_h weight[row(n, h)]``.

    Args:
        codes: int16, int32 or int64 ``[..., L]``. A code below 0 or at least K_l ends the prefix: orders from there
            on add zero and receive no gradient.
        weight: float32, bfloat16, float16 or float64 ``[R, w]``, with R = ``spec.total_rows``.
        spec: the address spec; A = ``len(spec.active_levels)``.
        backend: "auto", "triton", "native", "cpu" or "reference"; "auto" takes Triton on a GPU, and on a CPU the C++
            kernels where they can be built, else "cpu".
        grad: where the gradient of `weight` goes. "dense": ``weight.grad`` of its shape and dtype. "sparse":
            ``weight.grad`` is a sparse tensor of the touched rows. "fused": the optimizer of `prefixmem_fast.optim`
            that holds `weight` updates the touched rows in the backward pass, and no gradient is kept; accumulating,
            clipping or scaling it raises RuntimeError. "sparse" and "fused" differentiate once, and torch.compile
            runs them outside its graph.
        deterministic: the dense gradient has the same bits run after run; otherwise it may be summed by float32
            atomics. `torch.use_deterministic_algorithms(True)` asks for it too. The other two always have them.

    Returns:
        ``[..., A, H * w]`` in the dtype of `weight`, summed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape or value is not as stated.
        BackendError: the backend cannot run on these tensors.
    """
    check_spec(spec)
    check_codes(codes, spec.levels)
    check_weight(weight, spec)
    _check_gradient(grad, deterministic)
    backend = choose_backend(backend, codes=codes, weight=weight)
    codes_2d = two_dimensional(codes)
    if grad == "dense":
        with operators.undifferentiated(weight):
            S = operators.prefix_memory(codes_2d, weight, spec.key, backend, deterministic)
    else:
        S = read_memory(weight, codes_2d, spec, backend, grad)
    return as_given(S, codes)


def token_memory(
    input_ids: Tensor,
    token_table: Tensor,
    weight: Tensor,
    spec: AddressSpec,
    *,
    segment_ids: Tensor | None = None,
    backend: str = "auto",
    grad: str = "dense",
    deterministic: bool = False,
) -> Tensor:
    """`prefix_memory` over a token stream: S at the tokens of active levels, zero everywhere else.

    A token of level l belongs to a SID where the l - 1 tokens before it have the levels 1 .. l - 1 in that order, in
    the same row of `input_ids` and in the same segment. Everything else is text.

    Args:
        input_ids: int32 or int64 ``[B, T]``; ids outside 0 .. V - 1 are text.
        token_table: int32 ``[V, 2]``: (level, code) of each vocabulary id, level 0 for text.
        weight, spec, backend, grad, deterministic: as for `prefix_memory`.
        segment_ids: int32 or int64 ``[B, T]``, equal within one packed sequence; None where rows are not packed.

    Returns:
        ``[B, T, H * w]`` in the dtype of `weight`.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape or value is not as stated.
        BackendError: the backend cannot run on these tensors.
    """
    check_spec(spec)
    stream = TokenStream(input_ids, token_table, segment_ids)
    check_stream(stream)
    check_weight(weight, spec)
    _check_gradient(grad, deterministic)
    tensors = {name: tensor for name, tensor in stream._asdict().items() if tensor is not None}
    backend = choose_backend(backend, **tensors, weight=weight)
    if grad == "dense":
        with operators.undifferentiated(weight):
            return operators.token_memory(*stream, weight, spec.key, backend, deterministic)
    return read_memory(weight, stream, spec, backend, grad)


def window_memory(
    windows: Tensor,
    token_table: Tensor,
    weight: Tensor,
    spec: AddressSpec,
    *,
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """S of the last token of each window, as `token_memory` has it where the windows are its rows; forward alone.

    A step of decoding reads so. On a GPU it is one launch, which a CUDA graph can hold.

    Args:
        windows: int32 or int64 ``[n, W]``, tokens in their order; -1 where none stands before the others.
        token_table, weight, spec, backend: as for `token_memory`.
        out: ``[n, H * w]`` in the dtype of `weight`, contiguous, to be written; nothing else is allocated.

    Returns:
        `out`, or a new tensor; zero where the last token is at no active level of a SID.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape or value is not as stated.
        BackendError: the backend cannot run on these tensors.
    """
    check_spec(spec)
    check_weight(weight, spec)
    return read_windows(windows, token_table, weight, None, spec, backend, weight.dtype, out)


def read_windows(
    windows: Tensor,
    token_table: Tensor,
    table: Tensor,
    scales: Tensor | None,
    spec: AddressSpec,
    backend: str,
    dtype: torch.dtype,
    out: Tensor | None,
) -> Tensor:
    """`window_memory` of a table or the values of a quantized one, which have been checked."""
    _checks.tensor("windows", windows, _ID_DTYPES, 2, "[n, W]")
    if not windows.shape[1]:
        raise ValueError(f"windows has shape {tuple(windows.shape)}; give a token or more a window")
    check_token_table(token_table)
    shape = (len(windows), spec.heads * table.shape[1])
    if out is None:
        out = table.new_empty(shape, dtype=dtype)
    elif out.shape != shape or out.dtype != dtype or not out.is_contiguous():
        strides = "" if out.is_contiguous() else ", not contiguous"
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}{strides}; give contiguous {dtype} {shape}")
    backend = choose_backend(backend, windows=windows, token_table=token_table, weight=table, out=out)
    if type(out) is Tensor and not torch.compiler.is_compiling():  # the operator's own Python would take as long
        given = table if scales is None else QuantizedTable(table, scales)
        with nullcontext() if not torch.is_grad_enabled() else torch.no_grad():
            functions_of(backend).read_windows(windows, token_table, given, spec, out)
    else:
        operators.read_windows(windows, token_table, table, scales, out, spec.key, backend)
    return out


def check_options(backend: str, grad: str, deterministic: bool) -> None:
    """Refuse unknown ways to compute.

    Raises:
        TypeError, ValueError: with the argument, its value and what is allowed.
    """
    _checks.choice("backend", backend, BACKENDS)
    _check_gradient(grad, deterministic)


def _check_gradient(grad: str, deterministic: bool) -> None:
    _checks.choice("grad", grad, GRADS)
    _checks.boolean("deterministic", deterministic)


def two_dimensional(codes: Tensor) -> Tensor:
    return codes if codes.dim() == 2 else codes.reshape(-1, codes.shape[-1])


def as_given(result: Tensor, codes: Tensor) -> Tensor:
    """A result of codes ``[M, L]`` in the leading dimensions of the codes that were given."""
    return result if codes.dim() == 2 else result.view(*codes.shape[:-1], *result.shape[1:])


def check_codes(codes: Tensor, levels: int) -> None:
    _checks.tensor("codes", codes, CODE_DTYPES, None, "[..., L]")
    if codes.dim() < 1 or codes.shape[-1] != levels:
        raise ValueError(
            f"codes has shape {tuple(codes.shape)}; its last dimension must be the {levels} levels of the spec. "
            "Fill a shorter SID with -1"
        )


def check_stream(stream: TokenStream) -> None:
    input_ids, token_table, segment_ids = stream
    _checks.tensor("input_ids", input_ids, _ID_DTYPES, 2, "[B, T]")
    check_token_table(token_table)
    if segment_ids is not None:
        _checks.tensor("segment_ids", segment_ids, _ID_DTYPES, 2, "[B, T]")
        if segment_ids.shape != input_ids.shape:
            raise ValueError(
                f"segment_ids has shape {tuple(segment_ids.shape)}; give that of input_ids, {tuple(input_ids.shape)}"
            )


def check_token_table(token_table: Tensor) -> None:
    _checks.tensor("token_table", token_table, (torch.int32,), 2, "[V, 2]")
    if token_table.shape[1] != 2:
        raise ValueError(f"token_table has shape {tuple(token_table.shape)}; give [V, 2], (level, code) of each id")


def check_spec(spec: AddressSpec) -> None:
    if not isinstance(spec, AddressSpec):
        raise TypeError(f"spec is a {type(spec).__name__}; give an AddressSpec")


def check_weight(weight: Tensor, spec: AddressSpec) -> None:
    _checks.tensor("weight", weight, TABLE_DTYPES, 2, "[R, w]")
    if type(weight).__name__ == "DTensor":
        raise TypeError(
            "weight is a DTensor, and the operation reads whole tables; keep the table out of FSDP with "
            "fully_shard(..., ignored_params={encoder.memory.weight})"
        )
    rows, width = weight.shape
    if rows != spec.total_rows or width < 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; the spec needs [{spec.total_rows}, w] with w >= 1")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(weight).tangent is not None:
        raise NotImplementedError(
            "weight carries a forward-mode tangent, and there is no forward mode; differentiate by backward() or "
            "torch.autograd.grad"
        )
