"""The study with a pre-trained language model: what trains, what is saved, and that it goes on after a kill."""

import argparse
import json
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from bench.cli import main as bench
from bench.quality import arms
from bench.quality import language_model as study
from bench.rows import read_rows
from prefixmem_fast.recommender.training import run as training
from prefixmem_fast.recommender.training.backbone import make_tokenizer
from prefixmem_fast.recommender.training.run import load_data, prepare
from tests.helpers.runs import write_real_files

SMALL = {
    "table_rows": 40,
    "history_codes": [2, 3],
    "history_rows": 40,
    "heads": 2,
    "max_order": 2,
    "memory_dim": 8,
    "history_dim": 8,
}


def save_llama(folder, tied):
    tokenizer = make_tokenizer(["red thing number 1"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def small_study(tmp_path, monkeypatch):
    """A tiny Llama of random weights and a small catalogue; returns the arguments of the command."""
    files = write_real_files(tmp_path, monkeypatch)
    monkeypatch.setattr(study, "SETS", {study.DATA_SET: arms.DataSet(*files, 6, 60)})
    monkeypatch.setattr(study, "TEXT", "items.json")
    monkeypatch.setattr(study, "RECIPE", {**arms.RECIPE, **SMALL, "codebook_sizes": [6, 6, 6], "max_items": 5})
    monkeypatch.setattr(study, "CHANGES", {**study.CHANGES, "batch_size": 8, "eval_users": 20, "learning_rate": 1e-2})
    save_llama(tmp_path / "llama", tied=True)
    places = {"gguf": tmp_path / "llama", "data": tmp_path, "runs": tmp_path / "runs", "out": tmp_path / "rows.jsonl"}
    words = [word for name, path in places.items() for word in (f"--{name}", str(path))]
    return [*words, "--turns", "1", "--examples", "20", "--beams", "10", "--precision", "float32"]


def main(arguments):
    return bench(["language-model-study", *arguments])


def config_and_data(tmp_path, arm, model="llama"):
    options = argparse.Namespace(data=tmp_path, precision="float32", seed=0)
    config = study.config_of(arm, tmp_path / model, options, steps=4)
    return config, load_data(config)


def keep_pace(runs, seconds_per_step, precision="float32"):
    """As if the pace had been taken."""
    runs.mkdir(parents=True, exist_ok=True)
    known = {arm: {"arm": arm, "seconds_per_step": seconds} for arm, seconds in seconds_per_step.items()}
    (runs / f"pace-{precision}-1-0.json").write_text(json.dumps(known))


@pytest.mark.parametrize("tied", [True, False])
def test_of_the_model_only_adapters_and_rows_of_sid_tokens_train(tmp_path, small_study, tied):
    save_llama(tmp_path / "model", tied)
    config, data = config_and_data(tmp_path, "prefixmem", "model")
    run = prepare(config, data)
    before = [e.weight.detach().clone() for e in (run.model.get_input_embeddings(), run.model.get_output_embeddings())]
    model = study.add_adapters(run.model, config, run.vocabulary)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kinds = ("lora_", "trainable_tokens_delta", "prefixmem")
    assert {kind for kind in kinds for name in trained if kind in name} == set(kinds)
    assert all(any(kind in name for kind in kinds) for name in trained)
    rows = [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name]
    assert [len(p) for p in rows] == [len(run.vocabulary)] * (1 if tied else 2)

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad and p.layout == torch.strided], 1.0)
    ids = torch.from_numpy(run.tokens.sids[:4]).reshape(1, -1)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    wrappers = run.model.get_input_embeddings(), run.model.get_output_embeddings()
    own = run.vocabulary.table[:, 0] > 0
    for wrapper, weight in zip(wrappers, before, strict=True):
        now = wrapper.token_adapter.get_merged_weights(["default"])
        assert torch.equal(now[: len(own)][~own], weight[: len(own)][~own])
        assert (now[: len(own)][own] != weight[: len(own)][own]).any()
    merged = [wrapper.token_adapter.get_merged_weights(["default"]) for wrapper in wrappers]
    assert torch.equal(*merged) == tied


@pytest.mark.parametrize("arm", ["plain", "cross-item-1"])
def test_what_a_run_has_saved_is_what_it_has_trained(tmp_path, small_study, monkeypatch, arm):
    config, data = config_and_data(tmp_path, arm)
    models = []

    def add(model, config, vocabulary):
        models.append(study.add_adapters(model, config, vocabulary))
        return models[-1]

    training.train(config, tmp_path / "run", quiet=True, data=data, add_arm=add)
    run = study.trained(config, data, tmp_path / "run" / "model")
    ids = torch.from_numpy(run.tokens.sids[:6]).reshape(1, -1)
    fresh = study._prepared(config, data).model.eval()
    with torch.no_grad():
        expected, found, untrained = (m(input_ids=ids).logits for m in (models[0].eval(), run.model, fresh))
    assert torch.equal(found, expected)
    assert not torch.allclose(found, untrained, atol=1e-3)


def test_arms_train_by_their_pace_once_and_give_rows(tmp_path, small_study, capsys):
    assert main([*small_study, "--arms", "plain,cross-item", "--pace"]) == 0
    timed = read_rows(tmp_path / "language_model_pace.jsonl", ("arm", "seconds_per_step", "tokens_per_second"))
    assert [row["arm"] for row in timed] == ["plain", "cross-item"]
    assert all(row["tokens_per_second"] > 0 for row in timed)
    assert not (tmp_path / "rows.jsonl").exists()

    keep_pace(tmp_path / "runs", {"plain": 0.5, "cross-item": 0.75}, "bfloat16")
    command = [*small_study, "--arms", "plain,cross-item", "--seconds", "3", "--precision", "bfloat16"]
    assert main(command) == 0
    rows = read_rows(tmp_path / "rows.jsonl", ("arm", "seed", "recipe"))
    assert [(row["arm"], row["steps"]) for row in rows] == [("plain", 6), ("cross-item", 4)]  # in equal time
    assert rows[0]["parameters"]["encoder"] == 0 < rows[1]["parameters"]["encoder"]
    for row in rows:
        assert row["test"]["examples"] == 20
        assert len(row["test"]["teacher_forcing"]["accuracy"]) == 3
        assert {"recall@10", "ndcg@10"} <= row["test"]["searches"]["constrained"].keys()
    assert str(tmp_path) not in (tmp_path / "rows.jsonl").read_text()
    before = (tmp_path / "rows.jsonl").read_text()
    capsys.readouterr()
    assert main(command) == 0
    assert (tmp_path / "rows.jsonl").read_text() == before
    assert "plain: done" in capsys.readouterr().err


def test_a_killed_run_goes_on_with_the_steps_that_it_began_with(tmp_path, small_study, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for runs in (whole, parts):
        keep_pace(runs, {"prefixmem": 0.25})
    command = [*small_study, "--arms", "prefixmem", "--seconds", "3"]

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", partial(training.train, stop_at=7))
        patch.setattr(study, "trained", killed)
        assert main([*command, "--runs", str(parts)]) == 130
    steps, one = [], Trainer.training_step
    monkeypatch.setattr(Trainer, "training_step", lambda self, *a, **o: steps.append(1) or one(self, *a, **o))
    keep_pace(parts, {"prefixmem": 0.25, "plain": 9.0})
    capsys.readouterr()
    assert main([*command, "--runs", str(parts)]) == 0
    assert "prefixmem: 12 steps of 0.25 s, going on" in capsys.readouterr().err
    assert len(steps) == 5  # after the checkpoint at step 7
    assert main([*command, "--runs", str(whole), "--out", str(tmp_path / "other.jsonl")]) == 0
    ((resumed,), (uninterrupted,)) = (
        read_rows(tmp_path / name, ("arm", "validation")) for name in ("rows.jsonl", "other.jsonl")
    )
    losses = [[point["loss"] for point in row["validation"]] for row in (resumed, uninterrupted)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12


def test_a_model_or_an_arm_that_is_not_there_is_refused(tmp_path, small_study, monkeypatch, capsys):
    monkeypatch.delenv(study.MODEL_VARIABLE, raising=False)
    for arguments, words in (
        (small_study[2:], f"no model: set {study.MODEL_VARIABLE} or give --gguf"),
        ([*small_study, "--gguf", str(tmp_path / "no.gguf")], "no.gguf is not there; give a GGUF file"),
        ([*small_study, "--arms", "wide"], "--arms: 'wide' is unknown; known are plain, prefixmem"),
        ([*small_study, "--seconds", "0"], "--seconds 0.0; give 1 or more"),
    ):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "items.json").unlink()
    assert main(small_study) == 2
    assert "items.json is not there; get it: curl" in capsys.readouterr().err
