"""What an encoder is: its address spec, its sizes and how it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from .. import _checks
from .._choices import QUANTIZATIONS
from ..addressing import AddressSpec
from ..addressing.spec import MOST_HISTORY


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
        lags: of cross-item orders: how many items, from `spec.history` back on, the same rows are read for. Their rows
            are summed with a learned weight for each, which starts at 2^-lag. Not in the paper.
        earlier_codes: of cross-item orders: the rows are keyed by that many first codes of the earlier item in place of
            its whole SID, so that the items that share them share rows; 1 .. L - 1. Not in the paper.
        output_slot: whether the memory is also added to the model's last hidden states, before its output layer, by a
            projection of its own, W_head. Not in the paper.
        cross_item: further tables, whose spec is of `AddressSpec.cross_item`, with a W_out of their own; their m is
            added. They may have such a config themselves, of another `history`. Not in the paper.

    Raises:
        TypeError, ValueError: an argument is not as stated, or the table's elements do not fit 63 bits.
    """

    spec: AddressSpec
    memory_dim: int = 256
    hidden_size: int | None = None
    memory_init_std: float = 0.02
    output_init_std: float = 1e-3
    quantization: str | None = None
    lags: int = 1
    earlier_codes: int | None = None
    output_slot: bool = False
    cross_item: PrefixMemConfig | None = None

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
        _checks.boolean("output_slot", self.output_slot)
        object.__setattr__(self, "lags", _checks.positive("lags", self.lags))
        if self.lags > 1 and not self.spec.history:
            raise ValueError(f"lags = {self.lags} with a spec of history = 0; give one of AddressSpec.cross_item")
        if self.spec.history + self.lags - 1 > MOST_HISTORY:
            raise ValueError(
                f"lags = {self.lags} from history = {self.spec.history} on is above {MOST_HISTORY} items back"
            )
        if self.earlier_codes is not None:
            most = self.levels - 1 if self.spec.history else 0
            if not 1 <= _checks.integer("earlier_codes", self.earlier_codes) <= most:
                allowed = (
                    f"give 1..{most}, or None for whole items" if most else "leave it out: no earlier item has less"
                )
                raise ValueError(f"earlier_codes = {self.earlier_codes}; {allowed}")
        if self.cross_item is not None:
            self._check_cross_item()

    def _check_cross_item(self) -> None:
        given = self.cross_item
        if not isinstance(given, PrefixMemConfig):
            raise TypeError(f"cross_item is a {type(given).__name__}; give a PrefixMemConfig, or None")
        if not given.spec.history:
            raise ValueError("cross_item has a spec with history = 0; give one of AddressSpec.cross_item")
        if given.codebook_sizes != self.codebook_sizes:
            raise ValueError(
                f"cross_item has codebook_sizes {given.codebook_sizes}, the spec {self.codebook_sizes}; give the same"
            )
        if given.hidden_size is None:
            object.__setattr__(self, "cross_item", replace(given, hidden_size=self.hidden_size))
        for name in ("hidden_size", "quantization"):
            if getattr(self.cross_item, name) != getattr(self, name):
                raise ValueError(
                    f"cross_item has {name} = {getattr(given, name)!r}, the encoder {getattr(self, name)!r}; give the "
                    "same"
                )

    def with_hidden_size(self, hidden_size: int) -> PrefixMemConfig:
        """The same tables for a model of another width."""
        cross_item = None if self.cross_item is None else self.cross_item.with_hidden_size(hidden_size)
        return replace(self, hidden_size=hidden_size, cross_item=cross_item)

    def with_quantization(self, quantization: str | None) -> PrefixMemConfig:
        """The same tables in another number format."""
        cross_item = None if self.cross_item is None else self.cross_item.with_quantization(quantization)
        return replace(self, quantization=quantization, cross_item=cross_item)

    def with_active_levels(self, active_levels: Sequence[int]) -> PrefixMemConfig:
        """The same tables, read at other prefix lengths; those of `cross_item` at the same as before."""
        if self.spec.history:  # levels of a window count the earlier item's codes
            active_levels = [self.spec.item_levels + level for level in active_levels]
        return replace(self, spec=replace(self.spec, active_levels=active_levels))

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return self.spec.codebook_sizes

    @property
    def levels(self) -> int:
        """L, codes of one item."""
        return self.spec.item_levels

    @property
    def lookback(self) -> int:
        """How many tokens before a token say which rows it reads."""
        spec = self.spec
        between = spec.gap + (self.lags - 1) * spec.item_levels
        own = spec.active_levels[-1] + between - 1 if spec.history else spec.levels - 1
        return max(own, self.cross_item.lookback) if self.cross_item else own

    @property
    def history(self) -> int:
        """How many items back the tables look; 0 where every item is read by itself."""
        own = self.spec.history + self.lags - 1 if self.spec.history else 0
        return max(own, self.cross_item.history if self.cross_item else 0)

    @property
    def row_width(self) -> int:
        """w = memory_dim / heads, columns of one row of the fused table."""
        return self.memory_dim // self.spec.heads

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["spec"] = self.spec.to_dict()
        if self.cross_item is not None:
            values["cross_item"] = self.cross_item.to_dict()
        for name, default in (
            ("quantization", None),
            ("lags", 1),
            ("earlier_codes", None),
            ("output_slot", False),
            ("cross_item", None),
        ):
            if values[name] == default:  # releases that do not know it read the rest
                del values[name]
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
        values = {**values, "spec": AddressSpec.from_dict(values["spec"])}
        if values.get("cross_item") is not None:
            values["cross_item"] = cls.from_dict(values["cross_item"])
        return cls(**values)
