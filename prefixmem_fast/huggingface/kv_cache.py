"""The KV cache among the arguments and outputs of a model of transformers.

Releases name it differently: `past_key_values` up to 5.23, `cache` from 5.24 on. Only this file knows the names.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterable
from typing import Any

from torch import nn

_NAMES = ("past_key_values", "cache")


def parameters_of(module: nn.Module) -> dict[str, inspect.Parameter]:
    """The parameters of a module's forward, by name."""
    try:
        signature = inspect.signature(module.forward, eval_str=True)
    except NameError:  # an annotation of a type that is imported for type checkers alone
        signature = inspect.signature(module.forward)
    return dict(signature.parameters)


def cache_argument(module: nn.Module) -> str | None:
    """The name under which a module's forward takes a KV cache; None where it takes none.

    It is the argument annotated as a `Cache`, or one with a known name and no annotation that says otherwise:
    xLSTM's `cache` is of a class of its own. Remote code annotates `past_key_values` as it likes.
    """
    for name, parameter in parameters_of(module).items():
        annotation = parameter.annotation
        if any(_is_cache(kind) for kind in (annotation, *typing.get_args(annotation))):
            return name
        if name == _NAMES[0] or (name in _NAMES and annotation is parameter.empty):
            return name
    return None


def cache_given(arguments: dict[str, Any]) -> Any:
    """The KV cache among the arguments of a call; None where there is none.

    Raises:
        NotImplementedError: the cache is none of transformers' `Cache` classes.
    """
    cache = _first_cache(arguments.values())
    other = next((arguments[name] for name in _NAMES if arguments.get(name) is not None), None)
    if cache is None and other is not None:
        raise NotImplementedError(
            f"the model was called with a {type(other).__name__} as its KV cache; the encoder keeps the tokens before "
            "in a Cache of transformers, such as DynamicCache. Continuous batching has no such cache: use generate"
        )
    return cache


def cache_returned(output: Any) -> Any:
    """The KV cache in the output of a model; None where there is none."""
    if isinstance(output, dict):  # ModelOutput is one
        return _first_cache(output.values())
    return _first_cache(output) if isinstance(output, tuple) else None


def keeps_keys(config: Any) -> bool:
    """Whether the cache that transformers makes for a configuration keeps keys; Mamba's keeps recurrent states."""
    from transformers import DynamicCache

    layers = DynamicCache(config=config).layers
    return not layers or any(hasattr(layer, "get_seq_length") for layer in layers)


def _first_cache(values: Iterable[Any]) -> Any:
    return next((value for value in values if _is_cache(value)), None)


def _is_cache(value: Any) -> bool:
    """Whether an object or a class selects rows of a batch, as each Cache of transformers does; Reformer's does not."""
    return hasattr(value, "batch_select_indices")
