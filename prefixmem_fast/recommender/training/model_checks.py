"""What a run refuses of a model before it trains: one that cannot be had, whose past is unknown, or that sees ahead."""

from __future__ import annotations

import difflib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..._inputs import clipped, shown
from .config import RunConfig

_CACHED = ("config.json", "tokenizer_config.json", "tokenizer.json")


def check_reachable(option: str, name: str) -> None:
    """A name that is no folder is asked for on the Hub, with many retries; one try says whether it can be had.

    Raises:
        FileNotFoundError: it is no folder, not in the Hub's cache, and the Hub does not answer.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError, get_session, validate_repo_id

    if Path(name).is_dir():
        return
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise FileNotFoundError(
            f"{option} {clipped(name, 100)} is not there; give a folder of transformers, or a name on the Hub"
        ) from None
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
        return
    except Exception as error:  # of whichever client the release has
        reason = type(error).__name__
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in _CACHED):
        return
    raise FileNotFoundError(
        f"{option} {name} is no folder here and not in the cache of the Hub, and {constants.ENDPOINT} cannot be "
        f"reached ({reason}); give a folder, or run once with a network"
    )


def check_past(config: RunConfig, model_config: Any) -> None:
    """What `attach` refuses, before weights are made or read.

    Raises:
        NotImplementedError: the model keeps its past in something else than keys.
    """
    from ...huggingface.kv_cache import keeps_keys

    if config.arm != "plain" and not keeps_keys(model_config):
        raise NotImplementedError(
            f"model = {shown(config.model)}: {model_config.model_type} keeps its past in something else than a KV "
            "cache, so the codes before a token are not known; give a model with attention, or arm = 'plain'"
        )


@torch.no_grad()
def check_causal(config: RunConfig, model: nn.Module, limit: int | None) -> None:
    """Refuse a causal LM whose logits change with a token after them: it would read the labels that it is to predict.

    Neither the random state nor the modes of the modules change. A model that cannot be called with ids alone is left
    to training.

    Args:
        limit: tokens that fit its positions, or None.

    Raises:
        ValueError: it is bidirectional.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    length = min(8, limit or 8)
    if rows < 2 or length < 2:
        return
    ids = torch.randint(rows, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % rows
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.random.fork_rng(devices=[]):
            model.eval()
            before, after = (
                model(input_ids=given, attention_mask=torch.ones_like(given)).logits[:, :-1].float()
                for given in (ids, other)
            )
    except Exception:  # whatever else it needs
        return
    finally:
        for module, mode in modes.items():
            module.training = mode
    if (after - before).abs().max() > 1e-5 * before.abs().max():  # a causal one gives the same bits
        way = ""
        if getattr(model.config, "is_decoder", None) is False:
            way = ', or set model_options = {"is_decoder": true}, with which some of its kind look back alone'
        raise ValueError(
            f"model = {shown(config.model)}: {model.config.model_type} sees the tokens after a position (it is "
            f"bidirectional) and would read what it is to predict; give a causal LM such as gpt2 or qwen3{way}"
        )


def check_entries(config: RunConfig, model_type: str) -> None:
    """Warn of entries of model_options that a configuration of this type has not; transformers ignores them."""
    from transformers import CONFIG_MAPPING

    if not config.model_options or model_type not in CONFIG_MAPPING:
        return
    known = CONFIG_MAPPING[model_type]()
    for name in config.model_options:
        if not hasattr(known, name):
            near = difflib.get_close_matches(name, vars(known), n=1)
            hint = f"; {near[0]} is near" if near else ""
            warnings.warn(f"model_options: {name} is no entry of a {model_type} configuration{hint}", stacklevel=2)
