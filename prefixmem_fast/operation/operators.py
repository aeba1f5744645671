"""The operation as torch custom operators, so that torch.compile, checkpointing, autocast and DDP see ordinary ones.

`prefix_memory` and `token_memory` are linear in the table, so each is the derivative of its own backward: the pair of
operators below differentiates in reverse mode to any order. Operators carry the spec as its canonical JSON: graphs,
fakes and exported programs then hold all they need.
"""

from __future__ import annotations

import json
from functools import lru_cache

import torch
from torch import Tensor

from ..addressing import AddressSpec, TokenStream
from .backends import functions_of


@lru_cache(maxsize=64)
def _spec(key: str) -> AddressSpec:
    return AddressSpec.from_dict(json.loads(key))


@torch.library.custom_op("prefixmem_fast::prefix_rows", mutates_args=())
def prefix_rows(codes: Tensor, spec: str, backend: str) -> Tensor:
    return functions_of(backend).prefix_rows(codes, _spec(spec))


@prefix_rows.register_fake
def _(codes, spec, backend):
    s = _spec(spec)
    return codes.new_empty((codes.shape[0], s.levels, s.max_order, s.heads), dtype=torch.int64)


# Codes


@torch.library.custom_op("prefixmem_fast::prefix_memory", mutates_args=())
def prefix_memory(codes: Tensor, weight: Tensor, spec: str, backend: str, deterministic: bool) -> Tensor:
    return functions_of(backend).forward(codes, weight, _spec(spec))


@prefix_memory.register_fake
def _(codes, weight, spec, backend, deterministic):
    s = _spec(spec)
    return weight.new_empty((codes.shape[0], len(s.active_levels), s.heads * weight.shape[1]))


@torch.library.custom_op("prefixmem_fast::prefix_memory_backward", mutates_args=())
def prefix_memory_backward(grad: Tensor, codes: Tensor, spec: str, backend: str, deterministic: bool) -> Tensor:
    return functions_of(backend).dense_gradient(grad, codes, _spec(spec), deterministic or _torch_asks_for_it())


@prefix_memory_backward.register_fake
def _(grad, codes, spec, backend, deterministic):
    s = _spec(spec)
    return grad.new_empty((s.total_rows, grad.shape[-1] // s.heads))


def _save_codes(ctx, inputs, output):
    codes, _, *ctx.options = inputs
    ctx.save_for_backward(codes)


def _differentiate_memory(ctx, grad):
    return None, prefix_memory_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None


def _save_codes_of_backward(ctx, inputs, output):
    _, codes, *ctx.options = inputs
    ctx.save_for_backward(codes)


def _differentiate_backward(ctx, grad_weight):
    (codes,) = ctx.saved_tensors
    return prefix_memory(codes, grad_weight, *ctx.options), None, None, None, None


prefix_memory.register_autograd(_differentiate_memory, setup_context=_save_codes)
prefix_memory_backward.register_autograd(_differentiate_backward, setup_context=_save_codes_of_backward)


# Token streams


@torch.library.custom_op("prefixmem_fast::token_memory", mutates_args=())
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


@token_memory.register_fake
def _(input_ids, token_table, segment_ids, weight, spec, backend, deterministic):
    return weight.new_empty((*input_ids.shape, _spec(spec).heads * weight.shape[1]))


@torch.library.custom_op("prefixmem_fast::token_memory_backward", mutates_args=())
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


@token_memory_backward.register_fake
def _(grad, input_ids, token_table, segment_ids, spec, backend, deterministic):
    s = _spec(spec)
    return grad.new_empty((s.total_rows, grad.shape[-1] // s.heads))


def _save_tokens(ctx, inputs, output):
    input_ids, token_table, segment_ids, _, *ctx.options = inputs
    ctx.save_for_backward(input_ids, token_table, segment_ids)


def _differentiate_tokens(ctx, grad):
    grad_weight = token_memory_backward(grad, *ctx.saved_tensors, *ctx.options)
    return None, None, None, grad_weight, None, None, None


def _save_tokens_of_backward(ctx, inputs, output):
    _, input_ids, token_table, segment_ids, *ctx.options = inputs
    ctx.save_for_backward(input_ids, token_table, segment_ids)


def _differentiate_tokens_backward(ctx, grad_weight):
    grad = token_memory(*ctx.saved_tensors, grad_weight, *ctx.options)
    return grad, None, None, None, None, None, None


token_memory.register_autograd(_differentiate_tokens, setup_context=_save_tokens)
token_memory_backward.register_autograd(_differentiate_tokens_backward, setup_context=_save_tokens_of_backward)


def _torch_asks_for_it() -> bool:
    """Whether torch asks for the same bits run after run."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
