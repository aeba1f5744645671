"""What pre-training by classification is given, and what it leaves behind, for encoders with cross-item orders."""

import numpy as np
import pytest
import torch

from prefixmem_fast import AddressSpec, PrefixMem, PrefixMemConfig
from prefixmem_fast.recommender.training.classification import NextCode, _Batches, _windows, pretrain
from prefixmem_fast.recommender.training.run import train
from tests.helpers.models import cross_item_encoder
from tests.helpers.runs import options

CODES = torch.arange(24).view(8, 3) % 4
HISTORIES = [np.array(items) for items in ([0, 1, 2, 3], [4], [5, 6, 7])]


def test_an_interaction_comes_with_the_items_before_it_of_the_same_user():
    batches = _Batches(CODES, HISTORIES, items=3, batch=400, length=2, seed=0)
    before = {}
    for history in HISTORIES:
        for place, item in enumerate(history):
            before[tuple(_windows(CODES, [history[: place + 1]], 3).flatten().tolist())] = item
    drawn = batches[0]["codes"]
    assert drawn.shape == (400, 3, 3)
    assert {tuple(window) for window in drawn.flatten(1).tolist()} == set(before)
    assert torch.equal(drawn, batches[0]["codes"])
    assert not torch.equal(drawn, batches[1]["codes"])
    first = _windows(CODES, [np.array([4])], 3)
    assert first.tolist() == [[[-1] * 3, [-1] * 3, CODES[4].tolist()]]


def test_every_level_that_some_table_speaks_for_has_a_head():
    one = cross_item_encoder(history=2)
    model = NextCode(one)
    assert model.levels == [0, 1, 2]  # of the item itself 1 and 2; the items before speak for c_1 too
    codes = torch.stack([torch.randint(0, size, (5, 3)) for size in (4, 5, 6)], -1)  # [M, items, L]
    losses, right = model.losses(codes)
    m = one(codes)
    for i, (level, place) in enumerate(zip(model.levels, (m[:, 1, 2], m[:, 2, 0], m[:, 2, 1]), strict=True)):
        logits = model.heads[i](place)
        expected = torch.nn.functional.cross_entropy(logits, codes[:, 2, level], reduction="none")
        torch.testing.assert_close(losses[:, i], expected)
        assert torch.equal(right[:, i], logits.argmax(-1) == codes[:, 2, level])
    within = AddressSpec((4, 5, 6), table_rows=50, active_levels=(3,))
    with pytest.raises(ValueError, match=r"active_levels = \(3,\): no level comes after them; give one below 3"):
        NextCode(PrefixMem(PrefixMemConfig(within, 8, 16)))


@pytest.mark.parametrize("arm", ["prefixmem", "cross-item"])
def test_pre_trained_cross_item_tables_are_trained_on(arm, tmp_path):
    across = {"arm": arm, "history": 1, "history_rows": 300, "history_dim": 8}
    config = options(tmp_path, **across, steps=40, batch_size=64, eval_every=20)
    report = pretrain(config, tmp_path / "pretraining", quiet=True)
    assert report["training"][-1]["loss"] < report["training"][0]["loss"] - 0.1
    assert {"accuracy_1", "accuracy_2", "accuracy_3"} <= set(report["validation"][-1])
    found = PrefixMem.from_pretrained(tmp_path / "pretraining" / "encoder")
    table = "memory.weight" if arm == "cross-item" else "cross_item.memory.weight"
    assert found.get_parameter(table).any()
    short = config.replace(steps=4, eval_every=4, encoder=str(tmp_path / "pretraining" / "encoder"), learning_rate=0.0)
    train(short, tmp_path / "run", quiet=True)
    again = PrefixMem.from_pretrained(tmp_path / "run" / "model")
    assert torch.equal(again.get_parameter(table), found.get_parameter(table))
