import sys

import numpy as np
import pytest
import torch

from prefixmem_fast.recommender.data import Tokens
from prefixmem_fast.recommender.evaluation.description import bleu, describe
from prefixmem_fast.recommender.evaluation.prompts import is_encoder_decoder
from tests.helpers.examples import CODES, PAD, made_model, tokens
from tests.helpers.models import TOKENS
from tests.helpers.tokenizers import tokenizer

ITEMS = np.array([4, 0, 7, 2, 0])


def words():
    return tokenizer([f"w{i}" for i in range(3, TOKENS)])  # <pad> 0, <eos> 1, <unk> 2, w3, ...


def known(end=1):
    base = tokens()
    return Tokens(base.sids, 5, end, PAD, [[8]] * len(CODES), {"what": [6, 7], "?": [9]})


def plain_ids(model, made, item, count):
    """Greedy ids, one forward over all of it a token, up to the end token."""
    question, answer = torch.tensor([made.describe(item)]), []
    while len(answer) < count and made.end not in answer:
        with torch.no_grad():
            if is_encoder_decoder(model):
                logits = model(input_ids=question, decoder_input_ids=torch.tensor([[PAD, *answer]])).logits
            else:
                logits = model(input_ids=torch.tensor([[5, *question[0].tolist(), *answer]])).logits
        answer.append(int(logits[0, -1].argmax()))
    return answer


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "t5"])
@pytest.mark.parametrize("kind", ["bare", "prefixmem"])
def test_texts_are_greedy(family, kind):
    model = made_model(family, kind)
    ends, lengths = [plain_ids(model, known(), item, 6)[2] for item in (4, 0)], set()
    for end in (1, *ends):
        made = known(end)
        ids = [[token for token in plain_ids(model, made, item, 6) if token != end] for item in ITEMS]
        expected = [" ".join(words().convert_ids_to_tokens(row, skip_special_tokens=True)) for row in ids]
        found = describe(model, words(), made, ITEMS, max_new_tokens=6)
        if end != 1:  # text that goes on to the end token, and the token with it
            found = [text.removesuffix(words().convert_ids_to_tokens(end)).rstrip() for text in found]
        assert found == expected
        assert len(set(expected)) > 1
        lengths |= set(map(len, ids))
    assert min(lengths) < max(lengths) == 6, "some end before others"


def test_batches_do_not_matter():
    model = made_model("qwen3", "prefixmem")
    whole = describe(model, words(), known(), ITEMS, max_new_tokens=5)
    assert describe(model, words(), known(), ITEMS, max_new_tokens=5, batch=2) == whole
    assert len(whole) == len(ITEMS)
    assert whole[1] == whole[4]
    assert describe(model, words(), known(), ITEMS[:0]) == []


def test_settings_that_the_model_brings_do_not_apply():
    model = made_model("qwen3", "prefixmem")
    plain = describe(model, words(), known(), ITEMS, max_new_tokens=5)
    config = model.generation_config
    config.do_sample, config.repetition_penalty, config.num_beams, config.min_new_tokens = True, 5.0, 3, 7
    assert describe(model, words(), known(), ITEMS, max_new_tokens=5) == plain
    assert model.generation_config is config


@pytest.mark.parametrize("training", [True, False])
def test_described_in_eval_mode_and_given_back_as_it_was(training):
    model = made_model("gpt2")
    plain = describe(model, words(), known(), ITEMS, max_new_tokens=5)
    model.train(training)
    assert describe(model, words(), known(), ITEMS, max_new_tokens=5) == plain
    assert model.training == training


def test_bleu():
    pytest.importorskip("sacrebleu")
    texts = ["a small red lamp for the desk", "a wooden chair with four legs"]
    assert bleu(texts, texts) == pytest.approx(100)
    assert bleu(["x y z u v w", "p q r s t u"], texts) < 5
    assert bleu(texts, texts[::-1]) < bleu([texts[0], texts[0]], texts) < 100
    assert type(bleu(texts, texts)) is float


def test_bleu_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ValueError, match=r"BLEU needs sacrebleu: pip install 'prefixmem_fast\[train\]'"):
        bleu(["a"], ["a"])
