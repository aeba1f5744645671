"""`attach` adds the encoder to the input embeddings of a model of transformers, without subclassing it.

    inputs_embeds = embed(input_ids) + m,   m = W_out * S                    (PrefixMem, arXiv 2606.00324)

Hooks do it, see `hooks.py`.
"""

from __future__ import annotations

from torch import nn

from ..encoder import PrefixMem, SIDTransformer
from ..sid import SIDVocabulary
from .files import leave_files, watch_files
from .hooks import NAME, Attachment, input_embeddings_of, unwrapped
from .kv_cache import cache_argument, keeps_keys, parameters_of

_PAST_SWITCHES = {"use_cache", "use_mems"}  # arguments of models that keep their past, in whatever it is


def attach(model: nn.Module, encoder: PrefixMem | SIDTransformer, vocabulary: SIDVocabulary) -> nn.Module:
    """Add an encoder to a causal LM or an encoder-decoder of transformers, in place.

    From then on the encoder is the model's module `prefixmem`: its parameters train, move and are saved with the
    model's, and `forward`, `generate` with and without a cache, and the Trainer use it. Packed sequences are told apart
    by `position_ids` that start again, or by an argument `segment_ids` ``[B, T]`` of the model's call. With
    PEFT, attach to what `get_peft_model` returned, so that the encoder trains beside the adapters.

    Args:
        model: a model of transformers, or a PeftModel around one; not yet compiled.
        encoder: as wide as the model's embeddings; a `SIDTransformer` may take its place. With ``output_init_std=0``
            the model's logits stay as they are.
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
    watch_files(model, base)
    return model


def detach(model: nn.Module) -> PrefixMem | SIDTransformer:
    """Undo `attach`: the model is what it was, trained weights aside.

    Returns:
        the encoder.

    Raises:
        ValueError: no encoder is attached to `model`.
    """
    base = _base_of(model)
    attachment = getattr(base, "prefixmem_attachment", None)
    if attachment is None:
        raise ValueError(f"no encoder is attached to this {type(base).__name__}")
    attachment.remove_hooks()
    leave_files(model, base)
    encoder = unwrapped(attachment.encoder)
    delattr(base, NAME)
    del base.prefixmem_attachment
    return encoder


def _base_of(model: nn.Module) -> nn.Module:
    """The model of transformers inside a PeftModel."""
    if hasattr(model, "_orig_mod"):
        raise TypeError("model is compiled; attach the encoder first, then call torch.compile")
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, nn.Module) or not hasattr(model, "get_input_embeddings"):
        raise TypeError(f"model is a {type(model).__name__}; give a model of transformers, or a PeftModel around one")
    return model


def _check(base: nn.Module, encoder: PrefixMem | SIDTransformer, vocabulary: SIDVocabulary) -> None:
    if not isinstance(encoder, (PrefixMem, SIDTransformer)):
        raise TypeError(f"encoder is a {type(encoder).__name__}; give a PrefixMem")
    if not isinstance(vocabulary, SIDVocabulary):
        raise TypeError(f"vocabulary is a {type(vocabulary).__name__}; give a SIDVocabulary")
    hooks = (hook for module in base.modules() for hook in module._forward_hooks.values())
    if any(isinstance(getattr(hook, "__self__", None), Attachment) for hook in hooks):
        raise ValueError(f"an encoder is attached to this {type(base).__name__} already; detach it first")
    vocabulary.check_codebooks(encoder.config)
    weight = base.get_input_embeddings().weight
    rows, width = weight.shape
    if width != encoder.config.hidden_size:
        raise ValueError(
            f"the encoder has hidden_size = {encoder.config.hidden_size} and the model's embeddings have {width} "
            f"columns; give PrefixMemConfig(hidden_size={width})"
        )
    device = encoder.out_proj.weight.device
    if weight.device != device:
        raise ValueError(
            f"the encoder is on {device} and the model's embeddings are on {weight.device}; move one of them first"
        )
    if len(vocabulary.table) > rows:
        raise ValueError(
            f"the vocabulary has token id {len(vocabulary.table) - 1} and the model's embeddings have {rows} rows; "
            "resize them, or let SIDVocabulary.extend do it"
        )
    pad = getattr(base.config, "pad_token_id", None)
    if pad is not None and vocabulary.is_code(pad):
        level, code = vocabulary.table[pad].tolist()
        raise ValueError(f"pad_token_id = {pad} is the token of level {level}, code {code}; pad with another token")
    around = {parent for embedding in input_embeddings_of(base) for parent in _ancestors(base, embedding.path)}
    takes_cache = any(cache_argument(module) for module in around)
    keeps_past = takes_cache or not _PAST_SWITCHES.isdisjoint(parameters_of(base))
    if keeps_past and not (takes_cache and keeps_keys(base.config)):
        raise NotImplementedError(
            f"{type(base).__name__} keeps its past in something else than a KV cache, so the codes before a token are "
            "not known; attach to a model that takes a Cache of transformers with keys in it"
        )


def _ancestors(model: nn.Module, path: str) -> list[nn.Module]:
    names = path.split(".")
    return [model.get_submodule(".".join(names[:i])) for i in range(len(names))]
