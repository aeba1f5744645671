"""Row kernels: the addresses themselves, for users who want them and for the deterministic backward to sort.

A pair (level, order) names one column of rows; order 0 stands for an order that does not exist at that level.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixmem_fast.addressing import AddressSpec, TokenStream

from .address import address_of, load_sid_codes, order_rows
from .tiles import LAUNCH, blocks
from .tokens import load_level, load_token_codes, token_tile


@triton.jit
def store_rows(p_rows, b_codes, b_length, o_m, m_m, PAIRS: tl.constexpr, BH: tl.constexpr, address: tl.constexpr):
    """Write rows [M, pairs, H] of BM SIDs, -1 where there is none."""
    H: tl.constexpr = address.heads
    J: tl.constexpr = len(PAIRS)
    o_h = tl.arange(0, BH)
    m_store = m_m[:, None] & (o_h < H)[None, :]
    for j in tl.static_range(J):
        p_pair = p_rows + (o_m.to(tl.int64) * (J * H) + j * H)[:, None] + o_h[None, :]
        if PAIRS[j][1] > 0:
            b_row, m_row = order_rows(b_codes, b_length, o_h, PAIRS[j][0], PAIRS[j][1], address)
            tl.store(p_pair, tl.where(m_row[:, None], b_row, -1).to(p_rows.dtype.element_ty), mask=m_store)  # [BM, BH]
        else:
            tl.store(p_pair, tl.full(p_pair.shape, -1, p_rows.dtype.element_ty), mask=m_store)  # [BM, BH]


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["p_codes"])
def prefix_rows_kernel(
    p_codes,
    p_rows,
    M,
    LAST: tl.constexpr,
    PAIRS: tl.constexpr,
    address: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
):
    """codes [M, L] -> rows [M, pairs, H]; LAST is the last level that a pair names. Grid: tiles of BM SIDs."""
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    b_codes, b_length = load_sid_codes(p_codes, o_m, o_m < M, LAST, address)
    store_rows(p_rows, b_codes, b_length, o_m, o_m < M, PAIRS, BH, address)


@triton.jit(do_not_specialize=["T", "V"], do_not_specialize_on_alignment=["p_ids", "p_segments"])
def token_codes_kernel(p_ids, p_table, p_segments, p_codes, p_n_tokens, T, V, address: tl.constexpr, BM: tl.constexpr):
    """ids [B, T] -> codes [B * T, L] of the SID that begins at each token, -1 past the last active level that has a
    token, and how many of its tokens follow one another [B * T]. Grid: B * tiles of BM tokens.

    Where no SID begins that reaches an active level, the codes are -1 in suffix mode, else they are not written.
    """
    L: tl.constexpr = address.levels
    LAST: tl.constexpr = address.last_active
    i_row, o_t = token_tile(T, BM)
    p_ids += i_row * T
    if p_segments is not None:
        p_segments += i_row * T
    b_level = load_level(p_ids, p_table, o_t, o_t < T, V)
    b_codes, b_length, b_n_tokens = load_token_codes(p_ids, p_table, p_segments, o_t, b_level == 1, T, V, address)
    b_read = tl.zeros_like(b_n_tokens)
    for l in tl.static_range(1, LAST + 1):
        if address.slot_of_level[l - 1] >= 0:
            b_read = tl.where(b_n_tokens >= l, l, b_read)
    b_read = tl.minimum(b_read, b_length)
    o_m = i_row * T + o_t
    m_codes = o_t < T
    if address.mode != "suffix":
        m_codes = m_codes & (b_n_tokens >= address.first_active)
    for l in tl.static_range(1, LAST + 1):
        tl.store(p_codes + o_m * L + (l - 1), tl.where(b_read >= l, b_codes[l - 1], -1), mask=m_codes)  # [BM]
    tl.store(p_n_tokens + o_m, b_n_tokens, mask=o_t < T)  # [BM]


@lru_cache(maxsize=64)
def _tile(heads: int) -> tuple[int, int]:
    """BM and BH: 256 rows of a pair a program; more would spill where orders and heads are many."""
    BH = triton.next_power_of_2(heads)
    return max(min(256 // BH, 64), 1), BH


@lru_cache(maxsize=64)
def _all_pairs(spec: AddressSpec) -> tuple[tuple[int, int], ...]:
    return tuple(
        (level, order if order in spec.orders_at(level) else 0)
        for level in range(1, spec.levels + 1)
        for order in range(1, spec.max_order + 1)
    )


def prefix_rows(codes: Tensor, spec: AddressSpec) -> Tensor:
    """Rows int64 ``[M, L, N, H]`` of contiguous codes ``[M, L]``."""
    rows = pair_rows(codes, _all_pairs(spec), torch.int64, spec)
    return rows.view(codes.shape[0], spec.levels, spec.max_order, spec.heads)


def pair_rows(codes: Tensor, pairs: tuple[tuple[int, int], ...], dtype: torch.dtype, spec: AddressSpec) -> Tensor:
    """Rows ``[M, pairs, H]`` of contiguous codes ``[M, L]``."""
    M = codes.shape[0]
    rows = torch.empty((M, len(pairs), spec.heads), dtype=dtype, device=codes.device)
    if rows.numel():
        last = max(level for level, _ in pairs)
        BM, BH = _tile(spec.heads)
        prefix_rows_kernel[(blocks(M, BM),)](codes, rows, M, last, pairs, address_of(spec), BM, BH, **LAUNCH)
    return rows


def token_codes(stream: TokenStream, spec: AddressSpec) -> tuple[Tensor, Tensor]:
    """Codes ``[B * T, L]`` of the SID that begins at each token, down to the last active level that it has, and its
    length in tokens int32 ``[B * T]``. Levels past the last active one are not written."""
    input_ids, token_table, segment_ids = stream
    B, T = input_ids.shape
    address = address_of(spec)
    codes = torch.empty(
        (B * T, spec.levels), dtype=torch.int64 if address.wide else torch.int32, device=input_ids.device
    )
    n_tokens = torch.empty((B * T,), dtype=torch.int32, device=input_ids.device)
    if n_tokens.numel():
        BM = 64
        token_codes_kernel[(B * blocks(T, BM),)](
            input_ids, token_table, segment_ids, codes, n_tokens, T, token_table.shape[0], address, BM, **LAUNCH
        )
    return codes, n_tokens
