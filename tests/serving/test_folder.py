"""Folders: those of runs begin prompts as training did, others as they are told, and what is wrong is said."""

import json

import numpy as np
import pytest
import torch

from prefixmem_fast.recommender.data import Examples
from prefixmem_fast.recommender.evaluation.prompts import prompts_of
from prefixmem_fast.recommender.training.run import load_run, train
from prefixmem_fast.serving.engine import Request
from prefixmem_fast.serving.folder import read_served
from prefixmem_fast.serving.questions import Items
from prefixmem_fast.serving.transformers_engine import TransformersEngine
from tests.helpers.examples import CODES
from tests.helpers.models import tiny_model, vocabulary
from tests.helpers.runs import TINY_T5, options
from tests.serving.folders import prompt, sids, write_index, write_model


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, more in (("decoder", {}), ("tiger", {"model": "tiger", "model_options": TINY_T5})):
        train(options(folder, steps=4, arm="prefixmem", **more), folder / name, quiet=True)
    return folder


@pytest.mark.parametrize("name", ["decoder", "tiger"])
def test_a_run_is_served_with_the_prompts_of_its_training(runs, name):
    run = load_run(runs / name)
    served = read_served(runs / name, runs / "items.index.json")
    assert served.trained_history == run.config.max_items == 5
    examples = Examples(["user"], [np.array([3, 8, 5])], np.array([0]))
    (batch,) = prompts_of(examples, run.tokens, encoder_decoder=name == "tiger", device=torch.device("cpu"))
    history = [tuple(run.data.catalogue.codes[item].tolist()) for item in (3, 8, 5)]
    assert [served.prompt(history)] == batch.input_ids.tolist()
    assert len(served.start) == (name == "decoder")
    engine = TransformersEngine(runs / name, runs / "items.index.json")
    assert engine.limits == {"min_history": 1 - len(served.start), "max_history": 5, "max_beams": 50}
    assert len(engine.search([Request(tuple(history), 4)])[0].items) == 4
    if name == "decoder":
        assert engine.search([Request((), 2)])[0].items, "the start token alone"
    assert len(Items(runs / name, runs / "items.index.json")) == 60


def test_a_model_alone(tmp_path):
    write_model(tmp_path / "model", "gpt2", "bare")
    index = write_index(tmp_path / "items.json")
    served = read_served(tmp_path / "model", index)
    assert (served.start, served.tokenizer, served.trained_history, served.depth) == ((), None, None, 3)
    assert served.prompt(sids(0, 4)) == prompt(sids(0, 4), ())[0].tolist()
    served = read_served(tmp_path / "model", index, start="1", begin="17", end=18)
    assert served.prompt(sids(0, 4)) == prompt(sids(0, 4), (1,), (17,), (18,))[0].tolist()
    assert (served.before, served.depth, served.trie().depth) == (1, 5, 5)
    assert served.limits(None, 3) == {"min_history": 0, "max_history": 203, "max_beams": 3}, "1024 positions"
    assert served.limits(203, 3)["max_history"] == 203
    with pytest.raises(ValueError, match="max_history = 204; 203 items of 5 tokens fit the model's 1024 positions"):
        served.limits(204, 3)
    for name, value in (("start", "<s>"), ("begin", "x"), ("end", "y")):
        with pytest.raises(ValueError, match=f"{name} = '{value}', and the folder has no tokenizer"):
            read_served(tmp_path / "model", index, **{name: value})


def test_tokens_by_their_names(runs):
    served = read_served(runs / "decoder", runs / "items.index.json", start="<bos>", end="<eos>")
    assert (served.start, served.end) == ((1,), 2)
    with pytest.raises(ValueError, match="start = '<begin>' is no token of the tokenizer"):
        read_served(runs / "decoder", runs / "items.index.json", start="<begin>")


def faults(folder):
    """What is given, and what is said of it."""
    model, index = folder / "model", folder / "items.json"
    other = torch.cat([CODES, CODES[:, :1]], 1)
    (folder / "four.json").write_text(json.dumps({"x": other[0].tolist()}))
    (folder / "unknown.json").write_text(json.dumps({"x": [2, 0, 0]}))
    (folder / "empty").mkdir()
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_text("{}")
    return [
        (folder / "nothing", index, "nothing is no folder; give one of prefixmem train"),
        (folder / "empty", index, "empty holds no model: neither config.json nor run.json is there"),
        (folder / "run", index, "run holds a run without model/: it has not finished"),
        (model, folder / "none.json", "none.json is not there"),
        (model, folder / "four.json", "has 4 levels, and the model in .* was made for 3; give the index"),
        (
            model,
            folder / "unknown.json",
            "has a code without a token in .*level 1.*; give an index of the Semantic IDs",
        ),
    ]


def test_what_is_wrong_with_a_folder_or_a_catalogue(tmp_path):
    write_model(tmp_path / "model")
    write_index(tmp_path / "items.json")
    for folder, catalogue, text in faults(tmp_path):
        for read in (read_served, Items):
            with pytest.raises((OSError, ValueError), match=text):
                read(folder, catalogue)


def test_a_model_without_a_vocabulary(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    with pytest.raises(
        OSError, match=r"model has no Semantic ID vocabulary: neither sid_vocabulary\.json nor prefixmem/"
    ):
        Items(tmp_path / "model", write_index(tmp_path / "items.json"))
    with pytest.raises(OSError, match="has no Semantic ID vocabulary"):
        read_served(tmp_path / "model", tmp_path / "items.json")
    vocabulary().save_pretrained(tmp_path / "model")
    assert len(Items(tmp_path / "model", tmp_path / "items.json")) == 8
