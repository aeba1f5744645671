"""The operation as torch operators, so that torch.compile, checkpointing, autocast and DDP see ordinary ones.

`prefix_memory` and `token_memory` are linear in the table, so each is the derivative of its own backward: the pair of
operators below differentiates in reverse mode to any order. Operators carry the spec as its canonical JSON: graphs,
fakes and exported programs then hold all they need.

They are registered by `torch.library.Library`: `torch.library.custom_op` and its `register_autograd` run two to four
times as much Python a call.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor
from torch._ops import OpOverload

from ..addressing import AddressSpec, TokenStream
from .backends import functions_of
from .interface import QuantizedTable

_NAMESPACE = "prefixmem_fast"
_AS_EVER = nullcontext()
_library = torch.library.Library(_NAMESPACE, "DEF")


@lru_cache(maxsize=64)
def _spec(key: str) -> AddressSpec:
    return AddressSpec.from_dict(json.loads(key))


def _operator(function: Callable[..., Tensor]) -> OpOverload:
    """Register a function of tensors, strings and booleans as an operator of its name that changes no argument."""
    name, schema = function.__name__, torch.library.infer_schema(function, mutates_args=())
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, function, "CompositeExplicitAutograd")
    return getattr(getattr(torch.ops, _NAMESPACE), name).default


def _fake_of(operator: OpOverload) -> Callable:
    return torch.library.register_fake(operator, lib=_library)


def _differentiates(operator: OpOverload, differentiated: int) -> Callable[[Callable], Callable]:
    """Register the derivative of an operator in one argument: ``(grad, saved tensors, options)`` to its gradient.

    Args:
        differentiated: its index among the arguments; the other tensors are saved, the last three are the options.
    """

    def register(derivative: Callable) -> Callable:
        class Differentiated(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *inputs):
                tensors, ctx.options = list(inputs[:-3]), inputs[-3:]
                del tensors[differentiated]
                ctx.save_for_backward(*tensors)
                ctx.n_inputs = len(inputs)
                with torch._C._AutoDispatchBelowAutograd():
                    return operator(*inputs)

            @staticmethod
            def backward(ctx, grad):
                gradients = [None] * ctx.n_inputs
                gradients[differentiated] = derivative(grad, *ctx.saved_tensors, *ctx.options)
                return tuple(gradients)

        def autograd(*inputs):
            if inputs[differentiated].requires_grad and torch.is_grad_enabled():
                return Differentiated.apply(*inputs)
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*inputs)

        _library.impl(operator.name().removeprefix(_NAMESPACE + "::"), autograd, "Autograd")
        return derivative

    return register


def undifferentiated(weight: Tensor) -> AbstractContextManager:
    """Where no gradient of the table is asked for, calls in here pass the Autograd key by: 3 us less of Python."""
    differentiated = weight.requires_grad and torch.is_grad_enabled()
    if differentiated or torch.compiler.is_compiling():
        return _AS_EVER
    return torch._C._AutoDispatchBelowAutograd()


@_operator
def prefix_rows(codes: Tensor, spec: str, backend: str) -> Tensor:
    return functions_of(backend).prefix_rows(codes, _spec(spec))


@_fake_of(prefix_rows)
def _(codes, spec, backend):
    s = _spec(spec)
    return codes.new_empty((codes.shape[0], s.levels, s.max_order, s.heads), dtype=torch.int64)


# Codes


@_operator
def prefix_memory(codes: Tensor, weight: Tensor, spec: str, backend: str, deterministic: bool) -> Tensor:
    return functions_of(backend).forward(codes, weight, _spec(spec))


@_fake_of(prefix_memory)
def _(codes, weight, spec, backend, deterministic):
    s = _spec(spec)
    return weight.new_empty((codes.shape[0], len(s.active_levels), s.heads * weight.shape[1]))


@_operator
def prefix_memory_backward(grad: Tensor, codes: Tensor, spec: str, backend: str, deterministic: bool) -> Tensor:
    return functions_of(backend).dense_gradient(grad, codes, _spec(spec), deterministic or _torch_asks_for_it())


@_fake_of(prefix_memory_backward)
def _(grad, codes, spec, backend, deterministic):
    s = _spec(spec)
    return grad.new_empty((s.total_rows, grad.shape[-1] // s.heads))


_differentiates(prefix_memory, 1)(prefix_memory_backward)


@_differentiates(prefix_memory_backward, 0)
def _(grad_weight, codes, *options):
    return prefix_memory(codes, grad_weight, *options)


# Token streams


@_operator
def token_memory(
    input_ids: Tensor,
    token_table: Tensor,
    segment_ids: Tensor | None,
    weight: Tensor,
    spec: str,
    backend: str,
    deterministic: bool,
) -> Tensor:
    return functions_of(backend).forward(TokenStream(input_ids, token_table, segment_ids), weight, _spec(spec))


@_fake_of(token_memory)
def _(input_ids, token_table, segment_ids, weight, spec, backend, deterministic):
    return weight.new_empty((*input_ids.shape, _spec(spec).heads * weight.shape[1]))


@_operator
def token_memory_backward(
    grad: Tensor,
    input_ids: Tensor,
    token_table: Tensor,
    segment_ids: Tensor | None,
    spec: str,
    backend: str,
    deterministic: bool,
) -> Tensor:
    stream = TokenStream(input_ids, token_table, segment_ids)
    return functions_of(backend).dense_gradient(grad, stream, _spec(spec), deterministic or _torch_asks_for_it())


@_fake_of(token_memory_backward)
def _(grad, input_ids, token_table, segment_ids, spec, backend, deterministic):
    s = _spec(spec)
    return grad.new_empty((s.total_rows, grad.shape[-1] // s.heads))


_differentiates(token_memory, 3)(token_memory_backward)


@_differentiates(token_memory_backward, 0)
def _(grad_weight, input_ids, token_table, segment_ids, *options):
    return token_memory(input_ids, token_table, segment_ids, grad_weight, *options)


# Quantized tables: forward alone


@_operator
def quantized_prefix_memory(
    codes: Tensor, values: Tensor, scales: Tensor, spec: str, dtype: torch.dtype, backend: str
) -> Tensor:
    return functions_of(backend).quantized_forward(codes, QuantizedTable(values, scales), _spec(spec), dtype)


@_fake_of(quantized_prefix_memory)
def _(codes, values, scales, spec, dtype, backend):
    s = _spec(spec)
    return scales.new_empty((codes.shape[0], len(s.active_levels), s.heads * values.shape[1]), dtype=dtype)


@_operator
def quantized_token_memory(
    input_ids: Tensor,
    token_table: Tensor,
    segment_ids: Tensor | None,
    values: Tensor,
    scales: Tensor,
    spec: str,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    stream = TokenStream(input_ids, token_table, segment_ids)
    return functions_of(backend).quantized_forward(stream, QuantizedTable(values, scales), _spec(spec), dtype)


@_fake_of(quantized_token_memory)
def _(input_ids, token_table, segment_ids, values, scales, spec, dtype, backend):
    return scales.new_empty((*input_ids.shape, _spec(spec).heads * values.shape[1]), dtype=dtype)


# Windows of tokens: forward alone, into a tensor that is given


def _read_windows(
    windows: Tensor, token_table: Tensor, table: Tensor, scales: Tensor | None, out: Tensor, spec: str, backend: str
) -> None:
    given = table if scales is None else QuantizedTable(table, scales)
    functions_of(backend).read_windows(windows, token_table, given, _spec(spec), out)


_library.define(
    "read_windows" + torch.library.infer_schema(_read_windows, mutates_args=("out",)),
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("read_windows", _read_windows, "CompositeExplicitAutograd")
read_windows = torch.ops.prefixmem_fast.read_windows.default
_fake_of(read_windows)(lambda *_: None)


def _torch_asks_for_it() -> bool:
    """Whether torch asks for the same bits run after run."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
