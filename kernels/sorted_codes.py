"""One stable sort of the codes serves all orders of prefix and full mode, because prefixes nest.

Sorted by their codes, the SIDs that share a prefix stand side by side, for every order at once. A SID's place is its
index among the sorted ones. `differs[i]` is the first order at which the SID at place i differs from the one before it:
a run of order n, the SIDs of one prefix, ends before place i where differs[i] <= n. Its row stands at its last place.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixmem_fast._launch import Launch, of_a_kind
from prefixmem_fast.addressing import AddressSpec

from .address import address_of, load_sid_codes, order_rows
from .shared_rows import Claims, claim
from .tiles import LAUNCH, Device, blocks, current_device, index_dtype, roomy_launch

# Prefixes of an order whose runs are long: few end, so they are put aside and not updated in every turn of the walk.
FEW = 4096


class SortPlan(NamedTuple):
    """Compile-time constants beside the address."""

    orders: tuple[int, ...]  # that receive a gradient, in this order:
    n_claimed: int  # those in which two prefixes may share a row,
    n_aside: int  # the first n_aside may be put aside: the claimed ones, then those of few prefixes
    depth: int  # the largest of `orders`: codes that decide
    words: tuple[int, ...]  # which sort key holds the code of a position
    shifts: tuple[int, ...]  # and from which bit on
    n_words: int
    narrow: bool  # keys of 32 bits


@lru_cache(maxsize=64)
def sort_plan_of(spec: AddressSpec, ranked: bool = False) -> SortPlan:
    """`ranked`: all rows are to be listed, so those that are not put aside are claimed."""
    if spec.mode == "prefix":
        orders = spec.orders_at(spec.active_levels[-1])
    else:
        orders = tuple(level for level in spec.active_levels if level <= spec.max_order)
    depth = max(orders, default=0)
    few = tuple(n for n in orders if math.prod(spec.window_sizes[:n]) <= FEW)
    claimed = tuple(n for n in orders if n not in few and (ranked or n not in spec.exact_orders))
    own = tuple(n for n in orders if n not in few + claimed)
    sizes = [size.bit_length() for size in spec.window_sizes[:depth]]  # one number more, for an ended prefix
    words, shifts, word, left = [0] * depth, [0] * depth, -1, 0
    for position in reversed(range(depth)):  # the last code is the least significant; 63 bits a key
        if sizes[position] > left:
            word, left = word + 1, 63
        words[position], shifts[position] = word, 63 - left
        left -= sizes[position]
    return SortPlan(
        orders=claimed + few + own,
        n_claimed=len(claimed),
        n_aside=len(claimed + few),
        depth=depth,
        words=tuple(words),
        shifts=tuple(shifts),
        n_words=word + 1,
        narrow=sum(sizes) <= 31,
    )


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["p_codes", "p_first"])
def pack_codes_kernel(p_codes, p_first, p_keys, M, plan: tl.constexpr, address: tl.constexpr, BM: tl.constexpr):
    """codes [.., L] of the SIDs first[M], -1 for none -> sort keys [words, M], least significant first.

    Ended prefixes come before all others.
    """
    DEPTH: tl.constexpr = plan.depth
    WORDS: tl.constexpr = plan.n_words
    KEY: tl.constexpr = p_keys.dtype.element_ty
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    b_sid = o_m
    if p_first is not None:
        b_sid = tl.load(p_first + o_m, mask=o_m < M, other=-1)  # [BM]
    b_codes, b_length = load_sid_codes(p_codes, b_sid, (o_m < M) & (b_sid >= 0), DEPTH, address)
    for word in tl.static_range(WORDS):
        b_key = tl.zeros([BM], KEY)
        for i in tl.static_range(DEPTH):
            if plan.words[i] == word:
                b_digit = tl.where(b_length > i, b_codes[i].to(KEY) + 1, 0)
                b_key = b_key | (b_digit << plan.shifts[i])
        tl.store(p_keys + word * M.to(tl.int64) + o_m, b_key, mask=o_m < M)  # [BM]


@triton.jit(do_not_specialize=["M", "n_bits"], do_not_specialize_on_alignment=["p_codes", "p_order"])
def prefixes_kernel(
    p_order,
    p_codes,
    p_n_tokens,
    p_sids,
    p_counts,
    p_differs,
    p_targets,
    p_once,
    p_twice,
    n_bits,
    M,
    plan: tl.constexpr,
    address: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
):
    """Sorted order [M], -1 for none -> what `Prefixes` holds, and the rows of checked orders claimed.

    The last entry of differs [M + 1] ends every run.
    """
    H: tl.constexpr = address.heads
    J: tl.constexpr = len(plan.orders)
    DEPTH: tl.constexpr = plan.depth
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_m = o_m < M
    b_sid = tl.load(p_order + o_m, mask=m_m, other=-1)  # [BM]
    b_codes, b_length = load_sid_codes(p_codes, b_sid, b_sid >= 0, DEPTH, address)
    m_next = (o_m + 1 < M) & (b_length > 0)
    b_next = tl.load(p_order + o_m + 1, mask=m_next, other=-1)  # [BM]
    b_others, b_other_length = load_sid_codes(p_codes, b_next, m_next, DEPTH, address)
    b_differs = tl.full([BM], DEPTH + 1, tl.int32)
    for i in tl.static_range(DEPTH - 1, -1, -1):
        m_same = (b_codes[i] == b_others[i]) & ((b_length > i) == (b_other_length > i))
        b_differs = tl.where(m_same, b_differs, i + 1)
    b_differs = tl.where(m_next, b_differs, 1)  # nothing is a run by itself: a longer one would leave partial sums
    tl.store(p_differs + o_m + 1, b_differs.to(tl.int16), mask=m_m)  # [BM]
    tl.store(p_differs + o_m, tl.full([BM], 1, tl.int16), mask=o_m == 0)
    tl.store(p_sids + o_m, tl.where(b_length > 0, b_sid, -1).to(p_sids.dtype.element_ty), mask=m_m)  # [BM]
    if p_n_tokens is not None:
        b_count = tl.load(p_n_tokens + b_sid, mask=b_sid >= 0, other=0)  # [BM]
        tl.store(p_counts + o_m, b_count, mask=m_m)  # [BM]
    o_h = tl.arange(0, BH)
    m_h = m_m[:, None] & (o_h < H)[None, :]
    for j in tl.static_range(J):
        b_row, m_row = order_rows(b_codes, b_length, o_h, plan.orders[j], plan.orders[j], address)
        b_row = tl.where((m_row & (b_differs <= plan.orders[j]))[:, None], b_row, -1)
        p_target = p_targets + (o_m * (J * H) + j * H)[:, None] + o_h[None, :]
        tl.store(p_target, b_row.to(p_targets.dtype.element_ty), mask=m_h)  # [BM, BH]
        if j < plan.n_claimed and p_once is not None:
            claim(p_once, p_twice, n_bits, b_row, m_h & (b_row >= 0))


class Prefixes(NamedTuple):
    """The SIDs of a batch, sorted; in a token stream M is a bound on their number."""

    sids: Tensor  # [M], by place: which SID, or at which token it begins; -1 where there is none or no code is valid
    counts: Tensor | None  # int32 [M]: in a token stream, how many of its tokens follow one another
    differs: Tensor  # int16 [M + 1]
    targets: Tensor  # [M, orders, H]: rows of the runs that end at a place, -1 where none ends


def most_sids(codes: Tensor, n_tokens: Tensor | None, spec: AddressSpec) -> int:
    """A bound on the SIDs that reach an active level; in a token stream each takes as many tokens as that level, and a
    window those of its first item, as the next one may begin behind it."""
    return codes.shape[0] // (1 if n_tokens is None else spec.item_levels if spec.history else spec.active_levels[0])


def _first_tokens(n_tokens: Tensor, slots: int, spec: AddressSpec) -> Tensor:
    """Tokens int64 ``[slots]`` at which a SID begins that reaches an active level, then -1."""
    begins = n_tokens >= spec.active_levels[0]
    place = torch.where(begins, torch.cumsum(begins, 0) - 1, slots)
    tokens = torch.full((slots + 1,), -1, dtype=torch.int64, device=n_tokens.device)
    tokens.scatter_(0, place, torch.arange(len(n_tokens), device=n_tokens.device))
    return tokens[:slots]


class _Launches(NamedTuple):
    """Of one kind: the launches, SIDs a program of the second one, and the dtype of targets."""

    pack: Launch
    prefixes: Launch
    BM: int
    targets: torch.dtype


@of_a_kind
def _launches_of(device: Device, spec: AddressSpec, plan: SortPlan, *kind: Hashable) -> _Launches:
    address, BH = address_of(spec), triton.next_power_of_2(spec.heads)
    BM = max(min(256 // BH, 64), 1)
    return _Launches(
        Launch(pack_codes_kernel, plan, address, 128, **LAUNCH),
        Launch(prefixes_kernel, plan, address, BM, BH, **roomy_launch(device, 4)),
        BM,
        index_dtype(spec.total_rows),
    )


def sort_prefixes(
    codes: Tensor, n_tokens: Tensor | None, spec: AddressSpec, plan: SortPlan, claims: Claims | None
) -> Prefixes:
    """Sort contiguous codes ``[M, L]``, M > 0; in a token stream with `n_tokens` of `token_codes`."""
    M, device = most_sids(codes, n_tokens, spec), codes.device
    first = None if n_tokens is None else _first_tokens(n_tokens, M, spec)
    once, twice, n_bits = (None, None, 0) if claims is None else (claims.once, claims.twice, 32 * claims.once.shape[0])
    sids = index_dtype(codes.shape[0])
    kind = codes.dtype, n_tokens is None, claims is None, M < 1 << 31, sids
    launches = _launches_of(current_device(), spec, plan, *kind)
    keys = torch.empty(plan.n_words * M, dtype=torch.int32 if plan.narrow else torch.int64, device=device)
    launches.pack((blocks(M, 128), 1, 1), codes, first, keys, M)
    key, *others = (keys,) if plan.n_words == 1 else keys.split(M)
    order = torch.sort(key, stable=True)[1]
    for key in others:
        order = order[torch.sort(key[order], stable=True)[1]]
    if first is not None:
        order = first[order]

    found = Prefixes(
        sids=torch.empty(M, dtype=sids, device=device),
        counts=None if n_tokens is None else torch.empty(M, dtype=torch.int32, device=device),
        differs=torch.empty(M + 1, dtype=torch.int16, device=device),
        targets=torch.empty(M, len(plan.orders), spec.heads, dtype=launches.targets, device=device),
    )
    launches.prefixes((blocks(M, launches.BM), 1, 1), order, codes, n_tokens, *found, once, twice, n_bits, M)
    return found
