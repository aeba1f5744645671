import copy

import pytest
import torch

from prefixmem_fast import AddressSpec, DecodingState, PrefixMem, PrefixMemConfig, SIDVocabulary
from prefixmem_fast.operation import token_memory, window_memory
from tests.helpers.cases import BACKENDS, MODES, mostly_slow, slow
from tests.helpers.models import (
    SIZES,
    TOKENS,
    cross_item_encoder,
    encoder,
    lagged_encoder,
    sid,
    vocabulary,
)


@pytest.mark.parametrize(
    ("mode", "backend"),
    mostly_slow(lambda mode, backend: mode == "prefix" or backend != "triton", MODES, BACKENDS),
)
def test_steps_are_the_encoder_over_the_whole_sequence(mode, backend):
    """Bit for bit in S; W_out is applied to other shapes, so m within its rounding."""
    one = encoder(spec={"mode": mode, "active_levels": (1, 3), "addressing": "hash"}, backend=backend)
    known, generator = vocabulary(), torch.Generator().manual_seed(0)
    good = [[*sid(1, 3, 4), 5, *sid(0, 1, 5), *sid(3, 3)], [7, 8, *sid(3, 0), sid(0)[0], *sid(0, 0, 1), 9]]
    tokens = torch.cat([torch.tensor(good), torch.randint(0, TOKENS + 9, (4, 9), generator=generator)])
    whole = one.encode_tokens(tokens, known)
    for prompt in (1,) if backend == "triton" else (0, 1, 5):
        state = DecodingState(one, known, len(tokens))
        order = torch.arange(len(tokens))
        torch.testing.assert_close(state.prefill(tokens[:, :prompt]), whole[:, :prompt])
        for t in range(prompt, tokens.shape[1]):
            torch.testing.assert_close(state.step(tokens[order, t]), whole[order, t], rtol=1e-6, atol=1e-6)
            memory = one.memory.read_tokens(tokens[order, : t + 1], known)[:, -1]
            assert torch.equal(one.memory.read_window(state.tokens, known), memory)
            moved = torch.randint(0, len(tokens), (len(tokens),), generator=generator)
            state.reorder(moved)
            order = order[moved]


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        ("prefix", torch.float32),
        slow("prefix", torch.bfloat16),
        slow("suffix", torch.float16),
        slow("full", torch.float64),
    ],
)
def test_windows_of_every_backend_are_those_of_the_reference(mode, dtype):
    """Several blocks of sequences and several column tiles; bit for bit."""
    torch.manual_seed(0)
    spec = AddressSpec(SIZES, table_rows=50, heads=3, max_order=2, mode=mode, active_levels=(1, 2))
    weight = torch.randn(spec.total_rows, 1100).to(dtype)
    first = [token for token, (level, _) in enumerate(vocabulary().table.tolist()) if level]
    ids = torch.tensor(first)[torch.randint(len(first), (5, 12))]
    ids[0] = torch.tensor(sid(1, 3, 4) * 4)
    table, met = vocabulary().table, 0
    for begin, end in ((0, 1), (0, 2), (3, 5), (2, 12), (11, 12)):
        windows = ids[:, begin:end]
        expected = token_memory(windows, table, weight, spec, backend="reference")[:, -1]
        for backend in BACKENDS:
            out = torch.full_like(expected, torch.nan)
            assert window_memory(windows, table, weight, spec, backend=backend, out=out) is out
            if (backend, dtype) == ("triton", torch.bfloat16):  # the interpreter cuts where a GPU rounds
                torch.testing.assert_close(out, expected, rtol=2**-7, atol=0)
            else:
                assert torch.equal(out, expected)
            assert torch.equal(window_memory(windows.int(), table, weight, spec, backend=backend), out)
        met += bool(expected.any())
    assert met >= 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_of_a_window_that_do_not_stand_side_by_side(backend):
    one = encoder()
    weight, spec = one.memory.weight.detach(), one.config.spec
    ids = torch.tensor([sid(1, 3, 4), [7, *sid(1, 3)], sid(3, 0, 5)])
    strided = ids.t().contiguous().t()
    assert strided.stride(1) > 1
    found, expected = (window_memory(w, vocabulary().table, weight, spec, backend=backend) for w in (strided, ids))
    assert expected.any()
    assert torch.equal(found, expected)


def test_a_prompt_begins_afresh():
    """After a longer one, whose end would make its first token the second of a SID."""
    one, state = encoder(), DecodingState(encoder(), vocabulary(), 1)
    state.prefill(torch.tensor([[5, *sid(1)]]))
    state.prefill(torch.empty(1, 0, dtype=torch.int64))
    assert (state.tokens == -1).all()
    second = torch.tensor([sid(1, 3)[1]])
    torch.testing.assert_close(state.step(second), one.encode_tokens(second[None], vocabulary())[:, -1])


def test_what_a_window_may_be():
    one = encoder()
    table, weight, spec = vocabulary().table, one.memory.weight.detach(), one.config.spec
    width = spec.heads * weight.shape[1]
    assert window_memory(torch.empty(0, 3, dtype=torch.int64), table, weight, spec).shape == (0, width)
    with pytest.raises(ValueError, match=r"windows has shape \(2, 0\); give a token or more a window"):
        window_memory(torch.zeros(2, 0, dtype=torch.int64), table, weight, spec)
    for out, message in (
        (torch.zeros(2, width + 1), rf"give contiguous torch.float32 \(2, {width}\)"),
        (torch.zeros(width, 2).t(), "not contiguous; give"),
        (torch.zeros(2, width).double(), "out is torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            window_memory(torch.zeros(2, 3, dtype=torch.int64), table, weight, spec, out=out)
    with pytest.raises(TypeError, match=r"windows has dtype torch\.float32"):
        window_memory(torch.zeros(2, 3), table, weight, spec)


def encoders():
    """With tables alone, with cross-item orders, with lags and a head, quantized, in bfloat16."""
    yield encoder()
    yield cross_item_encoder()
    yield lagged_encoder()
    yield encoder().quantize("int8")
    yield encoder().bfloat16()


@pytest.mark.parametrize("one", list(encoders()))
def test_a_window_is_encoded_into_what_is_given(one):
    """m and nothing else is written, of text and SIDs, and with W_out wrapped as LoRA wraps it."""
    ids = torch.tensor([[*sid(1, 3, 4), *sid(0, 1, 5)], [7, *sid(0, 1, 5), *sid(1, 3)], [9, 9, 9, 9, 9, 9]])
    known, dtype = vocabulary(), one.out_proj.weight.dtype
    for end in (1, 5, 6):
        windows = ids[:, :end]
        expected, head = one.encode_stream(windows, known)
        found = one.encode_last(windows, known)
        torch.testing.assert_close(found.m, expected[:, -1], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
        assert (found.head is None) == (head is None)
        if head is not None:
            torch.testing.assert_close(found.head, head[:, -1], rtol=1e-5, atol=1e-5)
        out = torch.full((3, one.config.hidden_size), torch.nan, dtype=dtype)
        workspace = torch.full((4 * 32,), torch.nan, dtype=dtype)
        assert one.encode_window(windows, known, out=out, workspace=workspace) is out
        torch.testing.assert_close(out, found.m, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
        wrapped = copy.deepcopy(one)
        wrapped.out_proj = torch.nn.Sequential(wrapped.out_proj)
        assert torch.equal(wrapped.encode_window(windows, known, out=torch.empty_like(out)), out)


def test_a_window_in_a_compiled_graph():
    one, known = encoder(), vocabulary()
    compiled = torch.compile(lambda windows: one.encode_window(windows, known), fullgraph=True, backend="aot_eager")
    windows = torch.tensor([sid(1, 3, 4), [7, *sid(1, 3)]])
    with torch.no_grad():
        assert torch.equal(compiled(windows), one.encode_window(windows, known))


def test_decoding_state_errors_and_batch_changes():
    one = encoder()
    with pytest.raises(ValueError, match="codebook_sizes"):
        DecodingState(one, SIDVocabulary.from_table({}, (4, 5)), 2)
    state = DecodingState(one, vocabulary(), 1)
    state.prefill(torch.tensor([sid(1, 3)]))
    with pytest.raises(ValueError, match=r"tokens has shape \(2,\); give one token a sequence, \[1\]"):
        state.step(torch.tensor([5, 6]))
    with pytest.raises(ValueError, match="batch = -1 is negative"):
        DecodingState(one, vocabulary(), -1)
    for call, message in (
        (lambda: state.step(torch.tensor([5.0])), "tokens has dtype torch.float32"),
        (lambda: state.prefill(torch.tensor([[5.0]])), "input_ids has dtype torch.float32"),
        (lambda: state.reorder(torch.tensor([0.0])), "beams has dtype torch.float32"),
        (lambda: DecodingState(one, vocabulary(), 2.0), "batch = 2.0 is not an integer"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    two = DecodingState(one, vocabulary(), 2)
    with pytest.raises(ValueError, match=r"input_ids has shape \(1, 3\); give a prompt a sequence, \[2, T\]"):
        two.prefill(torch.tensor([sid(1, 3, 4)]))  # it would be read as that of both
    state.reorder(torch.zeros(4, dtype=torch.int64))
    m = state.step(torch.tensor([sid(1, 3, 4)[2]] * 4))
    torch.testing.assert_close(m, one.encode_tokens(torch.tensor([sid(1, 3, 4)] * 4), vocabulary())[:, 2])


def test_a_cpu_multiplies_nothing_by_w_out_where_no_level_is_active():
    spec = AddressSpec((9, 9), table_rows=30, active_levels=(2,))
    encoder = PrefixMem(PrefixMemConfig(spec, memory_dim=8, hidden_size=4))
    vocabulary = SIDVocabulary.from_table({i: (1 + i // 9, i % 9) for i in range(18)}, (9, 9))
    state, rows = DecodingState(encoder, vocabulary, 3), []
    encoder.out_proj.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    first, second = state.step(torch.tensor([0, 1, 2])), state.step(torch.tensor([9, 10, 1]))
    assert rows == [3]
    assert first.shape == second.shape == (3, 4)
    assert not first.any()
    assert second[:2].any(1).all()
