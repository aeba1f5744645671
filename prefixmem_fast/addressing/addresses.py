"""The rows of a Semantic ID, in plain PyTorch: the definition that every kernel is held against.

For order n and head h of a prefix (c_1 .. c_n), see `spec.py`:

    hashed order:  row = offset[n, h] + ( XOR_i c_i * p[i, h] ) mod T_n
    exact order:   row = offset[n, h] + ( .. (c_1 * K_2 + c_2) * K_3 + .. ) * K_n + c_n

A code below 0 or at least K_l ends the prefix: an order whose window reaches that level has row -1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .spec import AddressSpec


def prefix_rows(codes: Tensor, spec: AddressSpec) -> Tensor:
    """Row in the fused table of every level, order and head.

    Args:
        codes: integer ``[..., L]``.

    Returns:
        int64 ``[..., L, N, H]``; -1 where the order does not exist at the level or the prefix has ended.
    """
    return _rows_of_levels(codes, spec, range(1, spec.levels + 1))


def active_rows(codes: Tensor, spec: AddressSpec) -> Tensor:
    """`prefix_rows` of the active levels: ``[..., A, N, H]``."""
    return _rows_of_levels(codes, spec, spec.active_levels)


def _rows_of_levels(codes: Tensor, spec: AddressSpec, levels: Sequence[int]) -> Tensor:
    codes, length = cut_prefix(codes, spec)
    rows = codes.new_full((*codes.shape[:-1], len(levels), spec.max_order, spec.heads), -1)
    of_window: dict[tuple[int, int], Tensor] = {}  # levels of prefix mode read the same windows
    for place, level in enumerate(levels):
        for order in spec.orders_at(level):
            first, last = window = spec.window(level, order)  # of `order` codes
            if window not in of_window:
                alive = (length >= last)[..., None]
                read = codes[..., first - 1 : last].clamp(min=0)
                of_window[window] = torch.where(alive, order_rows(read, order, spec), -1)
            rows[..., place, order - 1, :] = of_window[window]
    return rows


def rows_at(codes: Tensor, level: Tensor, spec: AddressSpec) -> Tensor:
    """`active_rows` ``[..., A, N, H]`` of windows ``[..., L]`` at the level ``[...]``; -1 at every other one."""
    here = level[..., None] == level.new_tensor(spec.active_levels)  # [..., A]
    return torch.where(here[..., None, None], active_rows(codes, spec), -1)


def item_windows(codes: Tensor, spec: AddressSpec, history: int | None = None) -> Tensor:
    """The windows of the items of a history, which a spec with `history` reads.

    Args:
        codes: integer ``[..., items, L]``, items in the order in which they were met.
        history: in place of the spec's.

    Returns:
        ``[..., items + 1, 2L]``: for each item, and for the one that is to come, the codes of the item
        `history` before it and its own; -1 where there is none, or where an item between has ended early.
    """
    history = spec.history if history is None else history
    items = codes.shape[-2]
    none = codes.new_full((*codes.shape[:-2], history, codes.shape[-1]), -1)
    earlier = torch.cat([none, codes], -2)[..., : items + 1, :]
    whole = prefix_length(codes, spec.codebook_sizes) == spec.item_levels
    whole = torch.cat([torch.ones_like(none[..., 0], dtype=torch.bool), whole], -1)
    for back in range(1, history):
        between = whole[..., history - back : history - back + items + 1, None]
        earlier = torch.where(between, earlier, -1)
    return torch.cat([earlier, torch.cat([codes, none[..., :1, :]], -2)], -1)


def lagged_item_windows(codes: Tensor, spec: AddressSpec, lags: int) -> Tensor:
    """`item_windows` of the items `spec.history`, `spec.history` + 1, .. back: ``[..., items + 1, lags, 2L]``."""
    return torch.stack([item_windows(codes, spec, spec.history + back) for back in range(lags)], -2)


def first_codes(windows: Tensor, spec: AddressSpec, count: int | None) -> Tensor:
    """Windows ``[..., 2L]`` of `count` first codes of the earlier item: 0 for the others, which adds no hash."""
    if count is None:
        return windows
    codes = list(windows.unbind(-1))
    for l, size in enumerate(spec.codebook_sizes[count:], start=count):
        codes[l] = torch.where((codes[l] >= 0) & (codes[l].long() < size), 0, codes[l])
    return torch.stack(codes, -1)


def prefix_length(codes: Tensor, codebook_sizes: tuple[int, ...]) -> Tensor:
    """int64 ``[...]``: how many codes of ``[..., L]`` stand before one ends the prefix."""
    length = torch.zeros_like(codes[..., 0], dtype=torch.int64)
    alive = torch.ones_like(length, dtype=torch.bool)
    for code, size in zip(codes.unbind(-1), codebook_sizes, strict=True):
        alive = alive & (code >= 0) & (code.long() < size)  # a size may not fit the dtype of the codes
        length = length + alive
    return length


def cut_prefix(codes: Tensor, spec: AddressSpec) -> tuple[Tensor, Tensor]:
    """Codes as int64 ``[..., L]``, -1 from the end of the prefix on, and the length ``[...]`` of the prefix."""
    length = prefix_length(codes, spec.window_sizes)
    before_end = torch.arange(spec.levels, device=codes.device) < length[..., None]
    return torch.where(before_end, codes.long(), -1), length


def order_rows(window: Tensor, order: int, spec: AddressSpec) -> Tensor:
    """Rows ``[..., H]`` of the codes ``[..., order]``: mixed radix where the order is exact, else the hash."""
    if order in spec.exact_orders:
        index = torch.zeros_like(window[..., 0])
        for i in range(order):
            index = index * spec.window_sizes[i] + window[..., i]
        index = index[..., None]
    else:
        index = torch.zeros_like(window[..., :1])
        for i in range(order):
            index = index ^ (window[..., i, None] * window.new_tensor(spec.multipliers[i]))
        index = index % spec.rows_per_order[order - 1]
    return window.new_tensor(spec.offsets[order - 1]) + index
