"""What an encoder is: its address spec, its sizes and how it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .. import _checks
from .._choices import QUANTIZATIONS
from ..addressing import AddressSpec


@dataclass(frozen=True)
class PrefixMemConfig:
    """What an encoder is: its address spec, its sizes and how it starts.

    Args:
        spec: where every row lives.
        memory_dim: d_mem, columns of S; a multiple of `spec.heads`.
        hidden_size: columns of m, the width of the model's embeddings; None for tables without W_out.
        memory_init_std: standard deviation of the normal the tables start from. The paper does not give it.
        output_init_std: the same for W_out, "near zero" in the paper; 0 leaves a model's logits bit-identical.
        quantization: "int8" or "fp8" for tables of 8 bits a number, which serve and do not train; see
            `PrefixMem.quantize`.

    Raises:
        TypeError, ValueError: an argument is not as stated, or the table's elements do not fit 63 bits.
    """

    spec: AddressSpec
    memory_dim: int = 256
    hidden_size: int | None = None
    memory_init_std: float = 0.02
    output_init_std: float = 1e-3
    quantization: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.spec, AddressSpec):
            raise TypeError(f"spec is a {type(self.spec).__name__}; give an AddressSpec")
        object.__setattr__(self, "memory_dim", _checks.positive("memory_dim", self.memory_dim))
        if self.hidden_size is not None:
            object.__setattr__(self, "hidden_size", _checks.positive("hidden_size", self.hidden_size))
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
            _checks.not_negative(name, getattr(self, name))
        if self.quantization is not None:
            _checks.choice("quantization", self.quantization, QUANTIZATIONS)

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
        values = {**{k: v for k, v in asdict(self).items() if k != "spec"}, "spec": self.spec.to_dict()}
        if self.quantization is None:
            del values["quantization"]  # releases that do not know it read the rest
        return values

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
