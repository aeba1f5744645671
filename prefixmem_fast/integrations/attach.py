"""`attach` adds the encoder to the input embeddings of a model of transformers, without subclassing it.

    inputs_embeds = embed(input_ids) + m,   m = W_out * S                    (PrefixMem, arXiv 2606.00324)

Hooks do it: one on the input embedding, which adds m, and one on each module around it that takes a KV cache, which
tells the first what stands before the tokens (`token_history.py`) and which packed sequence they belong to.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..modules import PrefixMem
from ..sid import SIDVocabulary
from .files import leave_files, watch_files
from .token_history import begin_history, history_of

NAME = "prefixmem"  # the encoder's name among the model's modules
_OTHER_PASTS = ("cache_params", "mems", "state")  # what models without a KV cache call their past


class _Call(NamedTuple):
    """What a call of the model says of the tokens that it embeds."""

    cache: Any
    segment_ids: Tensor | None
    tokens: list[Tensor]  # those embedded in this call: none yet, or one tensor


def attach(model: nn.Module, encoder: PrefixMem, vocabulary: SIDVocabulary) -> nn.Module:
    """Add an encoder to a causal LM or an encoder-decoder of transformers, in place.

    From then on the encoder is the model's module `prefixmem`: its parameters train, move and are saved with the
    model's, and `forward`, `generate` with and without a cache, and the Trainer use it. Packed sequences are told apart
    by `position_ids` that start again, or by an argument `segment_ids` ``[B, T]`` of the model's call. With
    PEFT, attach to what `get_peft_model` returned, so that the encoder trains beside the adapters.

    Args:
        model: a model of transformers, or a PeftModel around one.
        encoder: as wide as the model's embeddings. With ``output_init_std=0`` the model's logits stay as they are.
        vocabulary: which token ids are which codes.

    Returns:
        `model`.

    Raises:
        TypeError, ValueError: an argument is not as stated, or they do not fit each other; nothing has been changed.
        NotImplementedError: the model keeps its past in something else than a KV cache.
    """
    base = _base_of(model)
    _check(base, encoder, vocabulary)
    attachment = Attachment(base, vocabulary)
    base.add_module(NAME, encoder)
    attachment.place_hooks()
    base.prefixmem_attachment = attachment
    watch_files(model)
    return model


def detach(model: nn.Module) -> PrefixMem:
    """Undo `attach`: the model is what it was, trained weights aside.

    Returns:
        the encoder.

    Raises:
        ValueError: no encoder is attached to `model`.
    """
    base = _base_of(model)
    attachment = attachment_of(base)
    if attachment is None:
        raise ValueError(f"no encoder is attached to this {type(base).__name__}")
    attachment.remove_hooks()
    leave_files(model)
    encoder = attachment.encoder
    delattr(base, NAME)
    del base.prefixmem_attachment
    return encoder


def attachment_of(model: nn.Module) -> Attachment | None:
    return getattr(_base_of(model), "prefixmem_attachment", None)


def _base_of(model: nn.Module) -> nn.Module:
    """The model of transformers inside a PeftModel."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, nn.Module) or not hasattr(model, "get_input_embeddings"):
        raise TypeError(f"model is a {type(model).__name__}; give a model of transformers, or a PeftModel around one")
    return model


def _check(base: nn.Module, encoder: PrefixMem, vocabulary: SIDVocabulary) -> None:
    if not isinstance(encoder, PrefixMem):
        raise TypeError(f"encoder is a {type(encoder).__name__}; give a PrefixMem")
    if not isinstance(vocabulary, SIDVocabulary):
        raise TypeError(f"vocabulary is a {type(vocabulary).__name__}; give a SIDVocabulary")
    if attachment_of(base) is not None:
        raise ValueError(f"an encoder is attached to this {type(base).__name__} already; detach it first")
    spec = encoder.config.spec
    if vocabulary.codebook_sizes != spec.codebook_sizes:
        raise ValueError(
            f"the vocabulary's codebook_sizes {vocabulary.codebook_sizes} differ from the encoder's "
            f"{spec.codebook_sizes}; build both from the same Semantic IDs"
        )
    rows, width = base.get_input_embeddings().weight.shape
    if width != encoder.config.hidden_size:
        raise ValueError(
            f"the encoder has hidden_size = {encoder.config.hidden_size} and the model's embeddings have {width} "
            f"columns; give PrefixMemConfig(hidden_size={width})"
        )
    if len(vocabulary.table) > rows:
        raise ValueError(
            f"the vocabulary has token id {len(vocabulary.table) - 1} and the model's embeddings have {rows} rows; "
            "resize them, or let SIDVocabulary.extend do it"
        )
    pad = getattr(base.config, "pad_token_id", None)
    if pad is not None and 0 <= pad < len(vocabulary.table) and vocabulary.table[pad, 0] > 0:
        level, code = vocabulary.table[pad].tolist()
        raise ValueError(f"pad_token_id = {pad} is the token of level {level}, code {code}; pad with another token")
    others = [name for name in _OTHER_PASTS if name in _parameters_of(base)]
    if others:
        raise NotImplementedError(
            f"{type(base).__name__} keeps its past in {others[0]}, from which the codes before a token cannot be read; "
            "models with past_key_values are supported"
        )


def _parameters_of(module: nn.Module) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(module.forward).parameters)


class Attachment:
    """The hooks on a model, and what they know of the calls that are under way.

    The encoder is looked up in the model at each call. A deep copy of the model so gets an attachment of its own,
    while a copy of its embedding alone (PEFT makes one) stays with this one.
    """

    def __init__(self, model: nn.Module, vocabulary: SIDVocabulary) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self._calls: list[_Call] = []
        self._handles: list[Any] = []
        self._embedding: nn.Module | None = None
        self._may_be_frozen = not hasattr(model, "peft_config")

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        if id(self.model) not in memo:
            return self
        made = memo[id(self)] = Attachment.__new__(Attachment)
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    @property
    def encoder(self) -> PrefixMem:
        return getattr(self.model, NAME)

    def place_hooks(self) -> None:
        self._embedding = self.model.get_input_embeddings()
        embeddings = _embeddings_of(self.model)
        self._handles = [embedding.register_forward_hook(self.add_memory) for embedding in embeddings]
        for module in self.model.modules():
            if any(child in embeddings for child in module.modules()) and "past_key_values" in _parameters_of(module):
                self._handles += [
                    module.register_forward_pre_hook(self.begin_call, with_kwargs=True),
                    module.register_forward_hook(self.end_call, always_call=True),
                ]

    def remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def begin_call(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before a module that takes a KV cache: note the cache and the packed sequences."""
        if module is self.model:
            self._calls.clear()
            if not torch.compiler.is_compiling():
                self._check_model()
        given = {**dict(zip(_parameters_of(module), args, strict=False)), **kwargs} if len(args) > 1 else kwargs
        if given.get("cache") is not None:
            raise NotImplementedError("continuous batching flattens requests into one row; use generate instead")
        outer = self._calls[-1] if self._calls else _Call(None, None, [])
        segment_ids = kwargs.get("segment_ids")
        if segment_ids is not None:
            if getattr(self.model.config, "is_encoder_decoder", False):
                raise NotImplementedError(
                    "segment_ids: packed rows are for decoder-only models; give one sequence a row"
                )
            kwargs = {name: value for name, value in kwargs.items() if name != "segment_ids"}
        elif outer.segment_ids is not None:
            segment_ids = outer.segment_ids
        else:
            segment_ids = _segments_of(given.get("position_ids"))
        cache = given.get("past_key_values")
        tokens = outer.tokens if cache is not None and cache is outer.cache else []
        self._calls.append(_Call(cache, segment_ids, tokens))
        return args, kwargs

    def end_call(self, module: nn.Module, args: tuple, output: Any) -> None:
        """After it: a cache that the module has made begins to keep the tokens."""
        if not self._calls:
            return
        call = self._calls.pop()
        if call.cache is not None or not call.tokens or (module.training and torch.is_grad_enabled()):
            return  # a training step drops its cache
        cache = _cache_in(output)
        if cache is not None and history_of(cache) is None:
            begin_history(cache, self._window).remember(call.tokens[0])

    def add_memory(self, embedding: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """After the input embedding: add m."""
        call = self._calls[-1] if self._calls else _Call(None, None, [])
        if call.tokens:  # the first embedding of a call is of its tokens; GPT-2 looks token types up in a second one
            return output
        tokens = args[0].reshape(-1, args[0].shape[-1])
        segments = call.segment_ids
        if segments is not None:
            if segments.shape[-1] != tokens.shape[1] or len(segments) not in (1, len(tokens)):
                raise ValueError(f"segment_ids has shape {tuple(segments.shape)}; give {tuple(tokens.shape)}")
            segments = segments.expand_as(tokens)
        new, context, context_segments = tokens.shape[1], tokens, segments
        if call.cache is not None:
            past = self._past(call.cache, len(tokens))
            context = torch.cat([past.to(tokens.dtype), tokens], 1)
            if segments is not None:
                context_segments = torch.cat([segments[:, :1].expand(-1, past.shape[1]), segments], 1)
        m = self.encoder.encode_tokens(context, self.vocabulary, context_segments, new_tokens=new)
        if segments is not None:  # what comes next goes on with the last sequence alone
            tokens = torch.where(segments == segments[:, -1:], tokens, -1)
        call.tokens.append(tokens)
        if call.cache is not None:
            history_of(call.cache).remember(tokens)
        return output + m.view_as(output).to(output.dtype)

    @property
    def _window(self) -> int:
        return max(self.encoder.config.spec.levels - 1, 1)

    def _past(self, cache: Any, batch: int) -> Tensor:
        """The last tokens that the cache has seen ``[B, <= window]``."""
        history = history_of(cache)
        if history is None:
            history = begin_history(cache, self._window)
            unseen = int(history.get_seq_length())
            if unseen:
                warnings.warn(
                    f"the KV cache holds {unseen} tokens that came as inputs_embeds or before attach; they are taken "
                    "for text, so a Semantic ID that begins among them is not encoded further",
                    stacklevel=2,
                )
        past = history.last(batch, self.model.device)
        if len(past) != batch:
            raise ValueError(
                f"the KV cache has seen {len(past)} sequences and the input has {batch}; change the cache with its own "
                "methods, such as batch_repeat_interleave"
            )
        return past

    def _check_model(self) -> None:
        """Follow an exchanged input embedding, and say once that PEFT has frozen the encoder."""
        if self.model.get_input_embeddings() is not self._embedding:
            self.remove_hooks()
            self.place_hooks()
        if self._may_be_frozen and self.model.training and hasattr(self.model, "peft_config"):
            self._may_be_frozen = False
            if not any(p.requires_grad for p in self.encoder.parameters()):
                warnings.warn(
                    "get_peft_model has frozen the encoder: attach it to the PeftModel, or list 'prefixmem' in "
                    "modules_to_save",
                    stacklevel=2,
                )


def _embeddings_of(model: nn.Module) -> list[nn.Module]:
    """The input embedding, and every other module that shares its weight, such as T5's in encoder and decoder."""
    embedding = model.get_input_embeddings()
    inner = [module for module in embedding.modules() if isinstance(module, nn.Embedding)] or [embedding]
    weights = {id(module.weight) for module in inner}
    shared = [m for m in model.modules() if isinstance(m, nn.Embedding) and id(m.weight) in weights]
    return list(dict.fromkeys([*inner, *shared]))


def _segments_of(position_ids: Tensor | None) -> Tensor | None:
    """Packed sequences, numbered ``[B, T]``: one begins wherever positions do not go on by one."""
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] < 2:
        return None
    begins = position_ids.diff(dim=1) != 1
    return torch.nn.functional.pad(begins.long().cumsum(1), (1, 0))


def _cache_in(output: Any) -> Any:
    if isinstance(output, tuple):
        return next((part for part in output if hasattr(part, "reorder_cache")), None)
    return getattr(output, "past_key_values", None)
