"""What is added to the embeddings of Semantic IDs, and the optimizer that trains it: the arms that a study compares."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ... import optim
from ...addressing import AddressSpec
from ...encoder import PrefixMem, PrefixMemConfig, SIDTransformer, SIDTransformerConfig
from ...encoder.saving import same_weights
from ...huggingface.attach import attach
from ...sid import SIDVocabulary
from .config import RunConfig

# Most transitions of a catalogue are never met, and of those the memory says nothing: rows start from zero. They give
# W_out no gradient at first, so it has to start from where rows get one.
_CROSS_ITEM_START = {"memory_init_std": 0.0, "output_init_std": 0.02}
_ROWS = {"adagrad": optim.RowWiseAdagrad, "adam": optim.RowWiseAdam, "lazy-adam": optim.LazyAdam, "sgd": optim.SGD}


def active_levels(config: RunConfig, levels: int) -> tuple[int, ...]:
    """The paper's "active at levels 4 and 5" of five: the two prefix lengths before the whole SID.

    Raises:
        ValueError: with one level no prefix comes before the whole SID, and none is given.
    """
    if levels == 1 and not config.active_levels:
        raise ValueError(
            "the index has 1 level, and no prefix comes before its only code: an encoder has nothing to read; give "
            "arm = 'plain', or active_levels = [1] for a memory of whole SIDs"
        )
    return tuple(config.active_levels or (level for level in (levels - 2, levels - 1) if level >= 1))


def build_encoder(
    config: RunConfig, codebook_sizes: tuple[int, ...], hidden_size: int
) -> PrefixMem | SIDTransformer | None:
    """The encoder of a run; None for the plain arm.

    Raises:
        FileNotFoundError, TypeError, ValueError: an option is wrong, or the pre-trained encoder is of other codebooks.
    """
    if config.arm == "plain":
        return None
    levels = active_levels(config, len(codebook_sizes))
    if config.arm == "sid-transformer":
        return SIDTransformer(
            SIDTransformerConfig(
                codebook_sizes,
                hidden_size,
                config.sid_width,
                config.sid_layers,
                active_levels=levels,
                output_init_std=config.output_init_std,
            )
        )
    how = {"grad": config.grad, "dropout": config.memory_dropout}
    cross_item = _cross_item(config, codebook_sizes, hidden_size)
    if config.encoder is not None:
        return _pretrained(config, codebook_sizes, hidden_size, levels, cross_item, how)
    if config.arm == "cross-item":
        return PrefixMem(cross_item, **how)
    order = min(config.max_order, max(levels) if config.mode != "full" else len(codebook_sizes))
    spec = AddressSpec(
        codebook_sizes,
        max_order=order,
        heads=config.heads,
        table_rows=config.table_rows,
        mode=config.mode,
        addressing=config.addressing,
        active_levels=levels,
        seed=config.address_seed,
    )
    return PrefixMem(
        PrefixMemConfig(
            spec, config.memory_dim, hidden_size, output_init_std=config.output_init_std, cross_item=cross_item
        ),
        **how,
    )


def _pretrained(
    config: RunConfig,
    codebook_sizes: tuple[int, ...],
    hidden_size: int,
    levels: tuple[int, ...],
    cross_item: PrefixMemConfig | None,
    how: dict[str, Any],
) -> PrefixMem:
    """A pre-trained encoder, W_out afresh; with new tables of cross-item orders where the run has some and it none."""
    alone, name = config.arm == "cross-item", f"encoder {config.encoder}"
    encoder = PrefixMem.from_pretrained(
        config.encoder, hidden_size=hidden_size, active_levels=None if alone else levels, **how
    )
    if encoder.config.codebook_sizes != codebook_sizes:
        raise ValueError(
            f"{name} has codebook_sizes {encoder.config.codebook_sizes}, the index {codebook_sizes}; pre-train it on "
            "this index, or give the codebook_sizes it was trained with"
        )
    if encoder.config.quantization is not None:
        raise ValueError(
            f"{name} is {encoder.config.quantization}, for serving, and cannot be trained; give the one that it was "
            "made from"
        )
    if alone != bool(encoder.config.spec.history):
        held = "the paper's orders" if alone else "cross-item orders alone"
        raise ValueError(f"{name} has {held}, and arm = {config.arm!r}; give the arm that it was pre-trained as")
    stored = encoder.config if alone else encoder.config.cross_item
    if stored is None and cross_item is not None:
        encoder.add_cross_item(cross_item)
    elif cross_item is not None and same_weights(stored.to_dict()) != same_weights(cross_item.to_dict()):
        raise ValueError(
            f"{name} has other tables of cross-item orders than the options starting with history ask for; give those "
            f"that it was pre-trained with{'' if alone else ', or history = 0'}"
        )
    encoder.reset_output()
    return encoder


def _cross_item(config: RunConfig, codebook_sizes: tuple[int, ...], hidden_size: int) -> PrefixMemConfig | None:
    """Tables that are read for the item before, the one before it, and so on; for each number of its codes some."""
    if not config.history:
        return None
    if config.history_dim % config.history_heads:
        raise ValueError(
            f"history_dim = {config.history_dim} is no multiple of history_heads = {config.history_heads}; give one"
        )
    levels, made = len(codebook_sizes), None
    for count in config.history_codes or [levels]:
        if count > levels:
            raise ValueError(f"history_codes = {config.history_codes}, and a Semantic ID has {levels} codes")
        spec = AddressSpec.cross_item(
            codebook_sizes,
            heads=config.history_heads,
            table_rows=config.history_rows,
            seed=config.address_seed + count,  # other primes than those of the prefixes
        )
        made = PrefixMemConfig(
            spec,
            config.history_dim,
            hidden_size,
            lags=config.history,
            earlier_codes=None if count == levels else count,
            output_slot=config.history_output,
            cross_item=made,
            **_CROSS_ITEM_START,
        )
    return made


def add_arm(model: nn.Module, config: RunConfig, vocabulary: SIDVocabulary) -> None:
    """Attach the encoder of a run to its model."""
    encoder = build_encoder(config, vocabulary.codebook_sizes, model.get_input_embeddings().weight.shape[1])
    if encoder is not None:
        attach(model, encoder, vocabulary)


def optimizer_for(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """One optimizer for model and encoder, the encoder at a multiple of the learning rate, if there is one."""
    return optim.for_model(
        model,
        config.learning_rate,
        encoder_lr_multiple=config.encoder_lr_multiple,
        rows=_ROWS[config.row_optimizer],
        cross_item_lr=config.history_lr,
        row_options={
            "weight_decay": config.row_weight_decay,
        },
        betas=(0.9, config.adam_beta2),
        weight_decay=config.weight_decay,
        muon_lr=config.muon_lr,
        encoder_needed=False,
    )
