"""What vLLM is given, and the search over it, without vLLM: an engine of transformers stands in."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from prefixmem_fast import Catalogue, SIDTrie, attach
from prefixmem_fast.huggingface.constrained import generate_items as expected_items
from prefixmem_fast.serving import vllm
from prefixmem_fast.serving.item_logits import nodes_of_rows, only_items
from tests.helpers.examples import CODES
from tests.helpers.models import encoder, sid, tiny_model, vocabulary


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prefixmem_fast" / "tries"


@pytest.fixture(scope="module")
def catalogue():
    return Catalogue([f"i{i}" for i in range(len(CODES))], CODES, vocabulary().codebook_sizes)


@pytest.fixture(scope="module")
def model():
    return attach(tiny_model(), encoder(), vocabulary()).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    vocabulary().save_pretrained(folder / "prefixmem")
    return folder


def test_arguments_of_an_engine(folder, catalogue, cache, tmp_path):
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    given = vllm.engine_arguments(folder)
    assert given == {
        "model": str(folder),
        "hf_overrides": {"architectures": [vllm.ARCHITECTURES[kind]]},
        "additional_config": {"prefixmem": {"tables": "device", "quantization": None}},
        "skip_tokenizer_init": True,
    }
    more = {"hf_overrides": {"x": 1}, "additional_config": {"y": 2}, "max_model_len": 9}
    given = vllm.engine_arguments(folder, catalogue, max_beams=7, tables="mapped", **more)
    settings = given["additional_config"].pop("prefixmem")
    assert given["additional_config"] == {"y": 2}
    assert given["hf_overrides"]["x"] == 1
    assert (given["max_model_len"], given["max_logprobs"], given["logprobs_mode"]) == (9, 7, "processed_logits")
    assert (settings["tables"], settings["end"]) == ("mapped", 2)
    (file,) = cache.iterdir()
    assert settings["trie"] == str(file)
    assert SIDTrie.load(file).catalogue.items == catalogue.items
    file.write_bytes(b"damaged")
    index, trie = tmp_path / "items.json", tmp_path / "trie.safetensors"
    index.write_text(json.dumps(dict(zip(catalogue.items, CODES.tolist(), strict=True))))
    SIDTrie(catalogue, vocabulary()).save(trie)
    for one in (index, trie, SIDTrie(catalogue, vocabulary())):
        again = vllm.engine_arguments(folder, one)["additional_config"]["prefixmem"]
        assert again["trie"] == str(file)
        assert SIDTrie.load(file).catalogue.items == catalogue.items
    other = vllm.engine_arguments(folder, SIDTrie(catalogue, vocabulary(), end=9))["additional_config"]["prefixmem"]
    assert other["trie"] != str(file)


def test_a_model_without_an_encoder_is_served_as_it_is(catalogue, tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    vocabulary().save_pretrained(tmp_path)
    given = vllm.engine_arguments(tmp_path, catalogue)
    assert "hf_overrides" not in given
    assert not vllm.serves(tmp_path)


def test_what_is_refused(folder, tmp_path):
    for options, message in (
        ({"tables": "host"}, "tables = 'host'"),
        ({"quantization": "int4"}, "quantization = 'int4'"),
        ({"quantization": "int8", "tables": "mapped"}, "which reads a file as it is; leave one of the two out"),
        ({"enable_prompt_embeds": True}, "prompt embeddings have no tokens for the encoder"),
    ):
        with pytest.raises(ValueError, match=message):
            vllm.engine_arguments(folder, **options)
    shutil.copytree(folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(ValueError, match=r"a model of type 'gpt2'; served are qwen2, qwen3, llama"):
        vllm.engine_arguments(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        vllm.engine_arguments(tmp_path / "none")


class Engine:
    """As `vllm.LLM` answers requests of one token, with the logits processor over its model."""

    def __init__(self, model, trie, most=20, settings=None):
        settings = {"trie": "there"} if settings is None else settings
        config = SimpleNamespace(additional_config={"prefixmem": settings})
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_logprobs=most), vllm_config=config)
        self.model, self.trie, self.calls = model, trie, 0

    @torch.no_grad()
    def generate(self, requests, params, use_tqdm):
        self.calls += 1
        outputs = []
        for request in requests:
            ids = torch.tensor([request["prompt_token_ids"]])
            depth = self.trie.depth
            tail = torch.nn.functional.pad(ids, (depth, 0), value=-1)[:, -(depth - 1) :]
            nodes = nodes_of_rows(self.trie, tail, ids.new_full((1, depth), -1), torch.tensor([0]))
            scores = only_items(self.model(input_ids=ids).logits[:, -1], self.trie, nodes, 2)[0]
            best = scores.topk(params.logprobs)
            found = {int(t): SimpleNamespace(logprob=float(s)) for s, t in zip(*best, strict=True)}
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(logprobs=[found])]))
        return outputs


@pytest.fixture(autouse=True)
def sampling(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **given: SimpleNamespace(**given)))


@pytest.mark.parametrize("wrappers", [{}, {"begin": 8, "end": 9}])
def test_a_search_level_by_level(wrappers, model, catalogue):
    """Prompts that end in text, after a SID and inside one; more beams than the catalogue has SIDs."""
    trie = SIDTrie(catalogue, vocabulary(), **wrappers)
    begin = [8] if wrappers else []
    prompts = [[5], [7, *begin, *sid(1, 3)], [5, *sid(1, 3, 4)], [6, *begin, *sid(3)]]
    engine = Engine(model, trie)
    found = vllm.generate_items(engine, trie, prompts, num_beams=8)
    assert engine.calls == trie.depth
    for i, prompt in enumerate(prompts):
        expected = expected_items(model, trie, {"input_ids": torch.tensor([prompt])}, num_beams=8, eos_token_id=2)
        assert found.items[i] == expected.items[0]
        assert torch.equal(found.sids[i], expected.sids[0])
        torch.testing.assert_close(found.scores[i], expected.scores[0], rtol=1e-5, atol=1e-5)
        real = int((found.scores[i] > -torch.inf).sum())
        rows = found.sequences[8 * i : 8 * i + real]
        assert torch.equal(rows[:, : len(prompt)], torch.tensor([prompt]).expand(real, -1))


def test_what_a_search_refuses(model, catalogue):
    trie = SIDTrie(catalogue, vocabulary())
    for engine, prompts, beams, message in (
        (Engine(model, trie), [[5]], 21, r"num_beams = 21; allowed are 1\.\.20: give engine_arguments more max_beams"),
        (Engine(model, trie), [[5]], 0, "num_beams = 0"),
        (Engine(model, trie, settings={}), [[5]], 4, "the engine has no catalogue; give one to engine_arguments"),
        (Engine(model, trie), [[5], []], 4, "a prompt is empty; give a token or more"),
    ):
        with pytest.raises(ValueError, match=message):
            vllm.generate_items(engine, trie, prompts, num_beams=beams)
    assert vllm.generate_items(Engine(model, trie), trie, [], num_beams=4).items == []
