"""The hooks of an attached model.

One on each input embedding adds m, and one below the output layer what tables with `output_slot` have. Others, on each
module around an embedding that takes a KV cache, tell the first what stands before the tokens (`token_history.py`) and
which packed sequence they belong to.
"""

from __future__ import annotations

import copy
import threading
import warnings
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..encoder import PrefixMem
from ..encoder.projection import Encoded, has_head
from ..sid import SIDVocabulary
from .kv_cache import cache_argument, cache_given, cache_returned, parameters_of
from .token_history import begin_history, history_of

NAME = "prefixmem"  # the encoder's name among the model's modules
_TOKENS = ("input_ids", "decoder_input_ids")
_HEAD = "_prefixmem_head"  # on embeddings, what belongs to their tokens' last hidden states


class _Call(NamedTuple):
    """What a call of a module says of the tokens that are embedded in it."""

    cache: Any
    segments: Tensor | None  # [B, T], numbered; 0 is the sequence that the cache holds the beginning of
    tokens: list[Tensor]  # those embedded so far: none, or one tensor
    takes_tokens: bool
    embeds: Tensor | None  # given in place of tokens
    before: Tensor | None = None  # [B, W], the tokens before, where they are known without a cache


_NO_CALL = _Call(None, None, [], True, None)  # an embedding called by itself


class InputEmbedding(NamedTuple):
    """An input embedding of a model: the module that was at `path` when the hooks were placed."""

    path: str
    module: weakref.ref


class Attachment:
    """The hooks on a model, and what they know of the calls that are under way in each thread.

    The encoder is looked up in the model at each call. A deep copy of the model so gets an attachment of its own,
    while a copy of its embedding alone (PEFT makes one) stays with this one. The model is held weakly, so that it is
    freed as soon as its owner drops it.
    """

    def __init__(self, model: nn.Module, vocabulary: SIDVocabulary) -> None:
        self.vocabulary = vocabulary
        self._model = weakref.ref(model)
        self._calls_of = threading.local()
        self._embeddings: list[InputEmbedding] = []
        self._warned_of_freezing = hasattr(model, "peft_config")
        self._warned_of_embeds = False

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_model", "_calls_of", "_embeddings")
        return {**{k: v for k, v in self.__dict__.items() if k not in left_out}, "model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._model, self._calls_of, self._embeddings = weakref.ref(state.pop("model")), threading.local(), []
        self.__dict__.update(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        if id(self.model) not in memo:
            return self
        duplicate = memo[id(self)] = Attachment.__new__(Attachment)
        duplicate.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return duplicate

    @property
    def model(self) -> nn.Module:
        return self._model()

    @property
    def encoder(self) -> PrefixMem:
        return getattr(self.model, NAME)

    @property
    def _calls(self) -> list[_Call]:
        calls = getattr(self._calls_of, "calls", None)
        if calls is None:
            calls = self._calls_of.calls = []
        return calls

    def place_hooks(self) -> None:
        self._embeddings = input_embeddings_of(self.model)
        embeddings = dict.fromkeys(embedding.module() for embedding in self._embeddings)  # each once
        for embedding in embeddings:
            embedding.register_forward_hook(self.add_memory)
        if self._has_head:  # before end_call, which may be on the same module
            below_the_output_layer(self.model).register_forward_hook(self.add_to_hidden)
        # An encoder is called with tokens of its own, in a call that may carry the decoder's cache.
        encoder_decoder = getattr(self.model.config, "is_encoder_decoder", False)
        token_encoder = self.model.get_encoder() if encoder_decoder and hasattr(self.model, "get_encoder") else None
        for module in self.model.modules():
            around = any(child in embeddings for child in module.modules())
            if around and (cache_argument(module) is not None or module is token_encoder):
                module.register_forward_pre_hook(self.begin_call, with_kwargs=True)
                module.register_forward_hook(self.end_call, always_call=True)

    def remove_hooks(self) -> None:
        for module in self.model.modules():  # PEFT copies modules with their hooks, so no list of handles is complete
            for hooks, flags in (
                (module._forward_hooks, module._forward_hooks_always_called),
                (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            ):
                for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                    del hooks[key]
                    flags.pop(key, None)

    def begin_call(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before a module that takes a KV cache: note the cache and the packed sequences."""
        calls = self._calls
        if module is self.model:
            calls.clear()
            self._calls_of.added = False
        if not calls and not torch.compiler.is_compiling():
            self._check_model()
        arguments = kwargs
        if args:  # input_ids alone as a rule
            names = parameters_of(module) if len(args) > 1 else ("input_ids",)
            arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        cache = cache_given(arguments)
        outer = calls[-1] if calls else _NO_CALL
        segments = outer.segments
        if kwargs.get("segment_ids") is not None:
            if getattr(self.model.config, "is_encoder_decoder", False):
                raise NotImplementedError(
                    "segment_ids: packed rows are for decoder-only models; give one sequence a row"
                )
            segments = _segments_of(segment_ids=kwargs["segment_ids"])
            kwargs = {name: value for name, value in kwargs.items() if name != "segment_ids"}
        elif segments is None:
            segments = _segments_of(position_ids=arguments.get("position_ids"))
        tokens = outer.tokens if cache is not None and cache is outer.cache else []
        takes_tokens = any(arguments.get(name) is not None for name in _TOKENS)
        embeds = arguments.get("inputs_embeds")
        if not outer.tokens:  # else a module around has embedded its tokens, and hands them on
            self._take_head(embeds)
        calls.append(_Call(cache, segments, tokens, takes_tokens, embeds))
        return args, kwargs

    def _take_head(self, embeds: Tensor | None) -> None:
        """What goes to the last hidden states of a call that begins: nothing yet, or what its embeddings came with."""
        head = self._calls_of.head = None if embeds is None else getattr(embeds, _HEAD, None)
        if embeds is None or head is not None or self._warned_of_embeds or not self._has_head:
            return
        self._warned_of_embeds = True
        warnings.warn(
            "inputs_embeds are not a tensor that the model's embedding has returned, so nothing is added to the last "
            "hidden states, where this encoder's tables with output_slot belong too; give input_ids",
            stacklevel=2,
        )

    def end_call(self, module: nn.Module, args: tuple, output: Any) -> None:
        """After it: a cache that the module has made begins to keep the tokens."""
        call = self._calls.pop() if self._calls else None
        if not self._calls:
            self._calls_of.head = None  # of a call that failed on its way
        if call is None or output is None:
            return
        if module is self.model and call.takes_tokens and not self._calls_of.added:
            raise RuntimeError(
                f"this {type(module).__name__} embedded its tokens without the encoder: it does not call the module of "
                "get_input_embeddings(). Detach the encoder, and add encoder.encode_tokens(input_ids, vocabulary) to "
                "inputs_embeds yourself"
            )
        if call.cache is not None:
            history = history_of(call.cache)
            if history is not None and call.embeds is not None and not call.tokens:
                unknown = torch.full(call.embeds.shape[:2], -1, device=call.embeds.device)
                history.remember(unknown)
                call.tokens.append(unknown)  # the modules around need not say so again
            return
        if not call.tokens or (torch.compiler.is_compiling() and module.training and torch.is_grad_enabled()):
            return  # a training step drops its cache
        cache = cache_returned(output)
        if cache is not None and history_of(cache) is None:
            begin_history(cache, self._window).remember(call.tokens[0])

    def add_memory(self, embedding: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """After the input embedding: add m."""
        call = self._calls[-1] if self._calls else _NO_CALL._replace(tokens=[])
        self._calls_of.added = True
        # The first embedding of a call is of its tokens; GPT-2 looks token types up in the same table.
        if call.tokens or not call.takes_tokens:
            return output
        tokens = args[0].reshape(-1, args[0].shape[-1])
        segments = call.segments
        if segments is not None:
            if segments.shape[-1] != tokens.shape[1] or len(segments) not in (1, len(tokens)):
                raise ValueError(f"segment_ids has shape {tuple(segments.shape)}; give {tuple(tokens.shape)}")
            segments = segments.expand_as(tokens)
        before = call.before if call.cache is None else self._past(call.cache, tokens)
        m, head = self._encode(before, tokens, segments)
        if segments is not None and tokens.shape[1] > 1:  # what comes next goes on with the last sequence alone
            tokens = torch.where(segments == segments[:, -1:], tokens, -1)
        call.tokens.append(tokens)
        if call.cache is not None:
            history_of(call.cache).remember(tokens)
        embedded = output + m.view_as(output).to(output.dtype)
        if not self._calls or call.before is not None:  # called by itself; what is given the result finds head there
            return _with_head(embedded, head)
        self._calls_of.head = head
        return embedded

    def _encode(self, before: Tensor | None, tokens: Tensor, segments: Tensor | None) -> Encoded:
        """What is added at tokens ``[B, T]``, of those before them ``[B, W]`` and their segments; 0 is that of the
        beginning of `before`."""
        if before is None:
            return self.encoder.encode_stream(tokens, self.vocabulary, segments)
        before = before.to(tokens.dtype)
        if tokens.shape[1] == 1 and isinstance(self.encoder, PrefixMem) and not torch.is_grad_enabled():
            if segments is not None:
                before = torch.where(segments == 0, before, -1)
            return self.encoder.encode_last(torch.cat([before, tokens], 1), self.vocabulary)
        context = torch.cat([before, tokens], 1)
        if segments is not None:
            segments = torch.cat([segments.new_zeros(before.shape), segments], 1)
        return self.encoder.encode_stream(context, self.vocabulary, segments, new_tokens=tokens.shape[1])

    def embed_beams(self, tokens: Tensor) -> Tensor:
        """Input embeddings ``[B, K, d]`` of the last tokens of beams ``[B, K, T]``, to be given as inputs_embeds."""
        before, new = tokens.flatten(0, 1).tensor_split([tokens.shape[-1] - 1], 1)
        self._calls.append(_NO_CALL._replace(tokens=[], before=before))
        try:
            embedded = self.model.get_input_embeddings()(new)
        finally:
            self._calls.pop()
        return _with_head(embedded.view(*tokens.shape[:2], -1), getattr(embedded, _HEAD, None))

    def add_to_hidden(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """After the module below the output layer: add what tables with `output_slot` have for its tokens."""
        head, self._calls_of.head = getattr(self._calls_of, "head", None), None
        if head is None:
            return output

        def added(hidden: Tensor) -> Tensor:
            if hidden.numel() != head.numel():
                raise RuntimeError(
                    f"the last hidden states of {type(module).__name__} are {tuple(hidden.shape)} and the memory of "
                    f"its tokens is {tuple(head.shape)}; attach an encoder without output_slot"
                )
            return hidden + head.view_as(hidden).to(hidden.dtype)

        if isinstance(output, tuple):
            return (added(output[0]), *output[1:])
        if isinstance(output, dict):  # ModelOutput is one
            first = next(iter(output))
            output[first] = added(output[first])
            return output
        return added(output)

    @property
    def _has_head(self) -> bool:
        return has_head(self.encoder)

    @property
    def _window(self) -> int:
        return max(self.encoder.config.lookback, 1)

    def _past(self, cache: Any, tokens: Tensor) -> Tensor:
        """The last tokens ``[B, <= window]`` that the cache has seen before `tokens`."""
        history = history_of(cache)
        if history is None:
            history = begin_history(cache, self._window)
            unseen = int(history.get_seq_length())
            if unseen:
                warnings.warn(
                    f"the KV cache holds {unseen} tokens that came as inputs_embeds, before attach or from a compiled "
                    "training step; they are taken for text, so a Semantic ID that begins among them does not go on",
                    stacklevel=2,
                )
        past = history.last(len(tokens), tokens.device)
        if len(past) != len(tokens):
            raise ValueError(
                f"the KV cache has seen {len(past)} sequences and the input has {len(tokens)}; change the cache by its "
                "own methods, such as batch_repeat_interleave"
            )
        return past

    def _check_model(self) -> None:
        """Follow exchanged embeddings, and say once that PEFT has frozen the encoder."""
        model = self.model
        if not self._embeddings or any(_module_at(model, e.path) is not e.module() for e in self._embeddings):
            self.remove_hooks()
            self.place_hooks()
        if not self._warned_of_freezing and model.training and hasattr(model, "peft_config"):
            self._warned_of_freezing = True
            quantized = getattr(unwrapped(self.encoder).config, "quantization", None) is not None
            if not quantized and not any(p.requires_grad for p in self.encoder.parameters()):
                warnings.warn(
                    "get_peft_model has frozen the encoder: attach it to the PeftModel, or list 'prefixmem' in "
                    "modules_to_save",
                    stacklevel=2,
                )
                unwrapped(self.encoder).requires_grad_(False)  # managed tables too, which PEFT does not see


def _with_head(embedded: Tensor, head: Tensor | None) -> Tensor:
    if head is not None:
        setattr(embedded, _HEAD, head)
    return embedded


def unwrapped(encoder: nn.Module) -> PrefixMem:
    """The encoder itself where PEFT's modules_to_save has put a wrapper around it and trains a copy."""
    if not hasattr(encoder, "modules_to_save"):
        return encoder
    return encoder.modules_to_save[encoder.active_adapters[0]]


def below_the_output_layer(model: nn.Module) -> nn.Module:
    """The module whose output the output layer takes: the decoder's last hidden states."""
    base = getattr(model, "base_model", model)  # the model itself where its prefix names none, as Gemma 3's did
    if (getattr(model.config, "is_encoder_decoder", False) or base is model) and hasattr(model, "get_decoder"):
        return model.get_decoder()
    return base


def input_embeddings_of(model: nn.Module) -> list[InputEmbedding]:
    """The input embedding, and others that share its weight, such as T5's in encoder and decoder.

    PEFT puts modules of its own around embeddings, some of which never call what they wrap, so an embedding is its
    outermost wrapper.
    """
    own = model.get_input_embeddings()
    inner = _embeddings_in(own) or [own]
    if getattr(model.config, "is_encoder_decoder", False):  # PEFT may have untied the embeddings of the two
        for name in ("get_encoder", "get_decoder"):
            part = getattr(model, name)() if hasattr(model, name) else None
            inner += _embeddings_in(part.get_input_embeddings()) if hasattr(part, "get_input_embeddings") else []
    inner = [module for module in inner if module.weight.shape[-1] == own.weight.shape[-1]]
    weights = {id(embedding.weight) for embedding in inner}
    modules = dict(model.named_modules(remove_duplicate=False))
    embeddings = {}
    for path, module in modules.items():
        if module in inner or (isinstance(module, nn.Embedding) and id(module.weight) in weights):
            parent, _, _ = path.rpartition(".")
            while type(modules[parent]).__module__.startswith("peft.") or isinstance(modules[parent], nn.ModuleDict):
                path, (parent, _, _) = parent, parent.rpartition(".")
            embeddings[path] = InputEmbedding(path, weakref.ref(modules[path]))
    return list(embeddings.values())


def _embeddings_in(module: nn.Module | None) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.Embedding)] if isinstance(module, nn.Module) else []


def _module_at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _segments_of(*, segment_ids: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor | None:
    """Packed sequences, numbered ``[B, T]``: one begins where ids change, or where positions do not go up."""
    if segment_ids is not None:
        begins = torch.nn.functional.pad(segment_ids.diff(dim=-1) != 0, (1, 0))
    elif position_ids is not None and position_ids.dim() == 2 and position_ids.shape[1]:
        if position_ids.shape[1] == 1:  # a step of decoding
            return (position_ids == 0).long()
        begins = torch.cat([position_ids[:, :1] == 0, position_ids.diff(dim=1) < 1], 1)
    else:
        return None
    return begins.long().cumsum(-1)
