"""The encoder as modules: `PrefixMemory` holds the tables, `PrefixMem` adds W_out.

    m_l = W_out * S_l,   S_l = sum_{n <= min(l, N)} concat_h E[n, h][ idx[n, h] ]        (arXiv 2606.00324)

m_l is added to the input embedding of the token of c_l. There is no gate, no norm and no bias.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .ops import prefix_memory, token_memory
from .spec import AddressSpec

if TYPE_CHECKING:
    from .sid import SIDVocabulary


@dataclass(frozen=True)
class PrefixMemConfig:
    """What an encoder is: its address spec, its sizes and how it starts.

    Args:
        spec: where every row lives.
        memory_dim: d_mem, columns of S; a multiple of `spec.heads`.
        hidden_size: columns of m, the width of the model's embeddings; None for tables without W_out.
        memory_init_std: standard deviation of the normal the tables start from. The paper does not give it.
        output_init_std: the same for W_out, "near zero" in the paper; 0 leaves a model's logits bit-identical.

    Raises:
        TypeError, ValueError: an argument is not as stated, or the table's elements do not fit 63 bits.
    """

    spec: AddressSpec
    memory_dim: int = 256
    hidden_size: int | None = None
    memory_init_std: float = 0.02
    output_init_std: float = 1e-3

    def __post_init__(self) -> None:
        if not isinstance(self.spec, AddressSpec):
            raise TypeError(f"spec is a {type(self.spec).__name__}; give an AddressSpec")
        sizes = {"memory_dim": self.memory_dim}
        if self.hidden_size is not None:
            sizes["hidden_size"] = self.hidden_size
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} = {value!r} is not a positive integer")
        if self.memory_dim % self.spec.heads:
            raise ValueError(f"memory_dim = {self.memory_dim} is not a multiple of the spec's {self.spec.heads} heads")
        if self.spec.total_rows * self.row_width >= 1 << 63:
            raise ValueError(
                f"{self.spec.total_rows} rows of {self.row_width} do not fit 2^63 elements; lower table_rows"
            )
        for name in ("memory_init_std", "output_init_std"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} = {value!r} is not a finite number of 0 or more")

    @property
    def row_width(self) -> int:
        """w = memory_dim / heads, columns of one row of the fused table."""
        return self.memory_dim // self.spec.heads

    def to_dict(self) -> dict[str, Any]:
        return {**{k: v for k, v in asdict(self).items() if k != "spec"}, "spec": self.spec.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PrefixMemConfig:
        return cls(**{**values, "spec": AddressSpec.from_dict(values["spec"])})


class PrefixMemory(nn.Module):
    """The memory tables, one parameter ``weight [R, w]`` laid out by the config's spec.

    Args:
        config: sizes and spec.
        backend, grad, deterministic: how `prefix_memory` computes; not part of the checkpoint.

    The state_dict carries the spec as JSON bytes (a uint8 tensor, so that safetensors takes it). Loading a checkpoint
    whose spec differs reports both specs and leaves the tables as they were.
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
        self.config = config
        self.backend, self.grad, self.deterministic = backend, grad, deterministic
        self.weight = nn.Parameter(torch.empty(config.spec.total_rows, config.row_width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.config.memory_init_std)

    def forward(self, codes: Tensor) -> Tensor:
        """S of every active level: integer ``[..., L]`` to ``[..., A, memory_dim]``."""
        return prefix_memory(codes, self.weight, self.config.spec, **self._how())

    def read_tokens(self, input_ids: Tensor, vocabulary: SIDVocabulary, segment_ids: Tensor | None = None) -> Tensor:
        """S over a token stream: ``[B, T]`` to ``[B, T, memory_dim]``, zero at text; see `token_memory`.

        Raises:
            ValueError: the vocabulary's codebooks are not the spec's.
        """
        spec = self.config.spec
        if tuple(vocabulary.codebook_sizes) != spec.codebook_sizes:
            raise ValueError(
                f"the vocabulary's codebook_sizes {tuple(vocabulary.codebook_sizes)} differ from the encoder's "
                f"{spec.codebook_sizes}; build both from the same Semantic IDs"
            )
        table = vocabulary.token_table(input_ids.device)
        return token_memory(input_ids, table, self.weight, spec, segment_ids=segment_ids, **self._how())

    def _how(self) -> dict[str, Any]:
        return {"backend": self.backend, "grad": self.grad, "deterministic": self.deterministic}

    def extra_repr(self) -> str:
        spec = self.config.spec
        how = ", deterministic" if self.deterministic else ""
        return (
            f"rows={spec.total_rows}, width={self.config.row_width}, codebooks={spec.codebook_sizes}, "
            f"orders={spec.max_order}, exact_orders={spec.exact_orders}, heads={spec.heads}, mode={spec.mode}, "
            f"active_levels={spec.active_levels}, backend={self.backend}, grad={self.grad}{how}"
        )

    def get_extra_state(self) -> Tensor:
        return torch.frombuffer(bytearray(self.config.spec.key, "utf-8"), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """The spec is fixed when the module is made; `_load_from_state_dict` has compared the two."""

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        stored = state_dict.get(prefix + "_extra_state")
        if stored is not None:
            difference = self._spec_difference(stored)
            if difference is not None:
                error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {difference}")
                return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _spec_difference(self, stored: Tensor) -> str | None:
        own = self.config.spec.to_dict()
        try:
            found = json.loads(bytes(stored.cpu().tolist()))
        except ValueError:
            return "the checkpoint's address spec is not JSON; the file is damaged or was not written by this package"
        if found == own:
            return None
        names = [name for name in own if found.get(name) != own[name]]
        return (
            f"the checkpoint's address spec differs in {', '.join(names)}: its rows mean other prefixes. "
            f"Build the module from the checkpoint's spec.\n  checkpoint: {found}\n  module:     {own}"
        )


class PrefixMem(nn.Module):
    """The encoder: memory tables and the projection W_out to the width of the model's embeddings.

    Args:
        config: with `hidden_size` set.
        backend, grad, deterministic: see `PrefixMemory`.

    Raises:
        ValueError: the config has no `hidden_size`.
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
        if config.hidden_size is None:
            raise ValueError("hidden_size = None; give the width of the model's embeddings in PrefixMemConfig")
        self.config = config
        self.memory = PrefixMemory(
            config, backend=backend, grad=grad, deterministic=deterministic, device=device, dtype=dtype
        )
        self.out_proj = nn.Linear(config.memory_dim, config.hidden_size, bias=False, device=device, dtype=dtype)
        self.reset_output()

    def reset_output(self) -> None:
        """Start W_out afresh, near zero: what a pre-trained memory needs when it meets a new model."""
        nn.init.normal_(self.out_proj.weight, std=self.config.output_init_std)

    def forward(self, codes: Tensor) -> Tensor:
        """m of every level: integer ``[..., L]`` to ``[..., L, hidden_size]``, zero at inactive levels."""
        spec = self.config.spec
        encoded = self.out_proj(self.memory(codes))  # [..., A, hidden]
        if len(spec.active_levels) == spec.levels:
            return encoded
        by_level = dict(zip(spec.active_levels, encoded.unbind(-2), strict=True))
        zero = torch.zeros_like(encoded[..., 0, :])
        return torch.stack([by_level.get(level, zero) for level in range(1, spec.levels + 1)], dim=-2)

    def encode_tokens(self, input_ids: Tensor, vocabulary: SIDVocabulary, segment_ids: Tensor | None = None) -> Tensor:
        """m over a token stream, to add to the model's input embeddings.

        Args:
            input_ids: int32 or int64 ``[B, T]``.
            vocabulary: which ids are which codes; its codebooks must be the spec's.
            segment_ids: int32 or int64 ``[B, T]`` where rows hold several packed sequences.

        Returns:
            ``[B, T, hidden_size]``, zero at text, at inactive levels and at tokens of broken SIDs.
        """
        return self.out_proj(self.memory.read_tokens(input_ids, vocabulary, segment_ids))
