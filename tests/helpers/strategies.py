"""Hypothesis strategies: address specs of every kind, and codes with duplicates, shared and ended prefixes."""

import torch
from hypothesis import strategies as st

from prefixmem_fast import AddressSpec


@st.composite
def specs(draw, modes=("prefix", "suffix", "full"), largest_code=70_000, cross_item=True):
    if cross_item and "full" in modes and draw(st.integers(0, 3)) == 0:
        return draw(cross_item_specs(largest_code))
    levels = draw(st.integers(1, 6))
    sizes = draw(st.lists(st.sampled_from((1, 2, 5, 300, largest_code)), min_size=levels, max_size=levels))
    orders = draw(st.integers(1, 6))
    rows = st.sampled_from((1, 2, 7, 64, 500))
    return AddressSpec(
        codebook_sizes=sizes,
        max_order=orders,
        heads=draw(st.integers(1, 5)),
        table_rows=draw(st.one_of(rows, st.lists(rows, min_size=orders, max_size=orders))),
        mode=draw(st.sampled_from(modes)),
        addressing=draw(st.sampled_from(("auto", "hash"))),
        active_levels=draw(st.lists(st.integers(1, levels), min_size=1, unique=True).map(sorted)),
        seed=draw(st.integers(0, 2**64 - 1)),
    )


@st.composite
def cross_item_specs(draw, largest_code=70_000):
    levels = draw(st.integers(1, 3))
    sizes = draw(st.lists(st.sampled_from((1, 2, 5, 300, largest_code)), min_size=levels, max_size=levels))
    return AddressSpec(
        sizes,
        max_order=draw(st.sampled_from((2 * levels - 1, levels, 2 * levels + 1))),
        heads=draw(st.integers(1, 3)),
        table_rows=draw(st.sampled_from((1, 2, 7, 64, 500))),
        mode="full",
        addressing=draw(st.sampled_from(("auto", "hash"))),
        active_levels=draw(st.lists(st.integers(levels, 2 * levels - 1), min_size=1, unique=True).map(sorted)),
        seed=draw(st.integers(0, 2**64 - 1)),
        history=draw(st.integers(1, 3)),
    )


@st.composite
def codes_for(draw, spec, max_sids=40):
    """int64 [M, L]; about one code in eight lies outside its codebook."""
    sids = draw(st.sampled_from((0, 1, 3, max_sids)))
    columns = []
    for size in spec.window_sizes:
        valid = st.integers(0, size - 1)
        code = st.one_of(*[valid] * 7, st.sampled_from((-1, -70_000, size, 2**40)))
        columns.append(draw(st.lists(code, min_size=sids, max_size=sids)))
    return torch.tensor(columns, dtype=torch.int64).reshape(spec.levels, sids).T
