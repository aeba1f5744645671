"""Semantic IDs in a token stream, in plain PyTorch: the one definition of which tokens form a Semantic ID.

A token of level l belongs to a SID where the l - 1 tokens before it have the levels 1 .. l - 1 in that order, in the
same row and, where segments are given, in the same segment. Everything else is text.

Cross-item orders read an earlier item where its tokens, and those of the items between, stand directly before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .spec import AddressSpec


class TokenStream(NamedTuple):
    """Tokens of a language model.

    Attributes:
        input_ids: integer ``[B, T]``; ids outside 0 .. V - 1 are text.
        token_table: integer ``[V, 2]``, (level, code) of each vocabulary id; level 0 is text.
        segment_ids: integer ``[B, T]``, equal within one packed sequence; None where rows are not packed.
    """

    input_ids: Tensor
    token_table: Tensor
    segment_ids: Tensor | None = None


def token_entries(input_ids: Tensor, token_table: Tensor) -> tuple[Tensor, Tensor]:
    """Level and code, int64, of token ids of any shape; 0 and 0 for text."""
    known = (input_ids >= 0) & (input_ids < token_table.shape[0])
    if not token_table.shape[0]:
        return known.long(), known.long()
    entries = token_table[torch.where(known, input_ids, 0).long()].long()
    return torch.where(known[..., None], entries, 0).unbind(-1)


def token_codes(stream: TokenStream, levels: int) -> tuple[Tensor, Tensor]:
    """Recognise the Semantic IDs of a token stream ``[B, T]``.

    Args:
        levels: L, codes of a whole SID.

    Returns:
        codes: int64 ``[B, T, L]``, the codes of the SID up to the token, then -1.
        level: int64 ``[B, T]``, the level of the token within its SID, 0 for text.
    """
    token_level, token_code = token_entries(stream.input_ids, stream.token_table)
    level = torch.zeros_like(token_level)
    codes = level.new_full((*level.shape, levels), -1)
    in_sid = token_level == 1
    for l in range(1, levels + 1):
        if l > 1:
            in_sid = _shift(in_sid, False) & (token_level == l)
            if stream.segment_ids is not None:
                in_sid = in_sid & _same_segment(stream, 1)
            codes = torch.where(in_sid[..., None], _shift(codes, -1), codes)
        codes[..., l - 1] = torch.where(in_sid, token_code, codes[..., l - 1])
        level = torch.where(in_sid, l, level)
    return codes, level


def window_codes(stream: TokenStream, spec: AddressSpec, history: int | None = None) -> tuple[Tensor, Tensor]:
    """The windows that end at the tokens of a stream ``[B, T]``; see `AddressSpec`.

    Args:
        history: in place of the spec's; both are 1 at least.

    Returns:
        codes: int64 ``[B, T, spec.levels]``, the codes of the window up to the token, then -1.
        level: int64 ``[B, T]``, the level of the token within its window, 0 where there is none.
    """
    L = spec.item_levels
    codes, level = token_codes(stream, L)
    if not spec.history:
        return codes, level
    history = history or spec.history
    whole = level == L
    items = whole.long()  # whole items that end here, one directly after the other
    for _ in range(history - 1):
        items = torch.where(whole & _same_segment(stream, L), 1 + _shift(items, 0, L), whole.long())
    windows = codes.new_full((*level.shape, spec.levels), -1)
    place = torch.zeros_like(level)
    for l in range(L):  # codes of this item; without one the token is the last of the item before
        ends_before = (items if l == 0 else _shift(items, 0, l)) >= history
        here = ends_before & (whole if l == 0 else (level == l) & _same_segment(stream, l))
        earlier = _shift(codes, -1, l + (history - 1) * L)
        own = codes if l else torch.full_like(codes, -1)
        windows = torch.where(here[..., None], torch.cat([earlier, own], -1), windows)
        place = torch.where(here, L + l, place)
    return windows, place


class StreamSIDs(NamedTuple):
    """The SIDs of a token stream, one after another, so that text needs no place.

    Attributes:
        codes: int64 ``[M, spec.levels]``, each up to its deepest active level, then -1.
        tokens: int64 ``[M, A]``, the token of each active level in ``[B * T]``; B * T where the stream has none.
    """

    codes: Tensor
    tokens: Tensor


def stream_sids(stream: TokenStream, spec: AddressSpec) -> StreamSIDs:
    """The SIDs of a stream ``[B, T]`` that are read at an active level, in the stream's order.

    `prefix_memory` of their codes, put at their tokens, is `token_memory` of the stream. How many they are the host has
    to know, so a GPU is waited for.
    """
    codes, level = window_codes(stream, spec)
    active = torch.tensor(spec.active_levels, device=level.device)
    deepest = torch.zeros(spec.levels + 1, dtype=torch.int64)  # active level up to each level, 0 for none
    for a in spec.active_levels:
        deepest[a:] = a
    deepest = deepest.to(level.device)
    goes_on = torch.zeros_like(level, dtype=torch.bool)
    goes_on[:, :-1] = (level[:, :-1] > 0) & (level[:, 1:] == level[:, :-1] + 1)
    (last,) = ((deepest[level] > 0) & ~goes_on).flatten().nonzero(as_tuple=True)
    level, codes = level.flatten()[last], codes.flatten(0, 1)[last]
    within = torch.arange(spec.levels, device=level.device) < deepest[level][:, None]
    tokens = last[:, None] - level[:, None] + active
    return StreamSIDs(torch.where(within, codes, -1), torch.where(active <= level[:, None], tokens, goes_on.numel()))


class LaggedWindows(NamedTuple):
    """Windows that end in the same codes and begin in the items `spec.history`, `spec.history` + 1, .. back.

    Attributes:
        codes: int64 ``[B, W, lags, 2L]``: for each whole item of a row, or those that the last tokens need, the codes
            of the items back, and those of the item that follows it directly; -1 where there is none.
        place: int64 ``[B, T]``, or of the last tokens: which of the ``W x A`` sums of its row is that of a token, with
            A active levels a window; ``W x A`` where it has none.
    """

    codes: Tensor
    place: Tensor


def lagged_windows(stream: TokenStream, spec: AddressSpec, lags: int, new_tokens: int | None = None) -> LaggedWindows:
    """The windows of `lags` items that share their rows, of the last `new_tokens` of a stream ``[B, T]``, or of all.

    Shapes do not depend on the tokens: W is T // L, or the most items that end in or just before the last tokens.
    """
    L, active = spec.item_levels, spec.active_levels
    codes, level = token_codes(stream, L)
    (B, T), device = level.shape, level.device
    count = T // L  # whole items of a row, at most
    whole = level == L
    nth = torch.where(whole, whole.long().cumsum(1) - 1, count)
    tokens = torch.arange(T, device=device).expand(B, T)
    end = tokens.new_full((B, count + 1), T).scatter(1, nth, tokens)[:, :count]  # the last token of each; T for none

    def at(values: Tensor, fill: int, ahead: int = 0) -> Tensor:
        """Values ``[B, T]`` that many tokens after the end of each item, `fill` past the row."""
        return torch.nn.functional.pad(values, (0, 1), value=fill).gather(1, (end + ahead).clamp(max=T))

    items = torch.stack([at(code, -1) for code in codes.unbind(-1)], -1)
    segments = torch.zeros_like(level) if stream.segment_ids is None else stream.segment_ids
    segment = at(segments, 0)
    own, here = torch.full_like(items, -1), end < T
    place = level.new_full((B, T + 1), count * len(active))
    first = torch.arange(count, device=device).expand(B, count) * len(active)
    for l in range(L):  # the token l after the end
        if l:
            here = here & (at(level, 0, l) == l) & (at(segments, 0, l) == segment)
            own[..., l - 1] = torch.where(here, at(codes[..., l - 1], -1, l), -1)
        if L + l in active:
            place.scatter_(1, torch.where(here, end + l, T), first + active.index(L + l))
    follows = _shift(end, -L - 1) == end - L  # directly on the item before it
    follows &= (_shift(segment, 0) == segment) & (end < T)
    windows, connected = [], torch.ones_like(follows)
    for back in range(spec.history + lags - 1):  # items before the one that has just ended
        if back:
            connected = connected & _shift(follows, False, back - 1)
        if back + 1 >= spec.history:
            windows.append(torch.cat([torch.where(connected[..., None], _shift(items, -1, back), -1), own], -1))
    windows, place = torch.stack(windows, 2), place[:, :T]
    wanted = count if new_tokens is None else min(count, (new_tokens + 2 * (L - 1)) // L)
    if wanted < count:  # they end in the new tokens or less than L before
        first = (whole.sum(1, keepdim=True) - wanted).clamp(min=0)  # [B, 1]
        chosen = first + torch.arange(wanted, device=device)
        windows = windows.gather(1, chosen[..., None, None].expand(-1, -1, lags, 2 * L))
        place = torch.where(place < count * len(active), place - first * len(active), wanted * len(active))
    return LaggedWindows(windows, place if new_tokens is None else place[:, T - new_tokens :])


def _same_segment(stream: TokenStream, back: int) -> Tensor:
    """Where the token `back` before stands in the same row and segment: bool ``[B, T]``."""
    there = _shift(torch.ones_like(stream.input_ids, dtype=torch.bool), False, back)
    segments = stream.segment_ids
    return there if segments is None else there & (segments == _shift(segments, 0, back))


def _shift(x: Tensor, fill: bool | int, by: int = 1) -> Tensor:
    """Move every entry `by` tokens to the right, `fill` coming in from the left."""
    # Exported, a slice that is as long as x needs no bound on how short rows may be.
    return torch.cat([x.new_full((x.shape[0], by, *x.shape[2:]), fill), x], 1)[:, : x.shape[1]]
