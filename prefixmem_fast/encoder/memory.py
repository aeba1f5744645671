"""`PrefixMemory`: the tables as a module.

S_l = sum_{n <= min(l, N)} concat_h E[n, h][ idx[n, h] ]        (PrefixMem, arXiv 2606.00324)
"""

from __future__ import annotations

import json
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .._pages import ask_for_huge_pages
from ..operation import prefix_memory, token_memory
from ..operation.functions import check_options
from ..sid import SIDVocabulary
from .config import PrefixMemConfig


class PrefixMemory(nn.Module):
    """The memory tables, one parameter ``weight [R, w]`` laid out by the config's spec.

    Args:
        config: sizes and spec.
        backend, grad, deterministic: how `prefix_memory` computes; not part of the checkpoint.

    The state_dict carries the spec as JSON bytes (a uint8 tensor, so that safetensors takes it). Loading a checkpoint
    whose spec differs raises RuntimeError with both specs before anything of this module is changed; one without a
    spec gives a warning (strict=False) or an error.
    """

    def __init__(
        self,
        config: PrefixMemConfig,
        *,
        backend: str = "auto",
        grad: str = "dense",
        deterministic: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_config(config)
        check_options(backend, grad, deterministic)
        self.config = config
        self.backend, self.grad, self.deterministic = backend, grad, deterministic
        self.weight = nn.Parameter(torch.empty(config.spec.total_rows, config.row_width, device=device, dtype=dtype))
        ask_for_huge_pages(self.weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.config.memory_init_std)

    def forward(self, codes: Tensor) -> Tensor:
        """S of every active level: integer ``[..., L]`` to ``[..., A, memory_dim]``."""
        return prefix_memory(codes, self.weight, self.config.spec, **self._options())

    def read_tokens(self, input_ids: Tensor, vocabulary: SIDVocabulary, segment_ids: Tensor | None = None) -> Tensor:
        """S over a token stream: ``[B, T]`` to ``[B, T, memory_dim]``, zero at text; see `token_memory`.

        Raises:
            ValueError: the vocabulary's codebooks are not the spec's.
        """
        spec = self.config.spec
        if not isinstance(vocabulary, SIDVocabulary) or not isinstance(input_ids, Tensor):
            raise TypeError(
                f"input_ids is a {type(input_ids).__name__} and vocabulary a {type(vocabulary).__name__}; "
                "give a tensor [B, T] and a SIDVocabulary"
            )
        vocabulary.check_codebooks(spec)
        table = vocabulary.token_table(input_ids.device)
        return token_memory(input_ids, table, self.weight, spec, segment_ids=segment_ids, **self._options())

    def _options(self) -> dict[str, Any]:
        return {"backend": self.backend, "grad": self.grad, "deterministic": self.deterministic}

    def extra_repr(self) -> str:
        spec = self.config.spec
        deterministic = ", deterministic" if self.deterministic else ""
        return (
            f"rows={spec.total_rows}, width={self.config.row_width}, codebooks={spec.codebook_sizes}, "
            f"orders={spec.max_order}, exact_orders={spec.exact_orders}, heads={spec.heads}, mode={spec.mode}, "
            f"active_levels={spec.active_levels}, backend={self.backend}, grad={self.grad}{deterministic}"
        )

    def get_extra_state(self) -> Tensor:
        return torch.frombuffer(bytearray(self.config.spec.key, "utf-8"), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """The spec is fixed when the module is made; `_load_from_state_dict` has compared the two."""

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._is_sharded():  # what loads a sharded state_dict takes nothing but DTensors
            destination.pop(prefix + "_extra_state", None)

    def _is_sharded(self) -> bool:
        return hasattr(self.weight, "device_mesh")

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        key = prefix + "_extra_state"
        if key in state_dict:
            difference = self._spec_difference(state_dict[key])
            if difference is not None:  # raised at once, not collected: later modules keep their weights too
                raise RuntimeError(f"{prefix.rstrip('.') or type(self).__name__}: {difference}")
        elif prefix + "weight" in state_dict and not self._is_sharded():
            warnings.warn(
                f"the state_dict holds {prefix}weight without {key}: its address spec could not be compared with this "
                "module's, and under another spec the rows mean other prefixes; keep the entry in the state_dict",
                stacklevel=2,
            )
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if key in missing_keys and self._is_sharded():
            missing_keys.remove(key)

    def _spec_difference(self, stored: Any) -> str | None:
        own = self.config.spec.to_dict()
        try:
            if stored.dtype != torch.uint8 or stored.is_meta:
                return f"the checkpoint's address spec is {stored.dtype} on {stored.device}; load it as it was saved"
            saved = json.loads(bytes(stored.cpu().flatten().tolist()))
            names = [name for name in {**own, **saved} if saved.get(name) != own.get(name)]
        except (AttributeError, RecursionError, TypeError, ValueError):
            return "the checkpoint's address spec is not JSON; the file is damaged or was not written by this package"
        if not names:
            return None
        return (
            f"the checkpoint's address spec differs in {', '.join(names)}. Build the module from the checkpoint's "
            f"spec.\n  checkpoint: {saved}\n  module:     {own}"
        )


def check_config(config: PrefixMemConfig) -> None:
    if not isinstance(config, PrefixMemConfig):
        raise TypeError(f"config is a {type(config).__name__}; give a PrefixMemConfig")
