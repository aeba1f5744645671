import math

import numpy as np
import pytest
import torch

from prefixmem_fast.recommender.data import Examples
from prefixmem_fast.recommender.evaluation.prompts import is_encoder_decoder, prompts_of
from prefixmem_fast.recommender.evaluation.teacher_forcing import TeacherForced, teacher_forced
from tests.helpers.examples import (
    CPU,
    ENCODERS,
    PAD,
    START,
    Says,
    examples,
    made_model,
    tokens,
)
from tests.helpers.models import FIRST_TEXT, TOKENS, tiny_model


def next_logits(model, history, begun, start=START):
    """Logits float64 ``[V]`` after a history of tokens and the begun SID, by one forward over one row."""
    with torch.no_grad():
        if is_encoder_decoder(model):
            given = {"input_ids": torch.tensor([history]), "decoder_input_ids": torch.tensor([[PAD, *begun]])}
        else:
            given = {"input_ids": torch.tensor([[*([] if start is None else [start]), *history, *begun]])}
        return model(**given, use_cache=False).logits[0, -1].double()


def plain_scores(model, chosen, known):
    """Rank and loss of each level of each target, one forward and one softmax each."""
    rank, loss = np.zeros((len(chosen), known.levels), int), np.zeros((len(chosen), known.levels))
    for i, (history, target) in enumerate(zip(chosen.histories, chosen.targets, strict=True)):
        sid = known.sids[target].tolist()
        for l, token in enumerate(sid):
            weights = next_logits(model, known.history(history), sid[:l], known.start).exp()
            chance = weights / weights.sum()
            loss[i, l] = -math.log(chance[token])
            rank[i, l] = sum(other > chance[token] for other in chance.tolist())
    return rank, loss


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma3", "t5"])
@pytest.mark.parametrize("kind", list(ENCODERS))
def test_scores_are_those_of_one_forward_a_code(family, kind):
    model, chosen = made_model(family, kind), examples()
    found = teacher_forced(model, chosen, tokens())
    rank, loss = plain_scores(model, chosen, tokens())
    assert found.rank.dtype == np.int64
    np.testing.assert_array_equal(found.rank, rank)
    np.testing.assert_allclose(found.loss, loss, rtol=1e-4, atol=1e-4)
    assert len(set(rank.flatten())) > 10, "the ranks are told apart"
    if kind != "bare":
        assert abs(teacher_forced(tiny_model(family), chosen, tokens()).loss - found.loss).min(0).max() > 1e-2


def test_without_a_start_token():
    model, chosen = made_model("qwen3"), examples()
    found = teacher_forced(model, chosen, tokens(None))
    rank, loss = plain_scores(model, chosen, tokens(None))
    np.testing.assert_array_equal(found.rank, rank)
    np.testing.assert_allclose(found.loss, loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_batches_do_not_matter_and_no_example_does_not_either(family):
    model, chosen = made_model(family, "prefixmem"), examples()
    whole = teacher_forced(model, chosen, tokens())
    single = teacher_forced(model, chosen, tokens(), max_tokens=1)
    np.testing.assert_array_equal(whole.rank, single.rank)
    np.testing.assert_allclose(whole.loss, single.loss, rtol=1e-4, atol=1e-5)
    assert teacher_forced(model, examples(()), tokens()).rank.shape == (0, 3)


@pytest.mark.parametrize("training", [True, False])
def test_scored_in_eval_mode_and_given_back_as_it_was(training):
    model = made_model("gpt2")  # it has dropout
    expected = teacher_forced(model, examples(), tokens())
    model.train(training)
    found = teacher_forced(model, examples(), tokens())
    assert model.training == model.transformer.h[0].training == training
    np.testing.assert_array_equal(found.loss, expected.loss)
    broken = tokens()
    broken.sids = broken.sids + 1000
    with pytest.raises(IndexError):
        teacher_forced(model, examples(), broken)
    assert model.training == training


def test_rank_counts_the_tokens_before_the_true_one():
    sid = tokens().sids[3]
    logits = torch.zeros(TOKENS)
    logits[sid[0]], logits[sid[1]], logits[FIRST_TEXT] = 5.0, 4.0, 3.0
    logits[sid[2]] = -1.0
    found = teacher_forced(Says(logits.tolist()), Examples(["u"], [np.array([0])], np.array([3])), tokens())
    assert found.rank.tolist() == [[0, 1, TOKENS - 1]]
    assert found.accuracy == [1.0, 0.0, 0.0]
    total = math.log(sum(math.exp(x) for x in logits.tolist()))
    np.testing.assert_allclose(found.loss, [[total - 5, total - 4, total + 1]], rtol=1e-5)


def test_a_model_that_diverged_has_no_code_right():
    found = teacher_forced(Says([float("nan")] * TOKENS), examples(), tokens())
    assert found.accuracy == [0.0] * 3
    assert not found.reachable(10).any()


def test_a_model_that_tells_no_token_from_another_does_not_get_all_of_them_right():
    """One prediction a place, as argmax makes it; bfloat16 logits are often equal."""
    found = teacher_forced(Says([0.0] * TOKENS), examples(), tokens())
    assert found.accuracy == [0.0] * 3


def test_accuracy_and_reachable():
    scored = TeacherForced(np.array([[0, 3, 0], [9, 0, 500], [10, 0, 0], [0, 10, 0]]), np.zeros((4, 3), np.float32))
    assert scored.accuracy == [0.5, 0.5, 0.75]
    assert scored.reachable().tolist() == [True, True, False, False]
    assert scored.reachable(3).tolist() == [False, False, False, False]
    assert scored.reachable(4).tolist() == [True, False, False, False]
    assert scored.reachable(11).tolist() == [True] * 4


@pytest.mark.parametrize("encoder_decoder", [False, True])
@pytest.mark.parametrize("start", [START, None])
@pytest.mark.parametrize("max_tokens", [1, 24, 4096])
def test_prompts_hold_each_example_once(encoder_decoder, start, max_tokens):
    chosen, known, seen = examples((2, 1, 2, 2, 4, 1, 2, 2)), tokens(start), []
    for batch in prompts_of(chosen, known, encoder_decoder=encoder_decoder, device=CPU, max_tokens=max_tokens):
        seen += batch.rows.tolist()
        length = len(chosen.histories[batch.rows[0]])
        assert len(batch.rows) == 1 or len(batch.rows) * (length + 1) * 3 <= max_tokens
        for row, ids, target in zip(batch.rows, batch.input_ids.tolist(), batch.targets.tolist(), strict=True):
            begin = [start] if start is not None and not encoder_decoder else []
            assert ids == [*begin, *known.history(chosen.histories[row])]
            assert target == known.sids[chosen.targets[row]].tolist()
    assert sorted(seen) == list(range(8))
    batches = sum(
        1 for _ in prompts_of(chosen, known, encoder_decoder=encoder_decoder, device=CPU, max_tokens=max_tokens)
    )
    assert batches == {1: 8, 24: 1 + 3 + 1, 4096: 3}[max_tokens]


def test_which_models_have_two_parts():
    assert is_encoder_decoder(tiny_model("t5"))
    assert not is_encoder_decoder(tiny_model("llama"))
    assert not is_encoder_decoder(Says([0.0]))
