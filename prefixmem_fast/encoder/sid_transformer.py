"""SID-Transformer: the comparator of PrefixMem (arXiv 2606.00324), in the same slot.

A causal transformer reads the codes of one Semantic ID as embeddings of their levels; its output at level l, projected,
is added to the input embedding of the token of c_l. It computes what PrefixMem looks up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..addressing import AddressSpec, TokenStream, prefix_length, token_codes
from ..operation.functions import check_codes, check_stream
from ..sid import SIDVocabulary
from .projection import Encoded, OutputProjection, last_tokens
from .saving import load_encoder, save_encoder


@dataclass(frozen=True)
class SIDTransformerConfig:
    """What a SID-Transformer is.

    Args:
        codebook_sizes: K_1 .. K_L.
        hidden_size: the width of the model's embeddings.
        width: of the transformer, a multiple of `heads`.
        layers, heads: of the transformer; the paper takes 4 layers.
        active_levels: prefix lengths at which it is added; None for all.
        output_init_std: standard deviation that W_out starts from.

    Raises:
        TypeError, ValueError: an argument is not as stated.
    """

    codebook_sizes: tuple[int, ...]
    hidden_size: int
    width: int = 128
    layers: int = 4
    heads: int = 4
    active_levels: tuple[int, ...] | None = None
    output_init_std: float = 1e-3

    def __post_init__(self) -> None:
        # The checks of codebooks and levels are those of an address spec.
        spec = AddressSpec(self.codebook_sizes, table_rows=1, max_order=1, heads=1, active_levels=self.active_levels)
        object.__setattr__(self, "codebook_sizes", _checks.codebook_sizes(self.codebook_sizes))
        object.__setattr__(self, "active_levels", spec.active_levels)
        for name in ("hidden_size", "width", "layers", "heads"):
            object.__setattr__(self, name, _checks.positive(name, getattr(self, name)))
        if self.width % self.heads:
            raise ValueError(f"width = {self.width} is no multiple of heads = {self.heads}")
        _checks.not_negative("output_init_std", self.output_init_std)

    def with_active_levels(self, active_levels: Sequence[int]) -> SIDTransformerConfig:
        """The same transformer, added at other levels."""
        return replace(self, active_levels=active_levels)

    @property
    def memory_dim(self) -> int:
        return self.width

    @property
    def levels(self) -> int:
        return len(self.codebook_sizes)

    @property
    def lookback(self) -> int:
        """How many tokens before a token are read with it."""
        return self.levels - 1

    @property
    def history(self) -> int:
        """How many items back it looks: every item is read by itself."""
        return 0

    def with_hidden_size(self, hidden_size: int) -> SIDTransformerConfig:
        """The same transformer for a model of another width."""
        return replace(self, hidden_size=hidden_size)

    def to_dict(self) -> dict[str, Any]:
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {"kind": "sid-transformer", **lists}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SIDTransformerConfig:
        values = dict(values)
        if values.pop("kind", None) != "sid-transformer":
            raise ValueError("the config is not one of a SID-Transformer")
        return cls(**values)


class SIDTransformer(nn.Module):
    """The comparator as a module; `attach` takes it in place of a `PrefixMem`."""

    config_class = SIDTransformerConfig

    def __init__(
        self,
        config: SIDTransformerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        factory = {"device": device, "dtype": dtype}
        self.codes = nn.Embedding(sum(config.codebook_sizes), config.width, **factory)
        self.levels = nn.Embedding(config.levels, config.width, **factory)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.width,
                config.heads,
                4 * config.width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
                **factory,
            )
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width, **factory)
        self.out_proj = OutputProjection(config, **factory)
        for table in (self.codes, self.levels):
            nn.init.normal_(table.weight, std=0.02)

    def reset_output(self) -> None:
        """Start W_out afresh, near zero."""
        self.out_proj.reset_parameters()

    def forward(self, codes: Tensor) -> Tensor:
        """Integer ``[..., L]`` to ``[..., L, hidden_size]``, zero at inactive levels; codes out of range end a SID."""
        config, shape = self.config, codes.shape
        check_codes(codes, config.levels)
        codes = codes.reshape(-1, config.levels).long()
        sizes = codes.new_tensor(config.codebook_sizes)
        length = prefix_length(codes, config.codebook_sizes)
        alive = torch.arange(config.levels, device=codes.device) < length[:, None]  # [M, L]
        x = self.codes(torch.where(alive, codes, 0) + sizes.cumsum(0) - sizes) + self.levels.weight
        if len(codes):  # attention over nothing is an error
            mask = nn.Transformer.generate_square_subsequent_mask(config.levels, x.device, x.dtype)
            for layer in self.layers:
                x = layer(x, mask, is_causal=True)
        active = torch.zeros(config.levels, dtype=torch.bool, device=x.device)
        active[[level - 1 for level in config.active_levels]] = True
        out = self.out_proj(self.norm(x)) * (alive & active)[..., None]
        return out.view(*shape, config.hidden_size)

    def encode_tokens(
        self,
        input_ids: Tensor,
        vocabulary: SIDVocabulary,
        segment_ids: Tensor | None = None,
        *,
        new_tokens: int | None = None,
    ) -> Tensor:
        """Over a token stream, as `PrefixMem.encode_tokens`: ``[B, T, hidden_size]``, zero at text."""
        vocabulary.check_codebooks(self.config)
        stream = TokenStream(input_ids, vocabulary.token_table(input_ids.device), segment_ids)
        check_stream(stream)
        codes, level = token_codes(stream, self.config.levels)
        inside = (level > 0).flatten()
        goes_on = torch.zeros_like(level, dtype=torch.bool)
        goes_on[:, :-1] = level[:, 1:] == level[:, :-1] + 1
        last = (level > 0) & ~goes_on  # of each SID
        encoded = self(codes[last])  # [M, L, hidden]
        sid = (level == 1).flatten().cumsum(0) - 1
        out = encoded.new_zeros(level.numel(), self.config.hidden_size)
        out[inside] = encoded[sid[inside], level.flatten()[inside] - 1]
        out = out.view(*level.shape, self.config.hidden_size)
        return out if new_tokens is None else last_tokens(out, new_tokens)

    def encode_stream(self, *stream: Any, **options: Any) -> Encoded:
        """`encode_tokens` as `PrefixMem.encode_stream` returns it: nothing is added to the last hidden states."""
        return Encoded(self.encode_tokens(*stream, **options))

    def save_pretrained(
        self, path: str | Path, vocabulary: SIDVocabulary | None = None, *, max_shard_size: int | str = "2GB"
    ) -> None:
        """Write it into a folder, see `PrefixMem.save_pretrained`."""
        save_encoder(self, path, vocabulary, max_shard_size=max_shard_size)

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> SIDTransformer:
        """Read it from a folder, see `PrefixMem.from_pretrained`: hidden_size, device, dtype, verify."""
        return load_encoder(cls, path, **options)
