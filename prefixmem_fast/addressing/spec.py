"""The address spec: one frozen object that says in which row of the fused table every prefix lives.

For a prefix (c_1 .. c_l), order n and head h (PrefixMem, arXiv 2606.00324):

    hashed order:  idx = ( XOR_{i=1..n} c_i * p[i, h] ) mod T_n
    exact order:   idx = ( .. (c_1 * K_2 + c_2) * K_3 + .. ) * K_n + c_n        (mixed radix, c_1 most significant)
    row          = offsets[n, h] + idx

Cross-item orders, an addition to the paper, read a longer prefix in the same way: the L codes of an item met before,
then those of this item up to c_l. `AddressSpec.cross_item` makes such a spec.

Every backend reads this object; none derives an address by other means.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from .. import _checks
from .._choices import ADDRESSING, MODES, MOST_HISTORY
from .primes import draw_primes

VERSIONS = (1, 2)  # 2 has `history`; rows of a version never change

# Multipliers below about 5e4 leave part of a table empty; from there on occupancy is near ideal.
_SMALLEST_PRIME = 50_000
# Above this many rows a 31-bit product wraps too few times for its remainders to be uniform.
_MOST_ROWS_31_BITS = 1 << 26
_INT64_MAX = (1 << 63) - 1
# Far above what anybody uses (4 orders of 4 heads in the paper), and derived within a second.
MOST_LEVELS = 1024
_MOST_PRIMES = 4096


@dataclass(frozen=True)
class AddressSpec:
    """Where every memory row lives.

    Levels, positions and orders count from 1 in this text; L is the number of codebooks, N is `max_order`.

    With `history` = k >= 1 the codes that are read are a window of 2L: those of the item k back, then those of this
    item. Its levels 1 .. L are the codes of the former, and level L + l is c_l of the latter. Level L stands for the
    empty prefix of an item, and is read at the last token of the item before it.

    Args:
        codebook_sizes: K_1 .. K_L, the number of codes at each level; L <= 1024.
        max_order: N, the longest n-gram. Orders above L exist at no level and hold no rows.
        heads: H, independent hashes for each order; N x H <= 4096.
        table_rows: T, rows of each hashed table: one number, or one for each of the N orders.
        mode: which n-gram order n reads at level l.
            ``"prefix"``: the first n codes, at every level l >= n (the same row at each).
            ``"suffix"``: the last n codes, at every level l >= n; always hashed.
            ``"full"``: the whole prefix; at level l only order n = l exists, and nothing above level N.
        addressing: ``"auto"`` addresses an order exactly where the product of its codebook sizes is at most T_n, in a
            table of exactly that many rows; ``"hash"`` hashes every order, as the paper does.
        active_levels: the prefix lengths at which the memory is read, strictly increasing; None means every level.
            With `history`, levels of the window from L to 2L - 1, and None means all of these.
        seed: seed of the primes, 0 <= seed < 2^64.
        version: of the derivation of rows; None takes the lowest that has what is asked for: 2 with `history`, else 1.
        history: how many items back the window begins; 0, as in the paper, for windows of one item. More than 0 needs
            ``mode="full"``, and orders below L, which no level reads, hold no rows.
        part: (first, of) where these heads are some of another spec's `of`, counted from 0; see `for_heads`.

    Derived attributes:
        levels: codes of a window: L, or 2L with `history`.
        item_levels: L.
        window_sizes: codebook sizes of all levels of a window.
        multipliers: the primes p, ``[position][head]``, N x H, all distinct.
        product_bits: 31 or 63; every c * p is below 2 to that power. Both widths give the same rows.
        exact_orders: the orders that are addressed exactly, ascending.
        rows_per_order: rows of one head's table, for each order.
        offsets: first row of each table, ``[order][head]``; tables lie in blocks by (order, head).
        total_rows: rows of all tables together.
        key: canonical JSON of `to_dict()`.

    Raises:
        TypeError: an argument is not of the stated type.
        ValueError: an argument is outside the stated range, or the tables hold 2^63 rows or more.

    The paper leaves the primes and the meaning of "active at levels 4 and 5" open. Assumed here: primes drawn from a
    seeded generator, code 0 not shifted, and `active_levels=(3, 4)` for that phrase (it predicts levels 4 and 5).
    """

    codebook_sizes: Sequence[int]
    max_order: int = 4
    heads: int = 4
    table_rows: int | Sequence[int] = 2_000_000
    mode: str = "prefix"
    addressing: str = "auto"
    active_levels: Sequence[int] | None = None
    seed: int = 0
    version: int | None = None
    history: int = 0
    part: Sequence[int] | None = None

    levels: int = field(init=False, repr=False, compare=False)
    item_levels: int = field(init=False, repr=False, compare=False)
    window_sizes: tuple[int, ...] = field(init=False, repr=False, compare=False)
    multipliers: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)
    product_bits: int = field(init=False, repr=False, compare=False)
    exact_orders: tuple[int, ...] = field(init=False, repr=False, compare=False)
    rows_per_order: tuple[int, ...] = field(init=False, repr=False, compare=False)
    offsets: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)
    total_rows: int = field(init=False, repr=False, compare=False)
    key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._validate()
        self._derive()

    def __hash__(self) -> int:
        return hash(self.key)  # a string keeps its hash, a tuple of the fields does not

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _validate(self) -> None:
        sizes = _checks.codebook_sizes(self.codebook_sizes)
        if len(sizes) > MOST_LEVELS:
            raise ValueError(f"codebook_sizes has {len(sizes)} levels; give {MOST_LEVELS} at most")
        history = _checks.integer("history", self.history)
        if not 0 <= history <= MOST_HISTORY:
            raise ValueError(f"history = {history} is outside 0..{MOST_HISTORY}; 1 is the item before")
        if history and self.mode != "full":
            raise ValueError(
                f"history = {history} with mode = {self.mode!r}: cross-item orders read a whole window; give "
                "mode='full', or take AddressSpec.cross_item"
            )
        max_order = _checks.positive("max_order", self.max_order)
        heads = _checks.positive("heads", self.heads)
        part = None if self.part is None else _checks.integers("part", self.part)
        if part is not None and (len(part) != 2 or not 0 <= part[0] <= part[1] - heads):
            raise ValueError(
                f"part = {part} with heads = {heads}; give (first, of), with first + heads of `of` at most"
            )
        hashes = heads if part is None else part[1]
        if max_order * hashes > _MOST_PRIMES:
            raise ValueError(
                f"max_order = {max_order} times heads = {hashes} is above {_MOST_PRIMES}, the most primes of a spec; "
                "lower one of them"
            )

        rows = self.table_rows
        if hasattr(rows, "__iter__"):
            rows = _checks.integers("table_rows", rows)
            if len(rows) != max_order:
                raise ValueError(
                    f"table_rows has {len(rows)} entries, max_order is {max_order}; "
                    "give one number, or one for each order"
                )
        else:
            rows = (_checks.integer("table_rows", rows),) * max_order
        if min(rows) < 1:
            raise ValueError(f"table_rows = {self.table_rows!r} holds a value below 1; every order needs a row")

        _checks.choice("mode", self.mode, MODES)
        _checks.choice("addressing", self.addressing, ADDRESSING)
        active = tuple(range(len(sizes), 2 * len(sizes)) if history else range(1, len(sizes) + 1))
        if self.active_levels is not None:
            active = _ascending_levels(self.active_levels, active, "levels")
        seed = _checks.integer("seed", self.seed)
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed = {seed} is outside 0..2^64 - 1")
        version = (2 if history else 1) if self.version is None else self.version
        if type(version) is not int or version not in VERSIONS:
            raise ValueError(
                f"version = {version!r} is unknown; this release knows versions {' and '.join(map(str, VERSIONS))}; "
                "install the release that wrote the spec"
            )
        if version != (2 if history else 1):
            raise ValueError(f"version = {version} with history = {history}; leave version out")
        self._set(
            codebook_sizes=sizes,
            max_order=max_order,
            heads=heads,
            table_rows=rows,
            active_levels=active,
            seed=seed,
            version=version,
            history=history,
            part=part,
        )

    def _derive(self) -> None:
        orders, heads = self.max_order, self.heads
        sizes = self.codebook_sizes * (2 if self.history else 1)
        exact, rows = [], []
        for n, table in enumerate(self.table_rows, 1):
            prefixes = math.prod(sizes[:n])
            if n > len(sizes) or (self.history and n < len(self.codebook_sizes)):
                rows.append(0)
            elif self.addressing == "auto" and self.mode != "suffix" and prefixes <= table:
                exact.append(n)
                rows.append(prefixes)
            else:
                rows.append(table)
        starts = [heads * total for total in accumulate(rows, initial=0)]
        if starts[-1] > _INT64_MAX:
            raise ValueError(
                f"the tables hold {starts[-1]} rows, more than 2^63 - 1; lower table_rows, max_order or heads"
            )
        self._set(
            levels=len(sizes),
            item_levels=len(self.codebook_sizes),
            window_sizes=sizes,
            exact_orders=tuple(exact),
            rows_per_order=tuple(rows),
            offsets=tuple(tuple(starts[n] + h * rows[n] for h in range(heads)) for n in range(orders)),
            total_rows=starts[-1],
        )
        low, high, bits = self._prime_range()
        first, of = self.place
        primes = draw_primes(orders * of, low, high, self.seed)
        of_position = [primes[i * of : (i + 1) * of] for i in range(orders)]
        self._set(product_bits=bits, multipliers=tuple(tuple(own[first : first + heads]) for own in of_position))
        self._set(key=json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":")))

    def _prime_range(self) -> tuple[int, int, int]:
        """Primes of the upper half of what the product width allows: the high bits of XOR are then all in use."""
        count = self.max_order * self.place[1]
        code_bits = (max(self.codebook_sizes) - 1).bit_length()
        for bits in (31, 63):
            high = 1 << max(bits - code_bits, 0)
            low = max(_SMALLEST_PRIME, high // 2)
            if bits == 31 and max(self.rows_per_order) > _MOST_ROWS_31_BITS:
                continue
            if high - low >= 64 * count:
                return low, high, bits
        raise ValueError(
            f"codebook_sizes holds {max(self.codebook_sizes)}: no {count} primes above {_SMALLEST_PRIME} keep "
            "code x prime below 2^63; use smaller codebooks"
        )

    @classmethod
    def cross_item(
        cls,
        codebook_sizes: Sequence[int],
        *,
        history: int = 1,
        heads: int = 4,
        table_rows: int | Sequence[int] = 2_000_000,
        active_levels: Sequence[int] | None = None,
        seed: int = 0,
    ) -> AddressSpec:
        """The spec of cross-item orders: rows keyed by (the whole SID of an item met before, the prefix so far).

        Args:
            codebook_sizes: of one item.
            history: which item: 1 is the one before.
            heads, seed: see `AddressSpec`.
            table_rows: T, rows of each hashed table: one number, or one for each prefix length 0 .. L - 1.
            active_levels: prefix lengths of the item at which the memory is read, of 0 .. L - 1, strictly increasing;
                0 is the last token of the item before, where c_1 is predicted. None means all of them.

        Raises:
            TypeError, ValueError: an argument is not as stated.
        """
        sizes = _checks.codebook_sizes(codebook_sizes)
        levels = len(sizes)
        if active_levels is not None:
            lengths = _ascending_levels(active_levels, range(levels), "prefix lengths")
            active_levels = [levels + length for length in lengths]
        if hasattr(table_rows, "__iter__"):
            table_rows = _checks.integers("table_rows", table_rows)
            if len(table_rows) != levels:
                raise ValueError(
                    f"table_rows has {len(table_rows)} entries; give one number, or one for each prefix length of "
                    f"0..{levels - 1}"
                )
            table_rows = (1,) * (levels - 1) + table_rows
        if _checks.integer("history", history) < 1:
            raise ValueError(f"history = {history}; give 1 for the item before, or more")
        return cls(
            sizes,
            max_order=2 * levels - 1,
            heads=heads,
            table_rows=table_rows,
            mode="full",
            active_levels=active_levels,
            seed=seed,
            history=history,
        )

    def for_heads(self, start: int, stop: int) -> AddressSpec:
        """The spec of some of the heads: the same rows within each table, in a fused table of theirs alone.

        Columns ``start * w .. stop * w`` of S are what it reads. Parts by heads hold whole rows, so row-wise optimizers
        update them as they update the whole.

        Args:
            start, stop: ``start <= h < stop``, heads counted from 0.

        Raises:
            TypeError, ValueError: they are not 0 <= start < stop <= H.
        """
        start, stop = _checks.integer("start", start), _checks.integer("stop", stop)
        if not 0 <= start < stop <= self.heads:
            raise ValueError(f"start = {start} and stop = {stop}; give 0 <= start < stop <= {self.heads}, the heads")
        first, of = self.place
        part = None if stop - start == of else (first + start, of)
        return replace(self, heads=stop - start, part=part)

    @property
    def place(self) -> tuple[int, int]:
        """The first of these heads among all, and how many all are: `part`, or 0 and H."""
        return self.part or (0, self.heads)

    @property
    def _first_order(self) -> int:
        return self.item_levels if self.history else 1

    @property
    def gap(self) -> int:
        """Tokens of the items that stand between the two of a window, and are not read."""
        return max(self.history - 1, 0) * self.item_levels

    def orders_at(self, level: int) -> tuple[int, ...]:
        """The orders that exist at `level` (1..L), ascending."""
        if self.mode == "full":
            return (level,) if self._first_order <= level <= self.max_order else ()
        return tuple(range(1, min(level, self.max_order) + 1))

    def window(self, level: int, order: int) -> tuple[int, int]:
        """First and last position (1..L, inclusive) of the codes that `order` reads at `level`.

        The row exists where no code up to the last position has ended the prefix. The i-th code of the window is
        multiplied by the primes of position i.
        """
        return (level - order + 1, level) if self.mode == "suffix" else (1, order)

    def to_dict(self) -> dict[str, Any]:
        """All arguments and all that is derived from them: enough to recompute every row without this package."""
        return {
            "version": self.version,
            **({"history": self.history} if self.history else {}),
            "codebook_sizes": list(self.codebook_sizes),
            "max_order": self.max_order,
            "heads": self.heads,
            "table_rows": list(self.table_rows),
            "mode": self.mode,
            "addressing": self.addressing,
            "active_levels": list(self.active_levels),
            "seed": self.seed,
            **({"part": list(self.part)} if self.part else {}),
            "multipliers": [list(row) for row in self.multipliers],
            "exact_orders": list(self.exact_orders),
            "rows_per_order": list(self.rows_per_order),
            "offsets": [list(row) for row in self.offsets],
            "total_rows": self.total_rows,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AddressSpec:
        """Rebuild a spec from `to_dict()`, or from arguments alone.

        Raises:
            TypeError: `values` is not a dict.
            ValueError: a key is unknown, an argument is missing beside derived entries, or a derived entry differs.
        """
        if not isinstance(values, dict):
            raise TypeError(f"the address spec is a {type(values).__name__}; give the dict that to_dict() returned")
        arguments = [name for name, f in cls.__dataclass_fields__.items() if f.init]
        # A default that fills a gap in a written spec would quietly move rows.
        needed = ["codebook_sizes"] if set(values) <= set(arguments) else arguments
        if values.get("version") == 1:
            needed = [name for name in needed if name != "history"]
        needed = [name for name in needed if name != "part"]
        missing = [name for name in needed if name not in values]
        if missing:
            raise ValueError(f"the address spec lacks {', '.join(missing)}; it has {', '.join(map(str, values))}")
        spec = cls(**{name: values[name] for name in arguments if name in values})
        own = spec.to_dict()
        for name, value in values.items():
            if name not in own:
                raise ValueError(f"the address spec has an unknown entry {name!r}; known are {sorted(own)}")
            if name not in arguments and value != own[name]:
                raise ValueError(f"the address spec gives {name} = {value}, but its arguments derive {own[name]}")
        return spec


def _ascending_levels(given: Any, allowed: Sequence[int], what: str) -> tuple[int, ...]:
    given = _checks.integers("active_levels", given)
    if not given or any(level not in allowed for level in given) or sorted(set(given)) != list(given):
        raise ValueError(
            f"active_levels = {given} is not allowed; give strictly increasing {what} of {allowed[0]}..{allowed[-1]}, "
            "or None for all of them"
        )
    return given
