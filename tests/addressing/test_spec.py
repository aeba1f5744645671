import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given

from prefixmem_fast import AddressSpec, prefix_rows
from prefixmem_fast.addressing import prefix_length
from prefixmem_fast.addressing.primes import draw_primes, is_prime, splitmix64
from prefixmem_fast.addressing.spec import VERSIONS
from prefixmem_fast.checks import oracle
from tests.helpers.strategies import specs

FILES = sorted(Path(__file__).with_name("golden").glob("rows_v*.json"))
GOLDEN = [case for file in FILES for case in json.loads(file.read_text())]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"v{case['spec']['version']}, {case['spec']['mode']}")
def test_golden_rows(case):
    """Fixed rows: the arguments alone give them again, and so does the stored JSON alone."""
    assert oracle.prefix_rows(np.array(case["codes"]), case["spec"]).tolist() == case["rows"]
    spec = AddressSpec.from_dict(case["spec"])
    codes = torch.tensor(case["codes"])
    assert prefix_rows(codes, spec, backend="reference").tolist() == case["rows"]
    assert prefix_rows(codes, spec, backend="triton").tolist() == case["rows"]


@given(specs())
def test_json_round_trip(spec):
    again = AddressSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.key == spec.key


@given(specs())
def test_blocks_tile_the_table(spec):
    """Tables lie in blocks by (order, head), without gap or overlap."""
    place = 0
    for order in range(spec.max_order):
        for head in range(spec.heads):
            assert spec.offsets[order][head] == place
            place += spec.rows_per_order[order]
    assert place == spec.total_rows


def test_paper_sizes():
    hashed = AddressSpec((2048,) * 5, addressing="hash")
    assert hashed.total_rows == 16 * 2_000_000
    exact = AddressSpec((2048,) * 5)
    assert exact.exact_orders == (1,)
    assert exact.rows_per_order == (2048, 2_000_000, 2_000_000, 2_000_000)
    assert AddressSpec((2048,) * 5, table_rows=5_000_000).exact_orders == (1, 2)
    assert AddressSpec((2048,) * 5, mode="suffix").exact_orders == ()


def test_the_lowest_version_that_has_what_is_asked_for():
    """Checkpoints of encoders without cross-item orders stay readable by releases that know version 1 alone."""
    assert [file.name for file in FILES] == [f"rows_v{version}.json" for version in VERSIONS]
    one, two = AddressSpec((8, 8)), AddressSpec.cross_item((8, 8))
    assert (one.version, two.version) == (1, 2)
    assert "history" not in one.to_dict()
    assert two.to_dict()["history"] == 1


def test_a_window_of_two_items():
    spec = AddressSpec.cross_item((8, 9, 10), table_rows=(5, 6, 7), heads=2)
    assert (spec.item_levels, spec.levels, spec.window_sizes) == (3, 6, (8, 9, 10, 8, 9, 10))
    assert spec.active_levels == (3, 4, 5)
    assert spec.rows_per_order == (0, 0, 5, 6, 7)
    assert AddressSpec.cross_item((8, 9, 10), active_levels=(0, 2)).active_levels == (3, 5)
    assert dataclasses.replace(spec, active_levels=(3,)).rows_per_order == spec.rows_per_order
    assert [AddressSpec.cross_item((8, 9, 10), history=k).gap for k in (1, 2, 3)] == [0, 3, 6]
    exact = AddressSpec.cross_item((4, 3), table_rows=12)
    assert exact.exact_orders == (2,)


def test_orders_above_the_last_level_hold_no_rows():
    spec = AddressSpec((256,) * 3, max_order=4, table_rows=100)
    assert spec.rows_per_order[3] == 0
    assert (prefix_rows(torch.zeros(2, 3, dtype=torch.int64), spec)[:, :, 3] == -1).all()


@given(specs(largest_code=3_000_000_000))
def test_products_fit_their_width(spec):
    primes = [p for row in spec.multipliers for p in row]
    assert len(set(primes)) == len(primes) == spec.max_order * spec.heads
    assert all(is_prime(p) and p > 50_000 for p in primes)
    assert (max(spec.codebook_sizes) - 1) * max(primes) < 1 << spec.product_bits


def test_both_product_widths_give_the_same_rows():
    """The kernels take 32-bit arithmetic where products fit 31 bits; 64 bits must find the same rows."""
    from prefixmem_fast.kernels import address, rows

    spec = AddressSpec((2048,) * 5, table_rows=1_000_003)
    assert spec.product_bits == 31
    codes = torch.randint(0, 2048, (200, 5))
    narrow = rows.prefix_rows(codes, spec)
    narrow_address = address.address_of(spec)
    assert not narrow_address.wide
    rows.address_of, kept = (lambda _: narrow_address._replace(wide=True)), rows.address_of
    try:
        wide = rows.prefix_rows(codes, spec)
    finally:
        rows.address_of = kept
    assert torch.equal(narrow, wide)
    assert torch.equal(narrow, prefix_rows(codes, spec, backend="reference"))


def test_wide_products_where_codes_or_tables_are_large():
    assert AddressSpec((1 << 15,) * 3).product_bits == 31
    assert AddressSpec((1 << 16,) * 3).product_bits == 63
    assert AddressSpec((256,) * 5, table_rows=1 << 27).product_bits == 63


def test_hashes_fill_a_table():
    """As many random prefixes as rows occupy 1 - 1/e of a table."""
    spec = AddressSpec((2048,) * 5, table_rows=1 << 16, addressing="hash", heads=2)
    codes = torch.randint(0, 2048, (1 << 16, 5))
    rows = prefix_rows(codes, spec)[:, 3]  # [M, N, H] at level 4
    for order in (1, 2, 3):
        for head in range(2):
            share = rows[:, order, head].unique().numel() / (1 << 16)
            assert abs(share - 0.632) < 0.01


def test_prime_generator_is_the_published_one():
    """First outputs of SplitMix64 from seed 0, and primes against trial division."""
    stream = splitmix64(0)
    assert [next(stream) for _ in range(3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [n for n in range(2, 2000) if is_prime(n)] == [n for n in range(2, 2000) if all(n % d for d in range(2, n))]
    assert not is_prime(3_215_031_751)  # the smallest strong pseudoprime to bases 2, 3, 5 and 7
    assert draw_primes(4, 1 << 19, 1 << 20, 0) == list(AddressSpec((2048,) * 5).multipliers[0])


def test_frozen():
    spec = AddressSpec((8, 8))
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.heads = 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"history": 0}, "history = 0; give 1 for the item before"),
        ({"history": 17}, r"history = 17 is outside 0\.\.16"),
        ({"active_levels": (0, 3)}, r"active_levels = \(0, 3\) is not allowed; .* of 0\.\.2"),
        ({"active_levels": ()}, "active_levels"),
        ({"table_rows": (4, 4)}, r"table_rows has 2 entries; .* each prefix length of 0\.\.2"),
    ],
)
def test_errors_of_cross_item_specs(changes, message):
    with pytest.raises(ValueError, match=message):
        AddressSpec.cross_item((8, 9, 10), **changes)


BAD = [
    ({"codebook_sizes": ()}, ValueError, "codebook_sizes is empty"),
    ({"codebook_sizes": (8, 0)}, ValueError, r"codebook_sizes\[1\] = 0 is not positive"),
    ({"codebook_sizes": (8, -3)}, ValueError, r"codebook_sizes\[1\] = -3"),
    ({"codebook_sizes": 8}, TypeError, "codebook_sizes = 8 is not a sequence"),
    ({"codebook_sizes": (8, 2.5)}, TypeError, r"codebook_sizes\[1\] = 2.5 is not an integer"),
    ({"codebook_sizes": (1 << 60,)}, ValueError, "smaller codebooks"),
    ({"max_order": 0}, ValueError, "max_order = 0 is not positive"),
    ({"max_order": True}, TypeError, "max_order = True"),
    ({"heads": 0}, ValueError, "heads = 0 is not positive"),
    ({"heads": "4"}, TypeError, "heads = '4'"),
    ({"table_rows": (5, 5)}, ValueError, "table_rows has 2 entries, max_order is 4"),
    ({"table_rows": 0}, ValueError, "table_rows = 0"),
    ({"table_rows": (5, 5, 5, 0)}, ValueError, "every order needs a row"),
    ({"table_rows": "many"}, TypeError, "table_rows"),
    ({"mode": "infix"}, ValueError, "mode = 'infix' is unknown; allowed are 'prefix', 'suffix', 'full'"),
    ({"addressing": "exact"}, ValueError, "addressing = 'exact'"),
    ({"active_levels": ()}, ValueError, "active_levels"),
    ({"active_levels": (0, 1)}, ValueError, "levels of 1..3"),
    ({"active_levels": (4,)}, ValueError, "levels of 1..3"),
    ({"active_levels": (2, 1)}, ValueError, "strictly increasing"),
    ({"active_levels": (2, 2)}, ValueError, "strictly increasing"),
    ({"seed": -1}, ValueError, "seed = -1"),
    ({"seed": 1 << 64}, ValueError, "seed"),
    ({"version": 3}, ValueError, "version = 3 is unknown"),
    ({"version": True}, ValueError, "version = True is unknown"),
    ({"version": 2}, ValueError, "version = 2 with history = 0; leave version out"),
    ({"history": 1}, ValueError, "history = 1 with mode = 'prefix'"),
    ({"history": 1.5}, TypeError, "history = 1.5 is not an integer"),
    ({"history": 1, "mode": "full", "active_levels": (1,)}, ValueError, r"active_levels = \(1,\) is not allowed"),
    ({"table_rows": 1 << 60, "addressing": "hash"}, ValueError, r"more than 2\^63 - 1"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=lambda value: str(value)[:40])
def test_errors_name_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        AddressSpec(**{"codebook_sizes": (8, 8, 8), **changes})


def test_from_dict_refuses_what_it_cannot_honour():
    good = AddressSpec((8, 8)).to_dict()
    with pytest.raises(ValueError, match="multipliers"):
        AddressSpec.from_dict({**good, "multipliers": [[3] * 4] * 4})
    with pytest.raises(ValueError, match="unknown entry 'colour'"):
        AddressSpec.from_dict({**good, "colour": 1})
    with pytest.raises(ValueError, match="lacks codebook_sizes"):
        AddressSpec.from_dict({})
    with pytest.raises(TypeError, match="is a str"):
        AddressSpec.from_dict(json.dumps(good))
    for name in ("mode", "seed", "version", "active_levels"):
        with pytest.raises(ValueError, match=f"lacks {name}"):
            AddressSpec.from_dict({key: value for key, value in good.items() if key != name})
    assert AddressSpec.from_dict({"codebook_sizes": (8, 8)}) == AddressSpec((8, 8))


def test_the_length_of_a_prefix_takes_plain_operators():
    """cumprod, which says it in one call, has no counterpart in ONNX."""
    from torch.fx.experimental.proxy_tensor import make_fx

    codes = torch.tensor([[1, 2, 3], [1, 9, 3], [-1, 0, 0], [4, 3, 7]])
    assert prefix_length(codes, (5, 4, 7)).tolist() == [3, 1, 0, 2]
    graph = make_fx(lambda codes: prefix_length(codes, (5, 4, 7)))(codes).graph
    assert not [node for node in graph.nodes if "cumprod" in str(node.target)]


@pytest.mark.parametrize("mode", ["prefix", "suffix", "full"])
def test_a_spec_of_some_heads_has_their_rows(mode):
    """Under any split, and of a part again; the rows of a head within its tables are those of the whole."""
    whole = AddressSpec((7, 5, 6), heads=4, table_rows=20, mode=mode)
    codes = torch.cartesian_prod(*(torch.arange(-1, size) for size in whole.codebook_sizes))
    rows = prefix_rows(codes, whole)
    for start, stop in ((0, 1), (1, 3), (2, 4), (0, 4)):
        part = whole.for_heads(start, stop)
        own = prefix_rows(codes, part)
        for n, h in itertools.product(range(whole.max_order), range(stop - start)):
            mine, theirs = own[:, :, n, h], rows[:, :, n, start + h]
            assert torch.equal(mine >= 0, theirs >= 0)
            assert torch.equal(
                (mine - part.offsets[n][h])[mine >= 0], (theirs - whole.offsets[n][start + h])[mine >= 0]
            )
        assert AddressSpec.from_dict(json.loads(part.key)) == part
    assert whole.for_heads(0, 4) == whole
    assert whole.for_heads(1, 4).for_heads(1, 2) == whole.for_heads(2, 3)
    assert "part" not in whole.to_dict()


@pytest.mark.parametrize("heads", [(-1, 2), (2, 2), (3, 2), (0, 5)])
def test_heads_that_a_spec_has_not(heads):
    with pytest.raises(ValueError, match="give 0 <= start < stop <= 4, the heads"):
        AddressSpec((7, 5), heads=4, table_rows=20).for_heads(*heads)
    with pytest.raises(ValueError, match=r"part = \(3, 4\) with heads = 2"):
        AddressSpec((7, 5), heads=2, table_rows=20, part=(3, 4))
