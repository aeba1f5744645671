"""Cross-item orders of the encoder: codes, tokens, steps, files and updates agree with one another and the formula."""

import copy
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixmem_fast import (
    AddressSpec,
    DecodingState,
    PrefixMem,
    PrefixMemConfig,
    PrefixMemory,
    SIDVocabulary,
    optim,
    prefix_memory,
    token_memory,
)
from prefixmem_fast.addressing import TokenStream, item_windows, lagged_windows, window_codes
from prefixmem_fast.checks import oracle
from prefixmem_fast.checks.cases import random_tokens
from tests.helpers.cases import BACKENDS
from tests.helpers.models import HIDDEN, SIZES, cross_item_encoder, lagged_encoder, sid, vocabulary
from tests.helpers.strategies import cross_item_specs

KNOWN = [code for code in range(6) if code != 2]  # code 2 has no token in `vocabulary`


def histories(users, items, seed=0):
    """Codes int64 ``[users, items, L]`` of items that the vocabulary can write."""
    generator = torch.Generator().manual_seed(seed)
    columns = [
        torch.tensor([c for c in KNOWN if c < size])[
            torch.randint(sum(c < size for c in KNOWN), (users, items), generator=generator)
        ]
        for size in SIZES
    ]
    return torch.stack(columns, -1)


def tokens_of(codes):
    return vocabulary().encode(codes).flatten(1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("history", [1, 2, 3])
def test_codes_and_tokens_are_the_same(history, backend):
    one = cross_item_encoder(history=history, backend=backend)
    codes = histories(2, 5)
    m = one(codes)
    assert m.shape == (2, 5, 3, HIDDEN)
    torch.testing.assert_close(one.encode_tokens(tokens_of(codes), vocabulary()).view_as(m), m, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one(codes[0]), m[0])
    assert one(codes[:, :0]).shape == (2, 0, 3, HIDDEN)


def test_m_by_hand():
    """W_out of each memory times its rows: (SID of the item before, prefix so far)."""
    one = cross_item_encoder(history=1)
    codes = histories(1, 3)[0]
    cross, L = one.cross_item, 3
    expected = torch.zeros(3, L, HIDDEN)
    for item in range(3):
        for l in range(1, L + 1):
            before, new = (codes[item], []) if l == L else (codes[item - 1], codes[item, :l].tolist())
            if l < L and item == 0:
                continue
            window = torch.tensor([[*before.tolist(), *new, *[-1] * (L - len(new))]])
            S = prefix_memory(window, cross.memory.weight, cross.config.spec)[0, len(new)]
            expected[item, l - 1] = cross.out_proj(S)
    own = one._encode_levels(one.memory(codes), 1)
    torch.testing.assert_close(one(codes), own + expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cross(codes), expected, rtol=1e-5, atol=1e-5)


def test_what_stands_between_and_what_ends():
    """An item is read where its tokens, and those between, stand directly before, in the same row and segment."""
    one = cross_item_encoder(history=2)
    last, known = one.cross_item.cross_item, vocabulary()  # two items back
    assert last.config.spec.history == 2
    a, b, c = sid(1, 3, 4), sid(0, 1, 5), sid(3, 0, 1)

    def at_the_end(ids, encoder=last, segments=None):
        return encoder.encode_tokens(
            torch.tensor([ids]), known, None if segments is None else torch.tensor([segments])
        )[0, -1]

    assert at_the_end([*a, *b, c[0]]).any()
    assert not at_the_end([*a, 5, *b, c[0]]).any()
    assert not at_the_end([*a[:2], *b, c[0]]).any()
    assert not at_the_end([*b, c[0]]).any()
    assert at_the_end([*a, *b]).any()  # an item to come
    assert not at_the_end(b).any()
    assert at_the_end([*a, *b, c[0]], segments=[4] * 7).any()
    assert not at_the_end([*a, *b, c[0]], segments=[4] * 3 + [5] * 4).any()
    assert not at_the_end([*a, *b, c[0]], segments=[4] * 6 + [5]).any()
    before = one.cross_item.encode_tokens(torch.tensor([[*a, *b, c[0]]]), known)[0, -1] - at_the_end([*a, *b, c[0]])
    other = one.cross_item.encode_tokens(torch.tensor([[5, *b, c[0]]]), known)[0, -1]
    torch.testing.assert_close(before, other)  # one item back, whatever stands before


@given(cross_item_specs(), st.integers(0, 10**6), st.booleans())
@settings(max_examples=60)
def test_windows_of_tokens_against_the_oracle(spec, seed, packed):
    ids, table = random_tokens(random.Random(seed), spec, (2, 23))
    segments = [[t // 9 for t in range(23)]] * 2 if packed else None
    stream = TokenStream(torch.tensor(ids), torch.tensor(table), None if segments is None else torch.tensor(segments))
    codes, level = window_codes(stream, spec)
    for b, row in enumerate(ids):
        expected = oracle.token_windows(row, table, spec.to_dict(), segments[b] if packed else None)
        assert level[b].tolist() == [l for l, _ in expected]
        assert all(codes[b, t].tolist() == known for t, (l, known) in enumerate(expected) if l)


def test_windows_of_items():
    spec = AddressSpec.cross_item((9, 9), history=2)
    windows = item_windows(torch.tensor([[[1, 2], [3, 4], [5, 6]], [[1, 2], [3, -1], [5, 6]]]), spec).tolist()
    none = [-1, -1]
    assert windows[0] == [[*none, 1, 2], [*none, 3, 4], [1, 2, 5, 6], [3, 4, *none]]
    assert windows[1] == [[*none, 1, 2], [*none, 3, -1], [*none, 5, 6], [3, -1, *none]]  # the item between has ended


@given(cross_item_specs(), st.integers(1, 3), st.integers(0, 10**6), st.integers(0, 23), st.booleans())
@settings(max_examples=60)
def test_lagged_windows_are_those_of_each_item_back(spec, lags, seed, length, packed):
    """One reading of the windows of all lags gives each token what a spec of each `history` reads for it."""
    ids, table = random_tokens(random.Random(seed), spec, (2, 23))
    ids, table = torch.tensor(ids), torch.tensor(table, dtype=torch.int32)
    ids = ids[:, :length]
    segments = (torch.arange(length) // 9).expand(2, -1) if packed else None
    weight = torch.randn(spec.total_rows, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    windows = lagged_windows(TokenStream(ids, table, segments), spec, lags)
    L, A = spec.item_levels, len(spec.active_levels)
    assert windows.codes.shape == (2, length // L, lags, 2 * L)
    S = prefix_memory(windows.codes, weight, spec, backend="reference")
    for lag in range(lags):
        own = torch.nn.functional.pad(S[:, :, lag].flatten(1, 2), (0, 0, 0, 1))
        assert own.shape[1] == length // L * A + 1
        found = own.gather(1, windows.place[..., None].expand(-1, -1, own.shape[-1]))
        back = replace(spec, history=spec.history + lag)
        expected = token_memory(ids, table, weight, back, segment_ids=segments, backend="reference")
        assert torch.equal(found, expected)
    for new in range(length + 1):
        few = lagged_windows(TokenStream(ids, table, segments), spec, lags, new)
        rows = torch.nn.functional.pad(few.codes.flatten(-2), (0, 0, 0, 1), value=-1)
        whole = torch.nn.functional.pad(windows.codes.flatten(-2), (0, 0, 0, 1), value=-1)
        last, last_of_all = few.place, windows.place[:, length - new :]
        assert few.codes.shape[1] <= (new + 2 * (L - 1)) // L
        assert torch.equal(last % A, torch.where(last_of_all < length // L * A, last_of_all % A, 0))
        for b in range(2):
            assert torch.equal(rows[b, last[b] // A], whole[b, last_of_all[b] // A])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("lags", "first"), [(2, 1), (3, 2)])
def test_lags_of_codes_and_tokens(lags, first, backend):
    """m is W_out times the rows of each item back by its weight, W_head takes the same S."""
    one, codes = lagged_encoder(lags, first, None, backend=backend), histories(2, 6)
    cross = one.cross_item
    assert cross.lag_weights.tolist() == [2.0**-lag for lag in range(lags)]
    torch.nn.init.normal_(cross.lag_weights)
    S = sum(
        weight
        * token_memory(
            tokens_of(codes),
            vocabulary().table,
            cross.memory.weight,
            replace(cross.config.spec, history=first + lag),
            backend="reference",
        )
        for lag, weight in enumerate(cross.lag_weights)
    )
    encoded = cross.encode_stream(tokens_of(codes), vocabulary())
    torch.testing.assert_close(encoded.m, cross.out_proj(S), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoded.head, cross.head_proj(S), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cross(codes).flatten(1, 2), encoded.m, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.encode_stream(tokens_of(codes), vocabulary()).head, encoded.head)


@pytest.mark.parametrize("lags", [1, 2])
def test_first_codes_of_an_earlier_item(lags):
    """Items that share them are read alike; others, and one that has ended, are not."""
    spec = AddressSpec.cross_item(SIZES, heads=2, table_rows=5000)
    how = {"memory_init_std": 1.0, "output_init_std": 1.0}
    one = PrefixMem(PrefixMemConfig(spec, 6, HIDDEN, lags=lags, earlier_codes=2, **how))
    whole = PrefixMem(PrefixMemConfig(spec, 6, HIDDEN, lags=lags, **how))
    whole.memory, whole.out_proj = one.memory, one.out_proj
    new = [1, 4, 3]
    m, other_last, other_second, first_of_all, ended = one(
        torch.tensor([[[3, 1, 5], new], [[3, 1, 4], new], [[3, 3, 5], new], [[3, 1, 0], new], [[3, 1, -1], new]])
    )[:, 1]
    assert m[:2].all()
    assert torch.equal(m[:2], other_last[:2])  # of the last token the window begins in the item itself
    assert torch.equal(m[:2], first_of_all[:2])
    assert not (m[:2] == other_second[:2]).any()
    assert not ended[:2].any()
    zero = torch.tensor([[3, 1, 0], new])
    torch.testing.assert_close(whole(zero)[1, :2], m[:2])
    codes = histories(3, 4)
    torch.testing.assert_close(one.encode_tokens(tokens_of(codes), vocabulary()).view(3, 4, 3, -1), one(codes))


@pytest.mark.parametrize("make", [cross_item_encoder, lagged_encoder])
@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_are_the_whole_sequence(backend, make):
    one, generator = make(backend=backend), torch.Generator().manual_seed(0)
    ids = torch.cat([tokens_of(histories(2, 4)), torch.randint(0, 64, (1, 12), generator=generator)])
    whole, known = one.encode_tokens(ids, vocabulary()), vocabulary()
    for part in (one, one.cross_item):  # the second has cross-item orders alone
        whole, head = part.encode_stream(ids, known)
        for prompt in (4,) if backend == "triton" else (0, 1, 4, 7):
            state, order = DecodingState(part, known, 3), torch.arange(3)
            state.prefill(ids.flip(0)[:, :5])
            torch.testing.assert_close(state.prefill(ids[:, :prompt]), whole[:, :prompt])
            for t in range(prompt, ids.shape[1]):
                torch.testing.assert_close(state.step(ids[order, t]), whole[order, t], rtol=1e-5, atol=1e-5)
                if make is lagged_encoder:
                    torch.testing.assert_close(state.head, head[order, t], rtol=1e-5, atol=1e-5)
                else:
                    assert state.head is None
                moved = torch.randint(0, 3, (3,), generator=generator)
                state.reorder(moved)
                order = order[moved]
    state = DecodingState(one, known, 1)
    state.prefill(ids[:1, :6])
    state.reorder(torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(
        state.step(ids[:1, 6].expand(4)), one.encode_tokens(ids[:1, :7], known)[:, -1].expand(4, -1)
    )


@pytest.mark.parametrize("make", [cross_item_encoder, lagged_encoder])
def test_files_copies_and_quantized_tables(tmp_path, make):
    one, codes = make(), histories(2, 5)
    m = one(codes)
    tokens, known = tokens_of(codes), vocabulary()
    head = one.encode_stream(tokens, known).head
    one.save_pretrained(tmp_path / "one", vocabulary())
    for options in ({}, {"tables": "host"}, {"tables": "mapped"}):
        again = PrefixMem.from_pretrained(tmp_path / "one", **options)
        assert again.config == one.config
        assert torch.equal(again(codes), m)
        assert head is None or torch.equal(again.encode_stream(tokens, known).head, head)
    assert torch.equal(copy.deepcopy(one)(codes), m)
    wider = PrefixMem.from_pretrained(tmp_path / "one", hidden_size=48)
    assert wider(codes).shape == (2, 5, 3, 48)
    assert wider.cross_item.cross_item.out_proj.weight.shape[0] == 48
    assert head is None or wider.cross_item.head_proj.weight.shape == (48, 6)
    projections = [p for name, p in wider.named_parameters() if name.endswith("proj.weight")]
    assert len(projections) == (3 if head is None else 4)
    for weight in projections:  # afresh, whatever stood there
        weight.data.zero_()
    wider.reset_output()
    assert all(0.5 < weight.std() < 2 for weight in projections)
    assert torch.equal(wider.cross_item.memory.weight, one.cross_item.memory.weight)
    small = one.quantize("int8")
    assert not torch.equal(small(codes), m)
    torch.testing.assert_close(small(codes), m, rtol=0, atol=0.02 * m.abs().max().item())
    if head is not None:
        torch.testing.assert_close(
            small.encode_stream(tokens, known).head, head, rtol=0, atol=0.02 * head.abs().max().item()
        )
    small.save_pretrained(tmp_path / "small")
    assert torch.equal(PrefixMem.from_pretrained(tmp_path / "small")(codes), small(codes))
    fewer = PrefixMem.from_pretrained(tmp_path / "one", active_levels=(2,))
    assert not fewer(codes)[0, 0, 0].any()  # nothing stands before the first item
    assert torch.equal(fewer.cross_item(codes), one.cross_item(codes))


def test_prefix_lengths_of_cross_item_orders_alone_are_those_of_the_item(tmp_path):
    one, codes = cross_item_encoder(history=1).cross_item, histories(2, 5)
    one.save_pretrained(tmp_path)
    fewer = PrefixMem.from_pretrained(tmp_path, active_levels=(0, 1))
    assert fewer.config.spec.active_levels == (3, 4)
    expected = one(codes)
    assert expected[..., 1, :].any()
    expected[..., 1, :] = 0.0  # the token of c_2; that of c_3 is where l = 0
    assert torch.equal(fewer(codes), expected)


def test_rows_of_first_codes_are_not_loaded_as_those_of_others():
    """A state_dict says what the rows are keyed by, as files do."""

    def keyed_by(codes):
        spec = AddressSpec.cross_item(SIZES, heads=2, table_rows=50)
        return PrefixMem(PrefixMemConfig(spec, 4, HIDDEN, lags=2, earlier_codes=codes))

    state = keyed_by(2).state_dict()
    for codes in (1, None):
        with pytest.raises(RuntimeError, match="the checkpoint's address spec differs in earlier_codes"):
            keyed_by(codes).load_state_dict(state)
    keyed_by(2).load_state_dict(state)


@pytest.mark.parametrize("make", [cross_item_encoder, lagged_encoder])
def test_gathers_ahead_are_taken(make):
    one, codes = make(tables="host"), histories(2, 5)
    expected = one(codes), one.encode_tokens(tokens_of(codes), vocabulary())
    one.prefetch(codes)
    one.prefetch_tokens(tokens_of(codes), vocabulary())
    memories = [module for module in one.modules() if isinstance(module, PrefixMemory)]
    assert [len(memory._reader._gathers) for memory in memories] == [2, 2, 2]
    assert torch.equal(one(codes), expected[0])
    assert torch.equal(one.encode_tokens(tokens_of(codes), vocabulary()), expected[1])
    assert not any(memory._reader._gathers for memory in memories)


@pytest.mark.parametrize("make", [cross_item_encoder, lagged_encoder])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_step_of_every_gradient(backend, make):
    """Dense, sparse and fused steps of all tables of an encoder end in the same numbers, by codes and by tokens."""
    codes, ends = histories(2, 4), {}
    for grad in ("dense", "sparse", "fused"):
        for source in ("codes", "tokens"):
            one = make(grad=grad, backend=backend)
            optimizer = (
                torch.optim.SGD(one.parameters(), 0.1)
                if grad == "dense"
                else optim.for_model(one, 0.1, encoder_lr_multiple=1.0, rows=optim.SGD, encoder_needed=False)
            )
            m = one(codes) if source == "codes" else one.encode_tokens(tokens_of(codes), vocabulary()).view(2, 4, 3, -1)
            (m * torch.linspace(-1, 1, m.numel()).view_as(m)).sum().backward()
            optimizer.step()
            ends[grad, source] = [p for name, p in one.named_parameters() if name.endswith("memory.weight")]
    fresh = make()
    for key, tables in ends.items():
        for table, expected in zip(tables, ends["dense", "codes"], strict=True):
            torch.testing.assert_close(table, expected, rtol=1e-4, atol=1e-5, msg=str(key))
        assert not torch.equal(tables[1], dict(fresh.named_parameters())["cross_item.memory.weight"])
    assert len(tables) == 3


BAD = [
    (lambda c: c.__class__(c.spec, 8, HIDDEN, cross_item=PrefixMemConfig(c.spec, 8)), "a spec with history = 0"),
    (
        lambda c: c.__class__(c.spec, 8, HIDDEN, cross_item=PrefixMemConfig(AddressSpec.cross_item((4, 5)), 8)),
        r"codebook_sizes \(4, 5\), the spec \(4, 5, 6\)",
    ),
    (
        lambda c: c.__class__(c.spec, 8, HIDDEN, cross_item=PrefixMemConfig(AddressSpec.cross_item(SIZES), 8, 5)),
        "hidden_size = 5, the encoder 32",
    ),
    (
        lambda c: cross_item_encoder()(torch.zeros(3, dtype=torch.int64)),
        r"with cross-item orders give \[..., items, 3\]",
    ),
    (lambda c: cross_item_encoder()(torch.zeros(2, 4, dtype=torch.int64)), r"codes has shape \(2, 4\)"),
    (lambda c: replace(c, lags=2), "lags = 2 with a spec of history = 0"),
    (lambda c: replace(c, lags=0), "lags = 0"),
    (lambda c: replace(c, earlier_codes=1), "earlier_codes = 1; leave it out"),
    (lambda c: replace(lagged_encoder().config.cross_item, earlier_codes=3), r"earlier_codes = 3; give 1\.\.2"),
    (lambda c: replace(lagged_encoder().config.cross_item, lags=2**20), "lags = 1048576 from history = 1 on"),
    (lambda c: DecodingState(cross_item_encoder(), SIDVocabulary.from_table({}, (4, 5)), 1), "codebook_sizes"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make(PrefixMemConfig(AddressSpec(SIZES), 8, HIDDEN))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.uint8])
@pytest.mark.parametrize("make", [cross_item_encoder, lagged_encoder])
def test_codes_of_other_dtypes_are_refused(make, dtype):
    for one in (make(), make().cross_item):
        with pytest.raises(TypeError, match=f"codes has dtype {dtype}; allowed are torch.int16"):
            one(torch.zeros(2, 3, 3, dtype=dtype))


def test_the_config_says_how_far_it_looks_back():
    config = cross_item_encoder(history=2).config
    assert (config.history, config.lookback, config.levels) == (2, 7, 3)  # the two items before, and two codes
    assert PrefixMemConfig.from_dict(config.to_dict()) == config
    lagged = lagged_encoder(3, 2).config
    assert (lagged.history, lagged.lookback) == (4, 13)
    assert PrefixMemConfig.from_dict(lagged.to_dict()) == lagged
    within = PrefixMemConfig(AddressSpec(SIZES), 8, HIDDEN)
    assert (within.history, within.lookback) == (0, 2)
    assert not {"cross_item", "lags", "earlier_codes", "output_slot"} & within.to_dict().keys()
    last_token = PrefixMemConfig(AddressSpec.cross_item(SIZES, active_levels=(0,)), 8, HIDDEN)
    assert (last_token.history, last_token.lookback) == (1, 2)
