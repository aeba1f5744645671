"""The engine on transformers: what it finds is what `generate_items` finds, level by level."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from prefixmem_fast import SIDTrie, generate_items
from prefixmem_fast.serving import Request, Search, TransformersEngine, make_engine
from tests.helpers.examples import CODES, catalogue
from tests.helpers.models import vocabulary
from tests.recommender.evaluation.test_beams import plain_search
from tests.serving.folders import prompt, sids, write_index, write_model

MODELS = [
    ("qwen3", "prefixmem"),
    ("gpt2", "cross-item"),
    ("llama", "bare"),
    ("mistral_sliding", "prefixmem"),
    ("t5", "sid-transformer"),
]
REQUESTS = [
    Request(sids(*items), beams) for items, beams in (((0,), 7), ((1, 2, 3), 4), ((5,), 7), ((6, 0), 3), ((2,), 2))
]


def served(folder, family="qwen3", kind="prefixmem", **options):
    model = write_model(folder / "model", family, kind)
    return model, TransformersEngine(folder / "model", write_index(folder / "items.json"), **options)


def same_items(found, generated):
    real = [i for i, names in enumerate(generated.items[0]) if names]
    assert [item.names for item in found.items] == [generated.items[0][i] for i in real]
    assert [item.codes for item in found.items] == [tuple(generated.sids[0, i].tolist()) for i in real]
    scores = torch.tensor([item.logprob for item in found.items])
    torch.testing.assert_close(scores, generated.scores[0, real], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "kind"), MODELS)
def test_it_finds_what_generate_items_finds(tmp_path, family, kind):
    start = () if family == "t5" else (1,)
    model, engine = served(tmp_path, family, kind, start="1" if start else None)
    allowed = {tuple(row) for row in vocabulary().encode(CODES).tolist()}
    for request, search in zip(REQUESTS, engine.search(REQUESTS), strict=True):
        history = prompt(request.history, start)
        inputs = {"input_ids": history, "attention_mask": torch.ones_like(history)}
        same_items(
            search, generate_items(model, SIDTrie(catalogue(), vocabulary()), inputs, num_beams=request.num_beams)
        )
        assert len(search.beams) == 3
        for level, beams in enumerate(search.beams, 1):
            expected = plain_search(model, history[0], level, request.num_beams, allowed)
            codes = [tuple(vocabulary().table[list(tokens), 1].tolist()) for _, tokens in expected]
            assert [beam.codes for beam in beams] == codes
            scores = torch.tensor([beam.logprob for beam in beams], dtype=torch.float64)
            torch.testing.assert_close(scores, torch.tensor([s for s, _ in expected]).double(), rtol=0, atol=1e-4)
    assert ("item 1", "item 7") in {item.names for item in engine.search(REQUESTS)[0].items}, "they share a SID"


def test_tokens_around_each_sid(tmp_path):
    model, engine = served(tmp_path, begin=17, end="18", start="none")
    (search,) = engine.search([Request(sids(0, 4), 5)])
    history = prompt(sids(0, 4), (), (17,), (18,))
    trie = SIDTrie(catalogue(), vocabulary(), begin=17, end=18)
    inputs = {"input_ids": history, "attention_mask": torch.ones_like(history)}
    same_items(search, generate_items(model, trie, inputs, num_beams=5))
    assert [len(beam.codes) for level in search.beams for beam in level[:1]] == [1, 2, 3]
    assert {beam.codes for beam in search.beams[0]} <= {(code,) for code in CODES[:, 0].tolist()}


def test_what_it_says_of_itself(tmp_path):
    _, engine = served(tmp_path, max_history=4, max_beams=6)
    assert isinstance(engine.search(REQUESTS[1:2])[0], Search)
    about = engine.describe()
    assert about.pop("version")
    assert about == {
        "engine": "transformers",
        "model": "qwen3",
        "encoder": "PrefixMem",
        "items": 8,
        "levels": 3,
        "codebook_sizes": [4, 5, 6],
        "limits": {"min_history": 1, "max_history": 4, "max_beams": 6},
    }
    for request, text in (
        (Request(sids(*[0] * 5), 2), "history has 5 items; allowed are 4 at most: send the last 4"),
        (Request((), 2), "history has 0 items; this model needs 1 or more"),
        (Request(sids(0), 7), r"num_beams = 7; allowed are 1\.\.6"),
        (Request(sids(0), 0), r"num_beams = 0; allowed are 1\.\.6"),
        (Request(((2, 0, 0),), 2), "no token of level 1 stands for it"),
    ):
        with pytest.raises(ValueError, match=text):
            engine.search([request])


def test_engines_by_name(tmp_path, monkeypatch):
    write_model(tmp_path / "model")
    arguments = tmp_path / "model", write_index(tmp_path / "items.json")
    assert isinstance(make_engine("transformers", *arguments), TransformersEngine)
    monkeypatch.setattr("prefixmem_fast.serving.engine.find_spec", lambda name: None)
    assert isinstance(make_engine("auto", *arguments), TransformersEngine)
    with pytest.raises(ValueError, match="vllm is not installed"):
        make_engine("vllm", *arguments)
    with pytest.raises(ValueError, match="engine = 'tgi' is unknown; allowed are 'auto', 'transformers', 'vllm'"):
        make_engine("tgi", *arguments)


def test_importing_the_package_loads_no_server():
    program = (
        "import sys, prefixmem_fast.serving as serving, prefixmem_fast.serving.worker\nserving.Request\n"
        "print(*sorted({'torch', 'transformers', 'fastapi', 'uvicorn', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
    assert find_spec("fastapi")
