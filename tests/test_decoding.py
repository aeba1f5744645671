import pytest
import torch

from prefixmem_fast import DecodingState, SIDVocabulary

from .integrations.models import TOKENS, encoder, sid, vocabulary


@pytest.mark.parametrize("mode", ["prefix", "suffix", "full"])
def test_decoding_state_is_the_encoder_over_the_whole_sequence(mode):
    """Bit for bit in S: the memory is an identity here, and W_out is applied to equal shapes."""
    one, known = encoder(spec={"mode": mode, "active_levels": (1, 3), "addressing": "hash"}), vocabulary()
    generator = torch.Generator().manual_seed(0)
    good = [[*sid(1, 3, 4), 5, *sid(0, 1, 5), *sid(3, 3)], [7, 8, *sid(3, 0), sid(0)[0], *sid(0, 0, 1), 9]]
    tokens = torch.cat([torch.tensor(good), torch.randint(0, TOKENS + 9, (6, 9), generator=generator)])
    whole = one.encode_tokens(tokens, known)
    for prompt in (0, 1, 5, 6):
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


def test_decoding_state_errors_and_batch_changes():
    one = encoder()
    with pytest.raises(ValueError, match="codebook_sizes"):
        DecodingState(one, SIDVocabulary.from_table({}, (4, 5)), 2)
    state = DecodingState(one, vocabulary(), 1)
    state.prefill(torch.tensor([sid(1, 3)]))
    state.reorder(torch.zeros(4, dtype=torch.int64))
    m = state.step(torch.tensor([sid(1, 3, 4)[2]] * 4))
    torch.testing.assert_close(m, one.encode_tokens(torch.tensor([sid(1, 3, 4)] * 4), vocabulary())[:, 2])
