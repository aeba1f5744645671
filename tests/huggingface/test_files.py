"""A model saved with its encoder on it comes back the same, alone, in shards, and with PEFT."""

import copy
import json
import pickle
import shutil
import warnings
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from prefixmem_fast import CheckpointError, PrefixMem, SIDVocabulary, attach, detach
from prefixmem_fast.encoder.saving import save_encoder
from tests.helpers.models import FAMILIES, call, encoder, prompts, tiny_model, vocabulary


def attach_saved(model, folder):
    return attach(model, PrefixMem.from_pretrained(folder), SIDVocabulary.from_pretrained(folder))


def search(model, inputs):
    return model.generate(
        **inputs,
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=6,
        output_scores=True,
        return_dict_in_generate=True,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_loaded_and_generating_the_same(family, tmp_path):
    model = attach(tiny_model(family), encoder(), vocabulary())
    expected = search(model, call(family))
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path).eval()
    assert not torch.equal(search(plain, call(family)).sequences_scores, expected.sequences_scores)
    found = search(attach_saved(plain, tmp_path), call(family))
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.sequences_scores, expected.sequences_scores)
    assert sorted(path.name for path in (tmp_path / "prefixmem").iterdir()) == ["config.json"]


def test_shards(tmp_path):
    model = attach(tiny_model(), encoder(), vocabulary())
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    found = attach_saved(type(model).from_pretrained(tmp_path).eval(), tmp_path)
    assert torch.equal(found(**prompts()).logits, model(**prompts()).logits)


@pytest.mark.parametrize("shards", ["gone", "kept"])
def test_one_file_beside_the_index_of_shards_before(tmp_path, shards):
    """transformers removes the shards and leaves their index, which it does not read any more."""
    model = attach(tiny_model(), encoder(), vocabulary())
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    old = {path: path.read_bytes() for path in tmp_path.glob("model-*")}
    torch.nn.init.normal_(model.prefixmem.memory.weight)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    if shards == "kept":  # as other releases, or a copy into the folder
        for path, content in old.items():
            path.write_bytes(content)
        save_encoder(model.prefixmem, tmp_path / "prefixmem", vocabulary(), weights=False)
    assert [path.name for path in (tmp_path / "prefixmem").iterdir()] == ["config.json"]
    found = attach_saved(type(model).from_pretrained(tmp_path).eval(), tmp_path)
    assert torch.equal(found.prefixmem.memory.weight, model.prefixmem.memory.weight)
    assert torch.equal(found(**prompts()).logits, model(**prompts()).logits)


def test_a_new_file_beside_old_shards_is_not_passed_over(tmp_path):
    """The encoder of the shards was loaded beside the model of the file, without a word."""
    model = attach(tiny_model(), encoder(), vocabulary())
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    save_another(tmp_path)
    with pytest.raises(CheckpointError, match=r"not the one that config.json was saved with"):
        PrefixMem.from_pretrained(tmp_path)


def test_shards_beside_the_one_file_of_a_save_before(tmp_path):
    """transformers leaves that file, and reads it: the encoder is that of the last save all the same."""
    model = attach(tiny_model(), encoder(), vocabulary())
    model.save_pretrained(tmp_path)
    torch.nn.init.normal_(model.prefixmem.memory.weight)
    with pytest.warns(UserWarning, match=r"model.safetensors is of an earlier save, .*: remove it"):
        model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert torch.equal(PrefixMem.from_pretrained(tmp_path).memory.weight, model.prefixmem.memory.weight)
    (tmp_path / "model.safetensors").unlink()
    found = attach_saved(type(model).from_pretrained(tmp_path).eval(), tmp_path)
    assert torch.equal(found(**prompts()).logits, model(**prompts()).logits)


@pytest.mark.parametrize("size", ["10KB", "2GB"])
def test_a_save_that_leaves_the_models_files(tmp_path, monkeypatch, size):
    """As one of adapters alone: the files of a save before hold the encoder of then."""
    model = attach(tiny_model(), encoder(), vocabulary())
    model.save_pretrained(tmp_path, max_shard_size=size)
    monkeypatch.setattr(type(model), "save_pretrained", lambda *args, **options: None)
    torch.nn.init.normal_(model.prefixmem.memory.weight)
    model.save_pretrained(tmp_path)
    assert torch.equal(PrefixMem.from_pretrained(tmp_path).memory.weight, model.prefixmem.memory.weight)


def test_a_missing_shard(tmp_path):
    model = attach(tiny_model(), encoder(), vocabulary())
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    names = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    (tmp_path / names["prefixmem.memory.weight"]).unlink()
    with pytest.raises(CheckpointError, match=r"index.json names model-.* which is not there; save it again"):
        PrefixMem.from_pretrained(tmp_path)
    save_encoder(model.prefixmem, tmp_path / "prefixmem", vocabulary(), weights=False)  # with its own weights, then
    assert torch.equal(PrefixMem.from_pretrained(tmp_path).memory.weight, model.prefixmem.memory.weight)


def test_without_the_encoder_nothing_is_written(tmp_path):
    model = attach(tiny_model(), encoder(), vocabulary())
    detach(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "prefixmem").exists()
    with pytest.raises(CheckpointError, match=r"\(its format is None\), and .*prefixmem is not there; was"):
        PrefixMem.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "options", [{"variant": "x"}, {"safe_serialization": False}, {"max_shard_size": "5KB"}, {"state_dict": True}]
)
def test_what_was_saved_in_another_way_is_loaded(options, tmp_path):
    model = attach(tiny_model(), encoder(), vocabulary())
    if "state_dict" in options:  # as a trainer that gathers or rounds weights gives it
        options = {
            "state_dict": {name: t.bfloat16() if t.is_floating_point() else t for name, t in model.state_dict().items()}
        }
    model.save_pretrained(tmp_path, **options)
    found = PrefixMem.from_pretrained(tmp_path)
    dtype = torch.bfloat16 if "state_dict" in options else torch.float32
    assert torch.equal(found.memory.weight, model.prefixmem.memory.weight.to(dtype))


def test_uploads_that_would_leave_the_encoder_out(tmp_path):
    model = attach(tiny_model(), encoder(), vocabulary())
    with pytest.raises(ValueError, match=r"call model.push_to_hub\(\) instead"):
        model.save_pretrained(tmp_path / "new", push_to_hub=True)
    assert not (tmp_path / "new").exists()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match=r"config.json belongs to something else, a model perhaps; give a folder"):
        model.prefixmem.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == before


def test_a_method_of_a_model_that_is_gone(tmp_path):
    model = attach(tiny_model(), encoder(), vocabulary())
    save = model.save_pretrained
    del model
    with pytest.raises(RuntimeError, match="the model of this save_pretrained is gone"):
        save(tmp_path)


def test_other_processes_write_nothing(tmp_path):
    model = attach(tiny_model(), encoder(), vocabulary())
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "prefixmem").exists()


def save_another(folder):
    """The model's file of another encoder, under the old config.json."""
    model = attach(tiny_model(), encoder(std=2.0), vocabulary())
    model.save_pretrained(folder / "x")
    shutil.copy(folder / "x" / "model.safetensors", folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: (d / "model.safetensors").unlink(),
            "holds no model.safetensors, and the encoder",
        ),
        (lambda d: (d / "model.safetensors").write_bytes(b"x" * 50), "model's files in .* are damaged or cut"),
        (
            lambda d: (
                (d / "model.safetensors").unlink(),
                (d / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b"}})),
            ),
            r"hold no prefixmem.memory.weight; was the model saved with the encoder on it\?",
        ),
        (
            save_another,
            "not the one that config.json was saved with",
        ),
    ],
)
def test_model_files_that_do_not_match(tmp_path, damage, message):
    model = attach(tiny_model(), encoder(), vocabulary())
    model.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        PrefixMem.from_pretrained(tmp_path)


def lora(model, **options):
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, **options))


def test_peft_with_the_encoder_beside_the_adapters(tmp_path):
    model = attach(lora(tiny_model()), encoder(), vocabulary()).eval()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora" not in name} == {
        "base_model.model.prefixmem.memory.weight",
        "base_model.model.prefixmem.out_proj.weight",
    }
    expected = search(model, prompts())
    model.save_pretrained(tmp_path / "adapters")
    found = attach_saved(PeftModel.from_pretrained(tiny_model(), tmp_path / "adapters"), tmp_path / "adapters").eval()
    assert torch.equal(search(found, prompts()).sequences_scores, expected.sequences_scores)

    torch.nn.init.zeros_(found.base_model.model.prefixmem.memory.weight)
    found.load_adapter(tmp_path / "adapters", "default")
    assert torch.equal(search(found, prompts()).sequences_scores, expected.sequences_scores)

    merged = found.merge_and_unload()
    torch.testing.assert_close(search(merged, prompts()).sequences_scores, expected.sequences_scores)
    merged.save_pretrained(tmp_path / "merged")
    whole = attach_saved(type(merged).from_pretrained(tmp_path / "merged").eval(), tmp_path / "merged")
    torch.testing.assert_close(search(whole, prompts()).sequences_scores, search(merged, prompts()).sequences_scores)
    detach(merged)
    assert "save_pretrained" not in merged.__dict__


def test_adapters_on_the_projection(tmp_path):
    """The encoder's folder has the projection that they are added to; where nobody saves them they are not left out."""
    adapted = LoraConfig(r=4, target_modules=["out_proj"], init_lora_weights=False)
    model = get_peft_model(attach(tiny_model(), encoder(), vocabulary()), adapted).eval()
    expected = model(**prompts()).logits
    model.get_base_model().save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "adapters")
    again = attach(tiny_model(), PrefixMem.from_pretrained(tmp_path), vocabulary())
    assert torch.equal(again.prefixmem.out_proj.weight, model.prefixmem.out_proj.base_layer.weight)
    assert not torch.equal(again.eval()(**prompts()).logits, expected)
    assert torch.equal(PeftModel.from_pretrained(again, tmp_path / "adapters").eval()(**prompts()).logits, expected)
    for left_out in (
        partial(model.prefixmem.save_pretrained, tmp_path / "own"),
        partial(model.prefixmem.quantize, "int8"),
    ):
        with pytest.raises(ValueError, match=r"out_proj has adapters of PEFT on it, .*merge_and_unload\(\)"):
            left_out()
    assert not (tmp_path / "own").exists()
    model.merge_and_unload().prefixmem.quantize("int8")


def test_peft_around_an_attached_model(tmp_path):
    model = lora(attach(tiny_model(), encoder(), vocabulary()))
    with pytest.warns(UserWarning, match="get_peft_model has frozen the encoder: attach it to the PeftModel"):
        model.train()(**prompts())
    with warnings.catch_warnings():  # a quantized encoder is frozen anyway
        warnings.simplefilter("error", UserWarning)
        lora(attach(tiny_model(), encoder().quantize("int8"), vocabulary())).train()(**prompts())
    kept = lora(attach(tiny_model(), encoder(), vocabulary()), modules_to_save=["prefixmem"])
    inputs = prompts()
    kept.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    copies = [p for name, p in kept.named_parameters() if "prefixmem.modules_to_save" in name]
    assert len(copies) == 2
    assert all(p.grad is not None and p.grad.any() for p in copies)
    torch.nn.init.normal_(copies[0])
    kept.eval().save_pretrained(tmp_path)
    base = attach(tiny_model(), encoder(), vocabulary())
    found = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(found(**prompts()).logits, kept(**prompts()).logits)
    kept.get_base_model().save_pretrained(tmp_path / "base")  # the trained copy
    assert torch.equal(PrefixMem.from_pretrained(tmp_path / "base").memory.weight, copies[0])
    assert isinstance(detach(kept), PrefixMem)


def test_a_second_adapter_says_whose_encoder_is_in_use(tmp_path, recwarn):
    """One encoder for all adapters: loading another's replaced it without a word."""
    for name, std in (("first", 1.0), ("second", 2.0)):
        model = attach(lora(tiny_model()), encoder(std), vocabulary())
        model.save_pretrained(tmp_path / name)
    model = attach(lora(tiny_model()), PrefixMem.from_pretrained(tmp_path / "first"), vocabulary())
    recwarn.clear()
    model.load_adapter(tmp_path / "first", "same")
    model.load_adapter(tmp_path / "first", adapter_name="default")
    assert not [w for w in recwarn if "encoder" in str(w.message)], "it is the encoder that was there"
    with pytest.warns(UserWarning, match=r"from now on it is that of .*second, also with default, same, which had"):
        model.load_adapter(tmp_path / "second", "second")
    second = PrefixMem.from_pretrained(tmp_path / "second")
    assert torch.equal(model.get_base_model().prefixmem.out_proj.weight, second.out_proj.weight)
    recwarn.clear()
    alone = attach(lora(tiny_model()), encoder(), vocabulary())
    alone.load_adapter(tmp_path / "second", "default")
    assert not [w for w in recwarn if "encoder" in str(w.message)], "there is no other adapter"


@pytest.mark.parametrize("copied", [False, True])
def test_modules_to_save_saves_what_attaches_the_encoder_again(tmp_path, copied):
    model = lora(attach(tiny_model(), encoder(), vocabulary()), modules_to_save=["prefixmem"])
    if copied:
        original, model = model, copy.deepcopy(model)
        torch.nn.init.zeros_(original.base_model.model.prefixmem.modules_to_save["default"].memory.weight)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["prefixmem"]))
    copies = model.base_model.model.prefixmem.modules_to_save
    torch.nn.init.normal_(copies["default"].memory.weight)
    torch.nn.init.normal_(copies["other"].memory.weight)
    model.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("other", tmp_path / "other")):
        assert torch.equal(PrefixMem.from_pretrained(folder).memory.weight, copies[name].memory.weight)
        assert SIDVocabulary.from_pretrained(folder) == vocabulary()
    found = attach(tiny_model(), PrefixMem.from_pretrained(tmp_path), SIDVocabulary.from_pretrained(tmp_path))
    found = PeftModel.from_pretrained(found, tmp_path).eval()
    assert torch.equal(found(**prompts()).logits, model.eval()(**prompts()).logits)
    text = (tmp_path / "adapter_config.json").read_text()
    assert "save_pretrained" not in text
    pickle.loads(pickle.dumps(model))
    config = copy.deepcopy(model.peft_config["other"])  # it names the same adapter
    config.save_pretrained(tmp_path / "config")
    saved = PrefixMem.from_pretrained(tmp_path / "config")
    assert torch.equal(saved.memory.weight, copies["other"].memory.weight)
    base = model.get_base_model()
    detach(model)
    assert not base._state_dict_pre_hooks
    model.save_pretrained(tmp_path / "without")
    assert not (tmp_path / "without/prefixmem").exists()


def test_peft_saves_without_the_encoder_once_it_is_detached(tmp_path):
    model = attach(lora(tiny_model()), encoder(), vocabulary())
    detach(model.get_base_model())
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "prefixmem").exists()


PEFT_ON_EMBEDDINGS = {
    "qwen3": [
        {"target_modules": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": {"embed_tokens": [21, 30]}},
    ],
    "t5": [
        {"target_modules": ["shared"]},
        {"modules_to_save": ["shared"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": {"shared": [21, 30]}},
    ],
}


@pytest.mark.parametrize(("family", "options"), [(f, o) for f, all in PEFT_ON_EMBEDDINGS.items() for o in all])
@pytest.mark.parametrize("first", ["attach", "peft"])
def test_peft_on_the_embedding(family, options, first):
    """PEFT wraps and copies embeddings, or computes them without calling them; m is added once all the same."""
    options = {"target_modules": ["q_proj" if family == "qwen3" else "q"], **options}
    plain = attach(tiny_model(family), encoder(), vocabulary())(**call(family)).logits
    model = attach(tiny_model(family), encoder(), vocabulary()) if first == "attach" else tiny_model(family)
    wrapped = get_peft_model(model, LoraConfig(r=4, **options)).eval()  # LoRA starts as nothing
    if first == "peft":
        attach(wrapped, encoder(), vocabulary())
    torch.testing.assert_close(wrapped(**call(family)).logits, plain)
    with wrapped.disable_adapter():
        torch.testing.assert_close(wrapped(**call(family)).logits, plain)
    tied = wrapped.config.tie_word_embeddings
    merged = wrapped.merge_and_unload()
    merged.config.tie_word_embeddings = tied  # PEFT unties a merged T5, whose logits then have another scale
    torch.testing.assert_close(merged(**call(family)).logits, plain)
    detach(merged)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in merged.modules())
