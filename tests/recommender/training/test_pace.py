"""Times of steps: that the steps are those of a run, and that runs take turns."""

import pytest
import torch

from prefixmem_fast.recommender.training import pace
from prefixmem_fast.recommender.training.arms import add_arm
from prefixmem_fast.recommender.training.pace import seconds_of_steps
from prefixmem_fast.recommender.training.run import load_data, load_run, prepare, train
from tests.helpers.runs import TINY, options


def prepared(config):
    run = prepare(config, load_data(config))
    add_arm(run.model, config, run.vocabulary)
    return run


@pytest.mark.parametrize(
    "changes", [{"max_grad_norm": 0.01}, {"max_grad_norm": 0.0, "grad": "fused"}, {"precision": "bfloat16"}]
)
def test_steps_are_those_of_a_run(tmp_path, changes):
    torch.set_num_threads(1)
    same = {"steps": 4, "warmup_steps": 0, "schedule": "constant", "keep_best": False, "learning_rate": 1e-3}
    without_dropout = {**TINY, **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)}
    config = options(tmp_path, model_options=without_dropout, **same, **changes)
    train(config, tmp_path / "run", quiet=True)
    run = prepared(config)
    run.model.eval()
    seconds = seconds_of_steps({"run": run}, steps=3, warm_up=1)
    assert run.model.training
    assert len(seconds["run"]) == 3
    expected = load_run(tmp_path / "run").model.state_dict()
    assert expected.keys() == run.model.state_dict().keys()
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_runs_take_turns(tmp_path, monkeypatch):
    config, turns, clock = options(tmp_path, steps=2), [], iter(range(100))
    batches = []

    def step(run, batch, optimizer):
        turns.append(next(name for name in runs if runs[name] is run))
        batches.append(batch["input_ids"])
        next(clock)

    monkeypatch.setattr(pace, "_step", step)
    monkeypatch.setattr(pace.time, "perf_counter", clock.__next__)
    runs = {"a": prepared(config), "b": prepared(config.replace(arm="plain"))}
    told = []
    assert seconds_of_steps(runs, steps=2, warm_up=1, turn=lambda: told.append(len(turns))) == {
        "a": [2, 2],
        "b": [2, 2],
    }
    assert [set(turns[i : i + 2]) for i in (0, 2, 4)] == [{"a", "b"}] * 3
    assert len({tuple(turns[i : i + 2]) for i in (0, 2, 4)}) == 2, "in changing orders"
    assert told == [4, 6]
    assert all(torch.equal(a, b) for a, b in zip(batches[::2], batches[1::2], strict=True))
    assert torch.equal(batches[0], batches[4]), "a stream of two batches is read again"
    assert batches[0].shape != batches[2].shape or not torch.equal(batches[0], batches[2])
