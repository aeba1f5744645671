"""The encoder as modules: `PrefixMemory` holds the tables, `PrefixMem` adds W_out.

    m_l = W_out * S_l,   S_l = sum_{n <= min(l, N)} concat_h E[n, h][ idx[n, h] ]        (arXiv 2606.00324)

m_l is added to the input embedding of the token of c_l. There is no gate, no norm and no bias.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..addressing.spec import AddressSpec, not_negative, positive
from ..checkpoint import load_encoder, save_encoder
from ..operation.operators import check_how, prefix_memory, token_memory

if TYPE_CHECKING:
    from pathlib import Path

    from ..sid import SIDVocabulary


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
        object.__setattr__(self, "memory_dim", positive("memory_dim", self.memory_dim))
        if self.hidden_size is not None:
            object.__setattr__(self, "hidden_size", positive("hidden_size", self.hidden_size))
        if self.memory_dim % self.spec.heads:
            heads = self.spec.heads
            near = max(self.memory_dim // heads, 1) * heads
            raise ValueError(
                f"memory_dim = {self.memory_dim} is not a multiple of the spec's {heads} heads; "
                f"give {near} or {near + heads}, say"
            )
        if self.spec.total_rows * self.row_width >= 1 << 63:
            raise ValueError(
                f"{self.spec.total_rows} rows of {self.row_width} do not fit 2^63 elements; lower table_rows"
            )
        for name in ("memory_init_std", "output_init_std"):
            not_negative(name, getattr(self, name))

    def with_active_levels(self, active_levels: Sequence[int]) -> PrefixMemConfig:
        """The same tables, read at other levels."""
        return replace(self, spec=replace(self.spec, active_levels=active_levels))

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return self.spec.codebook_sizes

    @property
    def levels(self) -> int:
        return self.spec.levels

    @property
    def row_width(self) -> int:
        """w = memory_dim / heads, columns of one row of the fused table."""
        return self.memory_dim // self.spec.heads

    def to_dict(self) -> dict[str, Any]:
        return {**{k: v for k, v in asdict(self).items() if k != "spec"}, "spec": self.spec.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PrefixMemConfig:
        """Rebuild a config from `to_dict()`.

        Raises:
            TypeError, ValueError: `values` is not a dict, lacks `spec`, or has an unknown key.
        """
        if not isinstance(values, dict):
            raise TypeError(f"the config is a {type(values).__name__}; give the dict that to_dict() returned")
        if "kind" in values:
            raise ValueError(f"it is of a {values['kind']}; a PrefixMem was expected")
        unknown = [key for key in values if key not in cls.__dataclass_fields__]
        if unknown or "spec" not in values:
            what = f"has an unknown entry {unknown[0]!r}" if unknown else "lacks spec"
            raise ValueError(f"the config {what}; known are {', '.join(cls.__dataclass_fields__)}")
        return cls(**{**values, "spec": AddressSpec.from_dict(values["spec"])})


class PrefixMemory(nn.Module):
    """The memory tables, one parameter ``weight [R, w]`` laid out by the config's spec.

    Args:
        config: sizes and spec.
        backend, grad, deterministic: how `prefix_memory` computes; not part of the checkpoint.

    The state_dict carries the spec as JSON bytes (a uint8 tensor, so that safetensors takes it). Loading a checkpoint
    whose spec differs raises RuntimeError with both specs before anything of this module is changed.
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
        _check_config(config)
        check_how(backend, grad, deterministic)
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
        if not hasattr(vocabulary, "token_table") or not isinstance(input_ids, Tensor):
            raise TypeError(
                f"input_ids is a {type(input_ids).__name__} and vocabulary a {type(vocabulary).__name__}; "
                "give a tensor [B, T] and a SIDVocabulary"
            )
        vocabulary.check_codebooks(spec)
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
        key = prefix + "_extra_state"
        if key in state_dict:
            difference = self._spec_difference(state_dict[key])
            if difference is not None:  # raised at once, not collected: later modules keep their weights too
                raise RuntimeError(f"{prefix.rstrip('.') or type(self).__name__}: {difference}")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _spec_difference(self, stored: Any) -> str | None:
        own = self.config.spec.to_dict()
        try:
            if stored.dtype != torch.uint8 or stored.is_meta:
                return f"the checkpoint's address spec is {stored.dtype} on {stored.device}; load it as it was saved"
            found = json.loads(bytes(stored.cpu().flatten().tolist()))
            names = [name for name in {**own, **found} if found.get(name) != own.get(name)]
        except (AttributeError, TypeError, ValueError):
            return "the checkpoint's address spec is not JSON; the file is damaged or was not written by this package"
        if not names:
            return None
        return (
            f"the checkpoint's address spec differs in {', '.join(names)}. Build the module from the checkpoint's "
            f"spec.\n  checkpoint: {found}\n  module:     {own}"
        )


class OutputProjection(nn.Linear):
    """W_out: no bias, and a start near zero that also holds where a framework calls `reset_parameters`."""

    def __init__(self, config: PrefixMemConfig, **factory: Any) -> None:
        self.init_std = config.output_init_std
        super().__init__(config.memory_dim, config.hidden_size, bias=False, **factory)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)


def _check_config(config: PrefixMemConfig) -> None:
    if not isinstance(config, PrefixMemConfig):
        raise TypeError(f"config is a {type(config).__name__}; give a PrefixMemConfig")


class PrefixMem(nn.Module):
    """The encoder: memory tables and the projection W_out to the width of the model's embeddings.

    Args:
        config: with `hidden_size` set.
        backend, grad, deterministic: see `PrefixMemory`.
        dropout: in training, share of the tokens whose memory is left out; the others are scaled by 1 / (1 - dropout).
            Not in the paper; it keeps a model of a small catalogue from leaning on rows it has learnt by heart.

    Raises:
        ValueError: the config has no `hidden_size`, or `dropout` is not one of 0 <= p < 1.
    """

    config_class = PrefixMemConfig

    def __init__(
        self,
        config: PrefixMemConfig,
        *,
        backend: str = "auto",
        grad: str = "dense",
        deterministic: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_config(config)
        if config.hidden_size is None:
            raise ValueError("hidden_size = None; give the width of the model's embeddings in PrefixMemConfig")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout = {dropout!r}; allowed are 0 <= p < 1")
        self.config, self.dropout = config, dropout
        self.memory = PrefixMemory(
            config, backend=backend, grad=grad, deterministic=deterministic, device=device, dtype=dtype
        )
        self.out_proj = OutputProjection(config, device=device, dtype=dtype)

    def reset_output(self) -> None:
        """Start W_out afresh, near zero: what a pre-trained memory needs when it meets a new model."""
        self.out_proj.reset_parameters()

    def save_pretrained(
        self, path: str | Path, vocabulary: SIDVocabulary | None = None, *, max_shard_size: int | str = "2GB"
    ) -> None:
        """Write the encoder into a folder: config.json and safetensors files, valid together or not at all.

        Args:
            path: the folder; made if it is not there.
            vocabulary: kept with the encoder, for `SIDVocabulary.from_pretrained`.
            max_shard_size: bytes of a weights file, or a string such as "500MB"; larger tables are split by rows.

        Raises:
            ValueError: the vocabulary's codebooks are not the encoder's, or `max_shard_size` is no size.
            OSError: the folder cannot be written; what was in it is left as it was.
        """
        save_encoder(self, path, vocabulary, max_shard_size=max_shard_size)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        hidden_size: int | None = None,
        active_levels: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        verify: bool = True,
        backend: str = "auto",
        grad: str = "dense",
        deterministic: bool = False,
        dropout: float = 0.0,
    ) -> PrefixMem:
        """Read an encoder from its folder, or from that of a model or adapters saved with it attached.

        The tables are read in chunks from a memory map: memory for one copy of them is enough.

        Args:
            path: the folder.
            hidden_size: where it differs from the stored one, W_out starts afresh at this width.
            active_levels: prefix lengths at which the memory is read, where they are to differ from the stored ones;
                the rows are the same.
            device, dtype: of the parameters; by default the stored dtype, on the default device.
            verify: compare the SHA-256 of each tensor with the stored one; one more pass over the files.
            backend, grad, deterministic, dropout: see `PrefixMem`.

        Raises:
            FileNotFoundError: no encoder is there.
            CheckpointError: a ValueError; a file is damaged, cut or missing, or of another version.
        """
        how = {"backend": backend, "grad": grad, "deterministic": deterministic, "dropout": dropout}
        return load_encoder(
            cls, path, hidden_size=hidden_size, active_levels=active_levels, device=device, dtype=dtype, verify=verify,
            **how,
        )  # fmt: skip

    def forward(self, codes: Tensor) -> Tensor:
        """m of every level: integer ``[..., L]`` to ``[..., L, hidden_size]``, zero at inactive levels."""
        spec = self.config.spec
        encoded = self.out_proj(self._drop(self.memory(codes)))  # [..., A, hidden]
        if len(spec.active_levels) == spec.levels:
            return encoded
        by_level = dict(zip(spec.active_levels, encoded.unbind(-2), strict=True))
        zero = torch.zeros_like(encoded[..., 0, :])
        return torch.stack([by_level.get(level, zero) for level in range(1, spec.levels + 1)], dim=-2)

    def encode_tokens(
        self,
        input_ids: Tensor,
        vocabulary: SIDVocabulary,
        segment_ids: Tensor | None = None,
        *,
        new_tokens: int | None = None,
    ) -> Tensor:
        """m over a token stream, to add to the model's input embeddings.

        Args:
            input_ids: int32 or int64 ``[B, T]``.
            vocabulary: which ids are which codes; its codebooks must be the spec's.
            segment_ids: int32 or int64 ``[B, T]`` where rows hold several packed sequences.
            new_tokens: how many of the last tokens to encode; those before say what the new ones continue.

        Returns:
            ``[B, T, hidden_size]``, or the last `new_tokens` of them; zero at text, at inactive levels and at tokens
            of broken SIDs.
        """
        S = self.memory.read_tokens(input_ids, vocabulary, segment_ids)
        return self.out_proj(self._drop(S if new_tokens is None else S[:, S.shape[1] - new_tokens :]))

    def _drop(self, S: Tensor) -> Tensor:
        if not self.training or not self.dropout:
            return S
        return S * nn.functional.dropout(S.new_ones(*S.shape[:-1], 1), self.dropout)
