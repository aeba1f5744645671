"""Row kernels: the addresses themselves, for users who want them and for the deterministic backward to sort.

A pair (level, order) names one column of rows; order 0 stands for an order that does not exist at that level.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixmem_fast._launch import Launch, of_a_kind
from prefixmem_fast.addressing import AddressSpec, TokenStream

from .address import address_of, load_sid_codes, order_rows
from .tiles import LAUNCH, Device, blocks, current_device
from .tokens import kind_of_stream, load_level, load_token_codes, token_tile


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


@of_a_kind
def _launch_of_rows(
    device: Device, spec: AddressSpec, pairs: tuple[tuple[int, int], ...], *kind: Hashable
) -> tuple[int, Launch]:
    """SIDs a program: 256 rows of a pair; more would spill where orders and heads are many."""
    BH = triton.next_power_of_2(spec.heads)
    BM = max(min(256 // BH, 64), 1)
    last = max(level for level, _ in pairs)
    return BM, Launch(prefix_rows_kernel, last, pairs, address_of(spec), BM, BH, **LAUNCH)


@of_a_kind
def _launch_of_codes(device: Device, spec: AddressSpec, *kind: Hashable) -> tuple[int, Launch]:
    """Tokens a program, and the launch."""
    BM = 64
    return BM, Launch(token_codes_kernel, address_of(spec), BM, **LAUNCH)


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
        BM, launch = _launch_of_rows(current_device(), spec, pairs, dtype, codes.dtype, M < 1 << 31)
        launch((blocks(M, BM), 1, 1), codes, rows, M)
    return rows


def token_codes(stream: TokenStream, spec: AddressSpec) -> tuple[Tensor, Tensor]:
    """Codes ``[B * T, L]`` of the SID that begins at each token, down to the last active level that it has, and its
    length in tokens int32 ``[B * T]``. Levels past the last active one are not written."""
    B, T = stream.input_ids.shape
    options = {"dtype": torch.int64 if address_of(spec).wide else torch.int32, "device": stream.input_ids.device}
    codes = torch.empty(B * T, spec.levels, **options)
    n_tokens = torch.empty(B * T, dtype=torch.int32, device=codes.device)
    if n_tokens.numel():
        BM, launch = _launch_of_codes(current_device(), spec, kind_of_stream(stream))
        launch((B * blocks(T, BM), 1, 1), *stream, codes, n_tokens, T, stream.token_table.shape[0])
    return codes, n_tokens
