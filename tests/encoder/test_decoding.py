import pytest
import torch

from prefixmem_fast import AddressSpec, DecodingState, PrefixMem, PrefixMemConfig, SIDVocabulary
from tests.helpers.cases import BACKENDS, MODES, mostly_slow, slow
from tests.helpers.models import SIZES, TOKENS, encoder, sid, vocabulary


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
            active = (state.level == 1) | (state.level == 3)
            assert torch.equal(state.total.flatten(1)[active], memory[active])
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
def test_the_kernel_is_the_pytorch_step(mode, dtype):
    """Several blocks of sequences and several column tiles, each with a copy of codes and levels."""
    torch.manual_seed(0)
    spec = AddressSpec(SIZES, table_rows=50, heads=3, max_order=2, mode=mode, active_levels=(1, 2))
    config = PrefixMemConfig(spec, memory_dim=3 * 1100, hidden_size=4, memory_init_std=1.0)
    kernel = PrefixMem(config, backend="triton").to(dtype)
    plain = PrefixMem(config, backend="reference").to(dtype)
    plain.load_state_dict(kernel.state_dict())
    states = [DecodingState(one, vocabulary(), 5) for one in (kernel, plain)]
    assert len(states[0]._state.codes) > 1
    first = [token for token, (level, _) in enumerate(vocabulary().table.tolist()) if level]
    for step in range(6):
        tokens = torch.tensor(first)[torch.randint(len(first), (5,))]
        tokens[0] = sid(1, 3, 4)[step % 3]
        found, expected = (state.step(tokens) for state in states)
        assert torch.equal(states[0].codes, states[1].codes)
        assert torch.equal(states[0].level, states[1].level)
        active = (states[0].level == 1) | (states[0].level == 2)
        assert torch.equal(states[0].total[active], states[1].total[active])
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
        assert (states[0]._state.codes == states[0].codes).all()
        for state in states:
            state.reorder(torch.tensor([0, 2, 1, 4, 4]))


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
    assert rows == [0, 3]
    assert first.shape == second.shape == (3, 4)
    assert not first.any()
    assert second[:2].any(1).all()
