import pytest
import torch
from tokenizers import Tokenizer, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from prefixmem_fast import SIDVocabulary
from tests.helpers.models import TOKENS, tiny_model
from tests.helpers.tokenizers import tokenizer


@pytest.mark.parametrize("family", ["qwen3", "qwen2_tied", "t5", "gpt2"])
def test_tokenizer_and_model_grow(family):
    one, model = tokenizer([f"w{i}" for i in range(TOKENS - 3)]), tiny_model(family)
    old = {id(w): w.detach().clone() for w in _weights(model)}
    before = [old[id(w)] for w in _weights(model)]
    vocabulary = SIDVocabulary.extend(one, model, (40, 30), noise=0.1)
    assert len(one) == TOKENS + 70
    assert vocabulary.token_id(1, 0) == TOKENS
    assert vocabulary.token_id(2, 29) == TOKENS + 69
    assert one("w1 <a_3><b_29> w2")["input_ids"] == [4, TOKENS + 3, TOKENS + 69, 5]
    assert vocabulary.text([3, 29]) == "<a_3><b_29>"
    for weight, rows in zip(_weights(model), before, strict=True):
        assert weight.shape[0] == TOKENS + 70
        assert torch.equal(weight[:TOKENS], rows)
        new = weight[TOKENS:] - rows.mean(0)
        scale = 0.1 * rows.pow(2).mean().sqrt()
        assert abs(new.std() / scale - 1) < 0.1
        assert new.mean().abs() < 0.1 * scale
    decoder = {"decoder_input_ids": torch.tensor([[0]])} if family == "t5" else {}
    assert model(input_ids=torch.tensor([[TOKENS + 69]]), **decoder).logits.shape[-1] == TOKENS + 70


def _weights(model):
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    return list({id(layer.weight): layer.weight for layer in layers}.values())


def test_rows_that_the_model_has_already_are_used():
    """Qwen's embeddings have more rows than its tokenizer has tokens."""
    one, model = tokenizer([f"w{i}" for i in range(20)]), tiny_model()
    rows = model.get_input_embeddings().weight.detach().clone()
    vocabulary = SIDVocabulary.extend(one, model, (4, 5))
    weight = model.get_input_embeddings().weight
    assert weight.shape[0] == TOKENS
    changed = (weight != rows).any(1).nonzero().squeeze(1).tolist()
    assert changed == list(range(23, 32)) == [vocabulary.token_id(l, c) for l, k in ((1, 4), (2, 5)) for c in range(k)]


def test_only_codes_that_occur():
    one = tokenizer()
    codes = torch.tensor([[7, 1], [2, 1], [7, 3]])
    vocabulary = SIDVocabulary.extend(one, None, (10, 10), codes=codes, token_format="<C{level0}_{code}>")
    assert one.convert_ids_to_tokens(range(5, len(one))) == ["<C0_2>", "<C0_7>", "<C1_1>", "<C1_3>"]
    assert vocabulary == SIDVocabulary.from_tokenizer(one, (10, 10))
    assert vocabulary.encode(codes).tolist() == [[6, 7], [5, 7], [6, 8]]
    assert torch.equal(vocabulary.decode(vocabulary.encode(codes)), codes)
    assert vocabulary.decode(torch.tensor([[7, 7], [99, -1]])).tolist() == [[-1, 1], [-1, -1]]
    assert vocabulary.text(torch.tensor([7, 3])) == "<C0_7><C1_3>"
    for codes, message in (([7, 5], r"codes\[1\] = 5: no token of level 2"), ([7], "the last is the 2 levels")):
        with pytest.raises(ValueError, match=message):
            vocabulary.text(codes)
    with pytest.raises(ValueError, match=r"codes\[0, 1\] = 5: no token of level 2 stands for it"):
        vocabulary.encode(torch.tensor([[7, 5]]))
    with pytest.raises(ValueError, match=r"codes\[0\] = -1: no token of level 1"):
        vocabulary.encode(torch.tensor([-1, 1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook_sizes": (4, 0)}, r"codebook_sizes\[1\] = 0 is not positive"),
        ({"token_format": "<{code}>"}, "token_format"),
        ({"noise": -1.0}, "noise = -1.0 is not a finite number"),
        ({"model": 3}, "model is a int"),
        ({"codes": torch.tensor([[4, 0]])}, r"codes has 4\.\.4 at level 1; allowed are 0\.\.3"),
        ({"codes": torch.tensor([4, 0])}, r"codes is \(2,\); give integers \[items, 2\]"),
        ({"token_format": "w{level}{code}"}, "the tokenizer has the token 'w10' already"),
    ],
)
def test_errors_change_nothing(change, message):
    one = tokenizer(["w10"])
    arguments = {"model": None, "codebook_sizes": (4, 5), **change}
    with pytest.raises((TypeError, ValueError), match=message):
        SIDVocabulary.extend(one, **arguments)
    assert len(one) == 4


def test_a_tokenizer_that_marks_words_reads_sids_inside_text():
    """As Llama 2's does: its normalizer writes a mark before the text and for each space."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581": 3, **{c: 4 + i for i, c in enumerate("abcdefgh<>_0123456789")}}
    made = Tokenizer(BPE(words, [], unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    one = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    vocabulary = SIDVocabulary.extend(one, None, (4, 5))
    ids = vocabulary.encode(torch.tensor([[3, 4], [0, 1]]))
    read = one("ab " + vocabulary.text([3, 4]) + vocabulary.text([0, 1]) + " c", add_special_tokens=False)["input_ids"]
    assert [token for token in read if vocabulary.is_code(token)] == ids.flatten().tolist()


@pytest.mark.parametrize(
    ("sizes", "token_format", "message"),
    [
        ((12,) * 11, "x{level}{code}", "its id .* is that of another"),
        ((1,) * 27, "<{letter}_{code}>", r"no letter for level 27; use \{level\}"),
    ],
)
def test_tokens_that_would_not_be_told_apart(sizes, token_format, message):
    one = tokenizer()
    with pytest.raises(ValueError, match=message):
        SIDVocabulary.extend(one, None, sizes, token_format=token_format)
    assert len(one) == 5


def test_padded_embeddings_do_not_shrink():
    one, model = tokenizer([f"w{i}" for i in range(20)]), tiny_model()
    SIDVocabulary.extend(one, model, (4, 5), pad_to_multiple_of=16)
    assert model.get_input_embeddings().weight.shape[0] == TOKENS
