"""The model of a run: what is refused before it trains, and that the checks leave no trace."""

import json
import time

import pytest
import torch

from prefixmem_fast import Catalogue, PrefixMem, SIDVocabulary
from prefixmem_fast.recommender.training import model_checks
from prefixmem_fast.recommender.training.arms import build_encoder
from prefixmem_fast.recommender.training.backbone import build_backbone, make_tokenizer
from prefixmem_fast.recommender.training.run import load_data, train
from tests.helpers.models import FAMILIES, tiny_model
from tests.helpers.runs import TINY, TINY_T5, options

BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def build(config):
    data = load_data(config)
    return build_backbone(config, data.catalogue, data.text)


class TestCausality:
    @pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
    def test_a_bidirectional_model_is_refused(self, kind, tmp_path):
        config = options(tmp_path, model={"model_type": kind, **BERT}, model_options=None)
        message = rf"model = .*: {kind} sees the tokens after a position \(it is bidirectional\) .*is_decoder"
        with pytest.raises(ValueError, match=message):
            build(config)
        with pytest.raises(ValueError, match="bidirectional"):
            train(config, tmp_path / "out", quiet=True)
        decoder = options(tmp_path, model={"model_type": kind, **BERT}, model_options={"is_decoder": True})
        assert build(decoder)[0].config.is_decoder

    @pytest.mark.parametrize("family", [family for family in FAMILIES if family != "t5"])
    def test_every_family_passes_and_nothing_changes(self, family, tmp_path):
        model = tiny_model(family)
        model.train()
        next(model.children()).eval()
        modes, state = [module.training for module in model.modules()], torch.get_rng_state()
        model_checks.check_causal(options(tmp_path), model, None)
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), state)
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_a_model_that_draws_changes_no_random_state(self, tmp_path):
        model = tiny_model("qwen3")
        forward = model.forward
        model.forward = lambda **given: torch.rand(3) is not None and forward(**given)
        state = torch.get_rng_state()
        model_checks.check_causal(options(tmp_path), model, None)
        assert torch.equal(torch.get_rng_state(), state)

    def test_presets_pass(self, tmp_path):
        for changes in ({}, {"model": "tiger", "model_options": TINY_T5}, {"precision": "bfloat16"}):
            build(options(tmp_path, **changes))

    def test_few_positions(self, tmp_path):
        build(options(tmp_path, model_options={**TINY, "n_positions": 4}))


@pytest.mark.parametrize("entries", [{"n_embd": -1}, {"n_head": 0}, {"n_head": 3}])
def test_sizes_that_no_model_has(tmp_path, entries):
    with pytest.raises(ValueError, match=r"model = 'decoder': transformers refuses its configuration"):
        build(options(tmp_path, model_options={**TINY, **entries}))


def test_a_model_without_keys_is_refused_before_it_is_made(tmp_path, monkeypatch):
    pytest.importorskip("transformers", minversion="5", reason="in transformers 4 the model says so, not its config")
    from transformers import AutoModelForCausalLM

    def make(*given, **options):
        raise AssertionError("weights were made")

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", make)
    mamba = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    with pytest.raises(NotImplementedError, match=r"mamba keeps its past in something else .* or arm = 'plain'"):
        build(options(tmp_path, model=mamba, model_options=None))
    with pytest.raises(AssertionError, match="weights were made"):
        build(options(tmp_path, model=mamba, model_options=None, arm="plain"))


class TestReachable:
    @pytest.fixture
    def offline(self, monkeypatch, tmp_path):
        """A Hub that answers nobody, and an empty cache."""
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    @pytest.mark.parametrize("changes", [{"model": "gpt2"}, {"tokenizer": "someone/words"}])
    def test_offline_is_said_at_once(self, changes, offline, tmp_path):
        (option, name), began = next(iter(changes.items())), time.monotonic()
        with pytest.raises(
            FileNotFoundError, match=rf"{option} {name} is no folder here .* cannot be reached"
        ) as error:
            build(options(tmp_path, **{"model_options": None, **changes}))
        assert time.monotonic() - began < 10
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("name", ["runs/mine/model", "./model", "/nowhere/model", "~/model", "my model", "model/"])
    def test_a_path_is_not_asked_for(self, name, offline):
        with pytest.raises(FileNotFoundError, match=rf"model {name} is not there; give a folder of transformers, or"):
            model_checks.check_reachable("model", name)

    def test_what_is_there_passes(self, offline, tmp_path, monkeypatch):
        import huggingface_hub

        model_checks.check_reachable("model", str(tmp_path))
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(tmp_path / file))
        model_checks.check_reachable("model", "gpt2")


class TestTokensOfAnotherCatalogue:
    @pytest.fixture
    def saved(self, tmp_path):
        """A tokenizer that has the tokens of some catalogue: saved(sizes)."""

        def save(sizes):
            tokenizer = make_tokenizer(None)
            SIDVocabulary.extend(tokenizer, None, sizes)
            tokenizer.save_pretrained(tmp_path / "tokenizer")
            return str(tmp_path / "tokenizer")

        return save

    def test_one_that_lacks_tokens(self, saved, tmp_path):
        with pytest.raises(ValueError, match=r"has 6 of the 18 tokens of the index, such as <a_0>, not <a_2>.*--token"):
            build(options(tmp_path, tokenizer=saved((2, 2, 2))))

    def test_one_with_larger_codebooks(self, saved, tmp_path):
        config = options(tmp_path, tokenizer=saved((9, 9, 9)))
        with pytest.raises(ValueError, match=r"has more tokens than the index: .*give --codebook-sizes"):
            build(config)
        assert build(config.replace(codebook_sizes=[9, 9, 9]))[2].codebook_sizes == (9, 9, 9)

    def test_the_way_out_that_is_named(self, saved, tmp_path):
        import numpy as np

        config = options(tmp_path, tokenizer=saved((2, 2, 2)), token_format="[{level}:{code}]")
        codes = Catalogue.load(config.items, token_format="<{letter}_{code}>").codes
        np.save(tmp_path / "items.npy", codes.numpy())
        names = list(json.loads((tmp_path / "items.index.json").read_text()))
        histories = json.loads((tmp_path / "interactions.json").read_text())
        rows = {user: [names.index(item) for item in items] for user, items in histories.items()}
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        config = config.replace(
            items=str(tmp_path / "items.npy"), interactions=[str(tmp_path / "rows.json")], text=None
        )
        assert len(build(config)[2]) == 18


def test_a_quantized_encoder_is_not_trained(tmp_path):
    encoder = build_encoder(options(tmp_path), (6, 6), 16)
    encoder.quantize("int8").save_pretrained(tmp_path / "small")
    message = f"encoder {tmp_path / 'small'} is int8, for serving, and cannot be trained; give the one that it was made"
    with pytest.raises(ValueError, match=message):
        build_encoder(options(tmp_path, encoder=str(tmp_path / "small"), grad="dense"), (6, 6), 16)


@pytest.mark.parametrize("output", [False, True])
def test_tables_of_cross_item_orders(output, tmp_path):
    """For each number of codes tables of their own, which are read for every item back."""
    config = options(tmp_path, history=3, history_codes=[1, 2], history_rows=70, history_dim=8, history_output=output)
    whole = build_encoder(config, (6, 6), 16).config.cross_item
    assert (whole.lags, whole.earlier_codes, whole.output_slot, whole.memory_dim) == (3, None, output, 8)
    first = whole.cross_item
    assert (first.lags, first.earlier_codes, first.output_slot, first.memory_dim) == (3, 1, output, 8)
    assert first.cross_item is None
    assert first.spec.multipliers != whole.spec.multipliers
    assert build_encoder(config.replace(history=0, history_codes=None), (6, 6), 16).config.cross_item is None


def test_columns_of_cross_item_tables_that_heads_do_not_share_evenly(tmp_path):
    with pytest.raises(ValueError, match="history_dim = 7 is no multiple of history_heads = 2; give one"):
        build_encoder(options(tmp_path, history=1, history_dim=7), (6, 6), 16)


ACROSS = {"history": 2, "history_rows": 70, "history_dim": 8}


class TestAPretrainedEncoder:
    """With options of cross-item orders: new tables where it has none, its own where they are those asked for."""

    def saved(self, tmp_path, **changes):
        torch.manual_seed(3)
        encoder = build_encoder(options(tmp_path, **changes), (6, 6), 16)
        encoder.save_pretrained(tmp_path / "saved")
        return encoder, options(tmp_path, encoder=str(tmp_path / "saved"), **changes)

    def test_new_tables_beside_those_of_the_paper(self, tmp_path):
        one, config = self.saved(tmp_path)
        config = config.replace(**ACROSS, grad="fused", max_grad_norm=0.0, memory_dropout=0.25)
        found = build_encoder(config, (6, 6), 24)
        assert torch.equal(found.memory.weight, one.memory.weight)
        assert found.config == build_encoder(config.replace(encoder=None), (6, 6), 24).config
        across = found.cross_item
        assert (across.memory.grad, across.dropout, across.head_proj.out_features) == ("fused", 0.25, 24)
        assert not across.memory.weight.any()
        found.save_pretrained(tmp_path / "again")
        assert PrefixMem.from_pretrained(tmp_path / "again").config == found.config

    @pytest.mark.parametrize("arm", ["prefixmem", "cross-item"])
    def test_its_own_tables(self, arm, tmp_path):
        one, config = self.saved(tmp_path, arm=arm, **ACROSS)
        found = build_encoder(config, (6, 6), 16)
        tables = [name for name in one.state_dict() if name.endswith("memory.weight")]
        assert len(tables) == (2 if arm == "prefixmem" else 1)
        for name in tables:
            assert torch.equal(found.state_dict()[name], one.state_dict()[name])
        for changes in ({"history": 1}, {"history_rows": 90}, {"history_codes": [1]}, {"history_output": False}):
            with pytest.raises(ValueError, match=r"encoder .*saved has other tables of cross-item orders than"):
                build_encoder(config.replace(**changes), (6, 6), 16)
        if arm == "prefixmem":
            assert build_encoder(config.replace(history=0), (6, 6), 16).config == found.config

    def test_of_another_arm(self, tmp_path):
        _, config = self.saved(tmp_path)
        with pytest.raises(ValueError, match="has the paper's orders, and arm = 'cross-item'; give the arm that it"):
            build_encoder(config.replace(arm="cross-item"), (6, 6), 16)
        _, config = self.saved(tmp_path, arm="cross-item", **ACROSS)
        with pytest.raises(ValueError, match="has cross-item orders alone, and arm = 'prefixmem'; give the arm"):
            build_encoder(config.replace(arm="prefixmem"), (6, 6), 16)


class TestOneLevel:
    @pytest.fixture
    def one_level(self, tmp_path):
        (tmp_path / "one").mkdir()
        index = {f"item {i}": [f"<a_{i % 6}>"] for i in range(60)}
        (tmp_path / "one" / "index.json").write_text(json.dumps(index))
        return options(tmp_path, items=str(tmp_path / "one" / "index.json"))

    @pytest.mark.parametrize("arm", ["prefixmem", "sid-transformer"])
    def test_an_encoder_has_nothing_to_read(self, arm, one_level, tmp_path):
        message = r"the index has 1 level, and no prefix .* arm = 'plain', or active_levels = \[1\]"
        with pytest.raises(ValueError, match=message):
            train(one_level.replace(arm=arm), tmp_path / "out", quiet=True)

    def test_what_is_named_works(self, one_level):
        assert build_encoder(one_level.replace(arm="plain"), (6,), 16) is None
        encoder = build_encoder(one_level.replace(active_levels=[1]), (6,), 16)
        assert encoder.config.spec.active_levels == (1,)
