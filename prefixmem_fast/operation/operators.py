"""The operation as torch custom operators, and the functions that users call.

`prefix_memory` and `token_memory` are linear in the table, so each is the derivative of its own backward: the pair of
operators below differentiates in reverse mode to any order. Custom operators have no forward mode; it is refused.
torch.compile, checkpointing, autocast and DDP see ordinary operators.
"""

from __future__ import annotations

import json
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..addressing.spec import AddressSpec
from . import cpu, reference
from .backends import check_backend, resolve
from .row_gradient import read_rows

GRADS = ("dense", "sparse", "fused")
_CODE_DTYPES = (torch.int16, torch.int32, torch.int64)
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def prefix_rows(codes: Tensor, spec: AddressSpec, *, backend: str = "auto") -> Tensor:
    """Row in the one fused table of every level, order and head (PrefixMem, arXiv 2606.00324; see `AddressSpec`).

    Args:
        codes: int16, int32 or int64 ``[..., L]``. A code below 0 or at least K_l ends the prefix.
        spec: the address spec.
        backend: "auto", "triton", "cpu" or "reference"; "auto" takes Triton for tensors on a GPU.

    Returns:
        int64 ``[..., L, N, H]``; -1 where the order does not exist at the level or the prefix has ended.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape or value is not as stated.
        BackendError: the backend cannot run on these tensors.
    """
    _check_spec(spec)
    check_codes(codes, spec)
    rows = _prefix_rows(codes.reshape(-1, spec.levels), spec.key, resolve(backend, codes=codes))
    return rows.view(*codes.shape[:-1], *rows.shape[1:])


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
        backend: "auto", "triton", "cpu" or "reference"; "auto" takes Triton on a GPU and the fast path on a CPU.
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
    _check_spec(spec)
    check_codes(codes, spec)
    _check_weight(weight, spec)
    check_how(backend, grad, deterministic)
    codes_2d, backend = codes.reshape(-1, spec.levels), resolve(backend, codes=codes, weight=weight)

    def read(weight: Tensor) -> Tensor:
        return _prefix_memory(codes_2d, weight, spec.key, backend, deterministic)

    out = read(weight) if grad == "dense" else read_rows(read, weight, (codes_2d,), spec, backend, grad)
    return out.view(*codes.shape[:-1], *out.shape[1:])


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
    _check_spec(spec)
    check_tensor("input_ids", input_ids, (torch.int32, torch.int64), 2, "[B, T]")
    check_tensor("token_table", token_table, (torch.int32,), 2, "[V, 2]")
    if token_table.shape[1] != 2:
        raise ValueError(f"token_table has shape {tuple(token_table.shape)}; give [V, 2], (level, code) of each id")
    tensors = {"input_ids": input_ids, "token_table": token_table, "weight": weight}
    if segment_ids is not None:
        check_tensor("segment_ids", segment_ids, (torch.int32, torch.int64), 2, "[B, T]")
        if segment_ids.shape != input_ids.shape:
            raise ValueError(
                f"segment_ids has shape {tuple(segment_ids.shape)}; give that of input_ids, {tuple(input_ids.shape)}"
            )
        tensors["segment_ids"] = segment_ids
    _check_weight(weight, spec)
    check_how(backend, grad, deterministic)
    backend = resolve(backend, **tensors)

    def read(weight: Tensor) -> Tensor:
        return _token_memory(input_ids, token_table, segment_ids, weight, spec.key, backend, deterministic)

    if grad == "dense":
        return read(weight)
    return read_rows(read, weight, (input_ids, token_table, segment_ids), spec, backend, grad)


def check_how(backend: str, grad: str, deterministic: bool) -> None:
    """Refuse unknown ways to compute.

    Raises:
        TypeError, ValueError: with the argument, its value and what is allowed.
    """
    check_backend(backend)
    if grad not in GRADS:
        raise ValueError(f"grad = {grad!r} is unknown; allowed are {', '.join(map(repr, GRADS))}")
    if not isinstance(deterministic, bool):
        raise TypeError(f"deterministic = {deterministic!r} is not a bool; give True or False")


def _torch_wants_determinism() -> bool:
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def _check_spec(spec: AddressSpec) -> None:
    if not isinstance(spec, AddressSpec):
        raise TypeError(f"spec is a {type(spec).__name__}; give an AddressSpec")


def check_codes(codes: Tensor, spec: AddressSpec) -> None:
    check_tensor("codes", codes, _CODE_DTYPES, None, "[..., L]")
    if codes.dim() < 1 or codes.shape[-1] != spec.levels:
        raise ValueError(
            f"codes has shape {tuple(codes.shape)}; its last dimension must be the {spec.levels} levels of the spec. "
            "Fill a shorter SID with -1"
        )


def _check_weight(weight: Tensor, spec: AddressSpec) -> None:
    check_tensor("weight", weight, _WEIGHT_DTYPES, 2, "[R, w]")
    if weight.shape[0] != spec.total_rows or weight.shape[1] < 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; the spec needs [{spec.total_rows}, w] with w >= 1")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(weight).tangent is not None:
        raise NotImplementedError("weight carries a forward-mode tangent; use reverse mode, or torch.func.vjp")


def check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], dims: int | None, shape: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; give a tensor {shape}")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{name} is sparse or nested; give a dense tensor {shape}")
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} has dtype {tensor.dtype}; allowed are {allowed}; convert with .to()")
    if dims is not None and tensor.dim() != dims:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; give {shape}")


# Operators carry the spec as its canonical JSON: graphs, fakes and exported programs then hold all they need. Triton
# launches on the current device, hence `device_of`; the kernels take contiguous tensors.


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _library(backend: str):
    return cpu if backend == "cpu" else reference


@lru_cache(maxsize=64)
def _spec(key: str) -> AddressSpec:
    return AddressSpec.from_dict(json.loads(key))


@torch.library.custom_op("prefixmem_fast::prefix_rows", mutates_args=())
def _prefix_rows(codes: Tensor, spec: str, backend: str) -> Tensor:
    if backend == "triton":
        from ..kernels import rows

        with torch.cuda.device_of(codes):
            return rows.prefix_rows(codes.contiguous(), _spec(spec))
    return reference.prefix_rows(codes, _spec(spec))


@_prefix_rows.register_fake
def _(codes, spec, backend):
    s = _spec(spec)
    return codes.new_empty((codes.shape[0], s.levels, s.max_order, s.heads), dtype=torch.int64)


@torch.library.custom_op("prefixmem_fast::prefix_memory", mutates_args=())
def _prefix_memory(codes: Tensor, weight: Tensor, spec: str, backend: str, deterministic: bool) -> Tensor:
    if backend == "triton":
        from ..kernels import forward

        with torch.cuda.device_of(weight):
            return forward.prefix_memory_fwd(codes.contiguous(), weight.contiguous(), _spec(spec))
    return _library(backend).prefix_memory(codes, weight, _spec(spec))


@_prefix_memory.register_fake
def _(codes, weight, spec, backend, deterministic):
    s = _spec(spec)
    return weight.new_empty((codes.shape[0], len(s.active_levels), s.heads * weight.shape[1]))


@torch.library.custom_op("prefixmem_fast::prefix_memory_backward", mutates_args=())
def _prefix_memory_backward(grad: Tensor, codes: Tensor, spec: str, backend: str, deterministic: bool) -> Tensor:
    if backend == "triton":
        from ..kernels import atomic_backward as backward
        from ..kernels import sorted_backward as row_gradient

        with torch.cuda.device_of(grad):
            if deterministic or _torch_wants_determinism():
                return row_gradient.dense(grad, (codes,), _spec(spec))
            return backward.prefix_memory_bwd(grad.contiguous(), codes.contiguous(), _spec(spec))
    return _library(backend).prefix_memory_backward(grad, codes, _spec(spec))


@_prefix_memory_backward.register_fake
def _(grad, codes, spec, backend, deterministic):
    s = _spec(spec)
    return grad.new_empty((s.total_rows, grad.shape[-1] // s.heads))


def _save_memory(ctx, inputs, output):
    codes, _, *ctx.how = inputs
    ctx.save_for_backward(codes)


def _differentiate_memory(ctx, grad):
    return None, _prefix_memory_backward(grad, *ctx.saved_tensors, *ctx.how), None, None, None


def _save_backward(ctx, inputs, output):
    _, codes, *ctx.how = inputs
    ctx.save_for_backward(codes)


def _differentiate_backward(ctx, grad_weight):
    (codes,) = ctx.saved_tensors
    return _prefix_memory(codes, grad_weight, *ctx.how), None, None, None, None


_prefix_memory.register_autograd(_differentiate_memory, setup_context=_save_memory)
_prefix_memory_backward.register_autograd(_differentiate_backward, setup_context=_save_backward)


@torch.library.custom_op("prefixmem_fast::token_memory", mutates_args=())
def _token_memory(
    input_ids: Tensor,
    token_table: Tensor,
    segment_ids: Tensor | None,
    weight: Tensor,
    spec: str,
    backend: str,
    deterministic: bool,
) -> Tensor:
    if backend == "triton":
        from ..kernels import forward

        with torch.cuda.device_of(weight):
            return forward.token_memory_fwd(*_contiguous(input_ids, token_table, segment_ids, weight), _spec(spec))
    return _library(backend).token_memory(input_ids, token_table, weight, _spec(spec), segment_ids)


@_token_memory.register_fake
def _(input_ids, token_table, segment_ids, weight, spec, backend, deterministic):
    return weight.new_empty((*input_ids.shape, _spec(spec).heads * weight.shape[1]))


@torch.library.custom_op("prefixmem_fast::token_memory_backward", mutates_args=())
def _token_memory_backward(
    grad: Tensor,
    input_ids: Tensor,
    token_table: Tensor,
    segment_ids: Tensor | None,
    spec: str,
    backend: str,
    deterministic: bool,
) -> Tensor:
    if backend == "triton":
        from ..kernels import atomic_backward as backward
        from ..kernels import sorted_backward as row_gradient

        with torch.cuda.device_of(grad):
            if deterministic or _torch_wants_determinism():
                return row_gradient.dense(grad, (input_ids, token_table, segment_ids), _spec(spec))
            return backward.token_memory_bwd(*_contiguous(grad, input_ids, token_table, segment_ids), _spec(spec))
    return _library(backend).token_memory_backward(grad, input_ids, token_table, _spec(spec), segment_ids)


@_token_memory_backward.register_fake
def _(grad, input_ids, token_table, segment_ids, spec, backend, deterministic):
    s = _spec(spec)
    return grad.new_empty((s.total_rows, grad.shape[-1] // s.heads))


def _save_tokens(ctx, inputs, output):
    input_ids, token_table, segment_ids, _, *ctx.how = inputs
    ctx.save_for_backward(input_ids, token_table, segment_ids)


def _differentiate_tokens(ctx, grad):
    grad_weight = _token_memory_backward(grad, *ctx.saved_tensors, *ctx.how)
    return None, None, None, grad_weight, None, None, None


def _save_tokens_backward(ctx, inputs, output):
    _, input_ids, token_table, segment_ids, *ctx.how = inputs
    ctx.save_for_backward(input_ids, token_table, segment_ids)


def _differentiate_tokens_backward(ctx, grad_weight):
    grad = _token_memory(*ctx.saved_tensors, grad_weight, *ctx.how)
    return grad, None, None, None, None, None, None


_token_memory.register_autograd(_differentiate_tokens, setup_context=_save_tokens)
_token_memory_backward.register_autograd(_differentiate_tokens_backward, setup_context=_save_tokens_backward)
