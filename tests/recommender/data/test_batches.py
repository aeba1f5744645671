"""Masks and labels against their definition, and the loss of packed rows against that of the sequences alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefixmem_fast import attach
from prefixmem_fast.recommender.data.batches import causal_batch, source_target_batch
from tests.helpers.models import encoder, sid, tiny_model, vocabulary

PAD = 0


def row(*sequences):
    """Sequences packed into one row."""
    return {
        "input_ids": torch.tensor([token for one in sequences for token in one]),
        "position_ids": torch.tensor([i for one in sequences for i in range(len(one))]),
    }


def test_padded_by_hand():
    batch = causal_batch([row([5, 0, 7]), row([8]), row([9, 4])], pad=0)
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    assert batch["input_ids"].tolist() == [[5, 0, 7], [8, 0, 0], [9, 4, 0]]
    assert batch["labels"].tolist() == [[-100, 0, 7], [-100, -100, -100], [-100, 4, -100]]  # a 0 that is no padding
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert causal_batch([row([5]), row([6, 7])], pad=3)["input_ids"].tolist() == [[5, 3], [6, 7]]


def test_packed_by_hand():
    batch = causal_batch([row([5, 6], [7]), row([8, 9])], pad=2)
    low = torch.finfo(torch.float32).min
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 0], [0, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, -100], [-100, 9, -100]]
    assert batch["attention_mask"].tolist() == [
        [[[0, low, low], [0, 0, low], [low, low, 0]]],
        [[[0, low, low], [0, 0, low], [low, low, 0]]],
    ]
    assert batch["attention_mask"].dtype == torch.float32


LENGTHS = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=4)


@given(LENGTHS, st.sampled_from([0, 1, 9]))
def test_any_lengths(packs, pad):
    token = iter(range(1, 10_000))
    rows = [[[next(token) % 10 for _ in range(length)] for length in lengths] for lengths in packs]
    batch = causal_batch([row(*sequences) for sequences in rows], pad)
    width = max(sum(lengths) for lengths in packs)
    packed = any(len(lengths) > 1 for lengths in packs)
    assert set(batch) == {"input_ids", "labels", "attention_mask"} | ({"position_ids"} if packed else set())
    for i, sequences in enumerate(rows):
        of = [(number, place) for number, one in enumerate(sequences) for place in range(len(one))]
        flat = [value for one in sequences for value in one]
        empty = [pad] * (width - len(flat))
        assert batch["input_ids"][i].tolist() == flat + empty
        labels = [value if place else -100 for value, (_, place) in zip(flat, of, strict=True)]
        assert batch["labels"][i].tolist() == labels + [-100] * len(empty)
        if not packed:
            assert batch["attention_mask"][i].tolist() == [1] * len(flat) + [0] * len(empty)
            continue
        assert batch["position_ids"][i].tolist()[: len(flat)] == [place for _, place in of]
        mask = batch["attention_mask"]
        assert mask.shape == (len(rows), 1, width, width)
        for t in range(width):
            for s in range(width):
                allowed = s <= t and (of[s][0] == of[t][0] if max(s, t) < len(flat) else s == t)
                assert mask[i, 0, t, s] == (0 if allowed else torch.finfo(torch.float32).min)


def test_parts_by_hand():
    rows = [
        {"input_ids": torch.tensor([5, 0, 7]), "labels": torch.tensor([3, 0])},
        {"input_ids": torch.tensor([8]), "labels": torch.tensor([9, 4, 2])},
    ]
    batch = source_target_batch(rows, pad=0)
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    assert batch["input_ids"].tolist() == [[5, 0, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[3, 0, -100], [9, 4, 2]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert source_target_batch(rows, pad=6)["input_ids"].tolist() == [[5, 0, 7], [8, 6, 6]]


def packs():
    """Rows of packed sequences; some end inside a SID that the next would go on with."""
    return [
        [[1, *sid(1, 3, 4), *sid(0, 1, 5)], [1, *sid(3, 3)], [sid(3, 3, 4)[2], 9, *sid(1, 0, 1)]],
        [[1, *sid(3)], [sid(3, 4)[1], sid(3, 4, 0)[2], 4]],
        [[1, 5, 6, *sid(0, 1, 5), 7, 8, *sid(1, 4, 4), 2]],
    ]


def mean_of_sequences(model, sequences):
    """Of the tokens that something predicts, by one call a sequence."""
    total, count = 0.0, 0
    for one in sequences:
        logits = model(torch.tensor([one])).logits[0, :-1].float()
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(one[1:]), reduction="sum")
        count += len(one) - 1
    return total / count


def loss_and_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.fixture(params=["qwen3", "gpt2", "qwen3 with PrefixMem", "gpt2 with PrefixMem"])
def model(request):
    family, *more = request.param.split()
    made = tiny_model(family)
    return attach(made, encoder(), vocabulary()) if more else made


def test_packed_rows_have_the_loss_and_gradients_of_their_sequences(model):
    sequences = [one for pack in packs() for one in pack]
    expected, gradients = loss_and_gradients(model, mean_of_sequences(model, sequences))
    packed = causal_batch([row(*pack) for pack in packs()], PAD)
    padded = causal_batch([row(one) for one in sequences], PAD)
    for batch in (packed, padded):
        loss, found = loss_and_gradients(model, model(**batch).loss)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        assert len(found) == len(gradients)
        for one, other in zip(found, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        joined = causal_batch([row([token for one in pack for token in one]) for pack in packs()], PAD)
        joined["labels"] = packed["labels"]
        assert abs(model(**joined).loss - expected) > 1e-2  # so the mask and the positions matter


def test_packed_rows_in_bfloat16(model):
    batch = causal_batch([row(*pack) for pack in packs()], PAD)
    with torch.no_grad():
        exact = model(**batch).loss
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch).loss
    assert abs(loss.float() - exact) < 0.05 * exact


@pytest.mark.parametrize("attached", [False, True])
def test_parts_have_the_loss_of_theirs_alone(attached):
    model = tiny_model("t5")
    if attached:
        attach(model, encoder(), vocabulary())
    sources = [[*sid(1, 3, 4), *sid(0, 1, 5)], [9, 4, *sid(3, 3, 4), 5], [*sid(0, 0, 0)]]
    targets = [[*sid(3, 3, 3), 2], [6, 2], [7, *sid(1, 0, 1), 8, 2]]
    parts = list(zip(sources, targets, strict=True))
    with torch.no_grad():
        total = sum(len(t) * model(input_ids=torch.tensor([s]), labels=torch.tensor([t])).loss for s, t in parts)
        rows = [{"input_ids": torch.tensor(s), "labels": torch.tensor(t)} for s, t in parts]
        loss = model(**source_target_batch(rows, PAD)).loss
    torch.testing.assert_close(loss, total / sum(map(len, targets)), rtol=1e-5, atol=1e-6)
