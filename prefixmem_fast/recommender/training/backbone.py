"""The model that reads Semantic IDs: of random weights by name or configuration, or a pre-trained one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..._inputs import shown
from ...sid import Catalogue, SIDVocabulary
from ...sid.formats import KNOWN_FORMATS, TokenFormat
from .config import RunConfig
from .model_checks import check_causal, check_entries, check_past, check_reachable

# Small enough for a CPU; model_options changes their entries.
PRESETS: dict[str, dict[str, Any]] = {
    "decoder": {
        "model_type": "gpt2",
        "n_embd": 128,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 1024,
        "n_positions": 1024,
        "activation_function": "gelu_pytorch_tanh",
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "attn_pdrop": 0.0,
    },
    "tiger": {
        "model_type": "t5",
        "d_model": 128,
        "d_kv": 32,
        "d_ff": 512,
        "num_layers": 3,
        "num_decoder_layers": 3,
        "num_heads": 4,
        "dropout_rate": 0.1,
        "feed_forward_proj": "relu",
        "tie_word_embeddings": True,
    },
}
_SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
_TEXT_VOCABULARY = 4096


def build_backbone(
    config: RunConfig, catalogue: Catalogue, text: Sequence[str] | None
) -> tuple[nn.Module, Any, SIDVocabulary]:
    """Model, tokenizer and vocabulary of a run.

    Tokens of Semantic IDs that the tokenizer has already are used; else those of all codes that occur are added.

    Raises:
        OSError, ValueError: there is no such model or tokenizer, or it is neither a causal LM nor an encoder-decoder;
            as a causal LM it has to see nothing of the tokens after a position.
        NotImplementedError: the model keeps its past in something else than keys, and an encoder is to be attached.
    """
    from transformers import AutoConfig

    description, pretrained = _description(config)
    for option, name in (("model", pretrained), ("tokenizer", config.tokenizer)):
        if name is not None:
            check_reachable(option, name)
    if pretrained is None:
        tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else make_tokenizer(text)
        vocabulary = _vocabulary(tokenizer, None, catalogue, config)
        ids = {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "decoder_start_token_id": tokenizer.pad_token_id,
        }
        description = {**description, **ids, **(config.model_options or {})}
        kind = description.pop("model_type")
        check_entries(config, kind)
        try:
            model_config = AutoConfig.for_model(kind, **description)
            check_past(config, model_config)
            model = _class_of(model_config).from_config(model_config)
        except NotImplementedError:
            raise
        except (TypeError, ValueError, KeyError, RuntimeError, ZeroDivisionError) as error:
            raise ValueError(f"model = {config.model!r}: transformers refuses its configuration: {error}") from None
    else:
        model_config = AutoConfig.from_pretrained(pretrained, **(config.model_options or {}))
        check_entries(config, model_config.model_type)
        check_past(config, model_config)
        model = _class_of(model_config).from_pretrained(pretrained, config=model_config)
        tokenizer = load_tokenizer(config.tokenizer or pretrained)
        vocabulary = _vocabulary(tokenizer, model, catalogue, config)
    if not model.config.is_encoder_decoder:
        check_causal(config, model, longest_input(model))
    if config.precision == "bfloat16" and not torch.cuda.is_available():
        _attend_in_float32(model)
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer, vocabulary


def load_model(folder: str | Path) -> nn.Module:
    """A model that a run has saved, without its encoder."""
    from transformers import AutoConfig
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the encoder's tensors are in its file, and not its own
    try:
        return _class_of(AutoConfig.from_pretrained(folder)).from_pretrained(folder)
    finally:
        logging.set_verbosity(level)


def make_tokenizer(text: Sequence[str] | None) -> Any:
    """A tokenizer for a model of random weights: byte-level BPE of the items' text, or special tokens alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = list(_SPECIAL.values())
    if text is None:
        tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(special)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=_TEXT_VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **_SPECIAL)


def _attend_in_float32(model: nn.Module) -> None:
    """On a CPU the backward pass of bfloat16 attention takes longer than everything else together."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return

    def attend(module, query, key, value, attention_mask, **options):
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        if options.get("position_bias") is not None:  # T5's, which is added to the scores
            options["position_bias"] = options["position_bias"].float()
        with torch.autocast("cpu", enabled=False):
            out, weights = sdpa_attention_forward(
                module, query.float(), key.float(), value.float(), attention_mask, **options
            )
        return out.to(query.dtype), weights

    AttentionInterface.register("sdpa_float32", attend)
    AttentionMaskInterface.register("sdpa_float32", sdpa_mask)
    model.set_attn_implementation("sdpa_float32")


def longest_input(model: nn.Module) -> int | None:
    """Tokens that fit a model's positions; None where there is no limit."""
    return positions_of(model.config)


def positions_of(model_config: Any) -> int | None:
    """The same from the configuration of a model alone."""
    if getattr(model_config, "is_encoder_decoder", False) and not hasattr(model_config, "max_position_embeddings"):
        return None  # T5's positions are relative
    return getattr(model_config, "max_position_embeddings", None)


def _description(config: RunConfig) -> tuple[dict[str, Any] | None, str | None]:
    """The configuration of a model of random weights, or the name of a pre-trained one."""
    model = config.model
    if isinstance(model, str) and model.endswith(".json"):
        file = Path(model)
        if not file.is_file():
            raise FileNotFoundError(f"model {file} is not there; give a config.json of transformers")
        try:
            model = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"model {file} is no JSON: {error}") from None
    if isinstance(model, str) and model not in PRESETS:
        return None, model
    description = dict(PRESETS[model]) if isinstance(model, str) else dict(model)
    if not isinstance(description.get("model_type"), str):
        raise ValueError(
            f"model = {config.model!r} has no model_type; give a configuration such as transformers writes"
        )
    return description, None


def _class_of(model_config: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if getattr(model_config, "is_encoder_decoder", False) else AutoModelForCausalLM


def load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def _vocabulary(tokenizer: Any, model: nn.Module | None, catalogue: Catalogue, config: RunConfig) -> SIDVocabulary:
    try:
        known = SIDVocabulary.from_tokenizer(
            tokenizer, codebook_sizes=catalogue.codebook_sizes, token_format=config.token_format
        )
        known.encode(catalogue.codes)
    except ValueError as error:  # none, or not of this catalogue
        reason = str(error)
    else:
        return known
    template = config.token_format or KNOWN_FORMATS[0]
    form, has = TokenFormat(template, catalogue.codebook_sizes), tokenizer.get_vocab()
    tokens = [form.write(level, code) for level, code in _codes(catalogue)]
    there = [token for token in tokens if token in has]
    if there:
        whose = f"the tokenizer of {shown(config.tokenizer or config.model)}"
        if len(there) == len(tokens):
            raise ValueError(
                f"{whose} has more tokens than the index: {reason}; give --codebook-sizes as it was trained"
            )
        lacking = next(token for token in tokens if token not in has)
        raise ValueError(
            f"{whose} has {len(there)} of the {len(tokens)} tokens of the index, such as {there[0]}, not {lacking}: "
            "it was made for another catalogue; give the model that goes with this index, or one without SID tokens; "
            "or write the index as integers (.npy) and give --token-format '[{level}:{code}]' for tokens of its own"
        )
    codes = catalogue.codes
    return SIDVocabulary.extend(tokenizer, model, catalogue.codebook_sizes, codes=codes, token_format=template)


def _codes(catalogue: Catalogue) -> list[tuple[int, int]]:
    """(level, code) of all codes that occur."""
    return [(l, code) for l, column in enumerate(catalogue.codes.T, 1) for code in column.unique().tolist()]
