import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LogitsProcessorList, PrefixConstrainedLogitsProcessor

from prefixmem_fast import Catalogue, SIDLogitsProcessor, SIDTrie, attach, generate_items
from tests.helpers.models import FAMILIES, TOKENS, call, encoder, prompts, sid, tiny_model, vocabulary

EOS = 2
CODES = torch.tensor([[1, 3, 4], [0, 1, 5], [3, 3, 3], [1, 3, 0], [1, 0, 1], [3, 0, 0], [3, 4, 5], [0, 1, 5]])
ITEMS = [f"item {i}" for i in range(len(CODES))]


def trie(codes=CODES, **wrappers):
    return SIDTrie(Catalogue([f"item {i}" for i in range(len(codes))], codes, (4, 5, 6)), vocabulary(), **wrappers)


def log_probabilities(model, inputs, new):
    """Of each token of `new` ``[B, n]`` after the inputs, by a forward over the whole sequence."""
    given = dict(inputs)
    if "decoder_input_ids" in given:
        given["decoder_input_ids"] = torch.cat([given["decoder_input_ids"], new], 1)
    else:
        given["input_ids"] = torch.cat([given["input_ids"], new], 1)
        given["attention_mask"] = torch.cat([given["attention_mask"], torch.ones_like(new)], 1)
    with torch.no_grad():
        scores = model(**given).logits[:, -new.shape[1] - 1 : -1].log_softmax(-1)
    return scores.gather(2, new[..., None]).squeeze(2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_search_finds_the_best_items_and_their_scores(family):
    """With as many beams as SIDs nothing is cut, so the result is the ranking of all items that fit the prompt."""
    model, made = attach(tiny_model(family), encoder(), vocabulary()), trie()
    inputs = {name: value[:3] for name, value in call(family).items()}
    given = inputs.get("decoder_input_ids", inputs["input_ids"]).clone()
    found = generate_items(model, made, inputs, num_beams=8)
    begun = [trail(row) for row in given.tolist()]
    for b, prefix in enumerate(begun):
        fitting = [codes for codes in CODES.unique(dim=0).tolist() if codes[: len(prefix)] == prefix]
        new = torch.tensor([sid(*codes)[len(prefix) :] for codes in fitting])
        one = {name: value[b : b + 1].expand(len(new), -1) for name, value in inputs.items()}
        expected = log_probabilities(model, one, new).sum(1)
        order = expected.argsort(descending=True)
        assert found.sids[b, : len(fitting)].tolist() == [fitting[i] for i in order]
        torch.testing.assert_close(found.scores[b, : len(fitting)], expected[order], rtol=1e-4, atol=1e-4)
        items = [tuple(f"item {i}" for i, c in enumerate(CODES.tolist()) if c == fitting[j]) for j in order]
        assert found.items[b] == items + [()] * (8 - len(fitting))
        assert (found.scores[b, len(fitting) :] == -torch.inf).all()
        assert (found.sids[b, len(fitting) :] == -1).all()


def trail(row):
    """Codes of the SID inside which a row of tokens ends."""
    table = vocabulary().table.tolist()
    for length in (2, 1):
        entries = [table[token] if token < len(table) else [0, 0] for token in row[-length:]]
        if [level for level, _ in entries] == list(range(1, length + 1)):
            return [code for _, code in entries]
    return []


OF_A_CHAT_MODEL = {
    "do_sample": True,
    "temperature": 0.3,
    "top_k": 2,
    "top_p": 0.5,
    "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 5,
    "max_length": 3,
    "length_penalty": 2.0,
    "suppress_tokens": [sid(1)[0]],
    "bad_words_ids": [[sid(3)[0]]],
    "forced_eos_token_id": 7,
    "exponential_decay_length_penalty": (0, 3.0),
    "early_stopping": True,
}


@pytest.mark.parametrize("family", ["qwen3", "t5"])
def test_settings_that_the_model_brings_do_not_apply(family):
    model, inputs = attach(tiny_model(family), encoder(), vocabulary()), call(family)
    plain = generate_items(model, trie(), inputs, num_beams=6)
    config = model.generation_config
    for name, value in OF_A_CHAT_MODEL.items():
        setattr(config, name, value)
    before, during = config.to_dict(), []

    def look(input_ids, scores):
        during.append(model.generation_config is config and config.to_dict() == before)
        return scores

    again = generate_items(model, trie(), inputs, num_beams=6, logits_processor=[look])
    assert during
    assert all(during), "the model's generation config is exchanged while it generates"
    assert model.generation_config is config
    assert config.to_dict() == before
    assert torch.equal(plain.scores, again.scores)
    assert plain.items == again.items
    own = generate_items(model, trie(), inputs, num_beams=6, suppress_tokens=[sid(1, 3, 4)[2]])  # the caller's applies
    assert ("item 0",) in plain.items[0]
    assert ("item 0",) not in own.items[0]


def test_threads_do_not_wait_for_each_other():
    model, meeting = attach(tiny_model(), encoder(), vocabulary()), threading.Barrier(2, timeout=30)

    def meet(input_ids, scores):
        meeting.wait()  # broken where one generation has to end before the other
        return scores

    expected = generate_items(model, trie(), prompts(), num_beams=4)
    with ThreadPoolExecutor(2) as pool:
        search = lambda _: generate_items(model, trie(), prompts(), num_beams=4, logits_processor=[meet])  # noqa: E731
        for found in pool.map(search, range(2)):
            assert torch.equal(found.scores, expected.scores)


def test_arguments_of_the_search():
    model, inputs = attach(tiny_model(), encoder(), vocabulary()), prompts()
    with pytest.raises(ValueError, match="num_beams = 4, num_return_sequences = 9"):
        generate_items(model, trie(), inputs, num_beams=4, num_return_sequences=9)
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="has no eos_token_id; give eos_token_id"):
        generate_items(model, trie(), inputs)
    found = generate_items(model, trie(), inputs, num_beams=3, num_return_sequences=2, eos_token_id=[EOS])
    assert [len(row) for row in found.items] == [2] * 4


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ("text", {}, "inputs holds no input_ids"),
        ({"input_ids": torch.ones(0, 4, dtype=torch.int64)}, {}, r"inputs has input_ids of shape \(0, 4\); give one"),
        ({"input_ids": torch.ones(2, 0, dtype=torch.int64)}, {}, r"inputs has input_ids of shape \(2, 0\); give one"),
        (
            {
                "input_ids": torch.ones(2, 2, dtype=torch.int64),
                "decoder_input_ids": torch.ones(2, 0, dtype=torch.int64),
            },
            {},
            r"inputs has decoder_input_ids of shape \(2, 0\)",
        ),
        ({"input_ids": [[1, 2]]}, {}, "inputs holds no input_ids"),
        (torch.ones(1, 2, dtype=torch.int64), {}, "inputs holds no input_ids"),
        (
            {"input_ids": torch.ones(2, 2, dtype=torch.int64), "attention_mask": torch.tensor([[1, 1], [1, 0]])},
            {},
            "inputs is padded on the right",
        ),
        (prompts(), {"max_new_tokens": 2}, "max_new_tokens is set by the search over the trie"),
        (prompts(), {"length_penalty": 2.0}, "length_penalty is set by the search"),
        (prompts(), {"eos_token_id": sid(1)[0]}, "is the token of a code; end with another"),
        (prompts(), {"eos_token_id": 5000}, "reach token id 5000, the scores 63"),
    ],
)
def test_bad_arguments(inputs, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        generate_items(tiny_model(), trie(), inputs, **options)


def test_a_processor_of_ones_own_comes_first():
    def never_code_1(input_ids, scores):
        return scores.index_fill(1, torch.tensor([sid(1)[0]]), -torch.inf)

    found = generate_items(tiny_model(), trie(), {"input_ids": torch.tensor([[5, 6]])}, logits_processor=[never_code_1])
    assert {codes[0] for codes in found.sids[0].tolist()} == {0, 3, -1}


def test_peft_models_keep_no_config_of_their_own():
    model = get_peft_model(attach(tiny_model(), encoder(), vocabulary()), LoraConfig(target_modules=["q_proj"])).eval()
    plain = generate_items(model.get_base_model(), trie(), prompts(), num_beams=4)
    found = generate_items(model, trie(), prompts(), num_beams=4)
    assert torch.equal(found.scores, plain.scores)
    assert "generation_config" not in model.__dict__
    assert model.generation_config is model.get_base_model().generation_config


def test_wrapped_sids():
    model, inputs = tiny_model(), prompts()
    found = generate_items(model, trie(begin=10, end=12), inputs, num_beams=4)
    for row in found.sequences[:4].tolist():
        begin, *tokens, end = row[8:]
        assert (begin, end) == (10, 12)
        assert vocabulary().decode(torch.tensor(tokens)).tolist() in CODES.tolist()
    assert all(items for row in found.items for items in row)


def python_function(made, prompt_length):
    rows = made.vocabulary.encode(made.catalogue.codes).tolist()

    def allowed(batch, sentence):
        done = sentence.tolist()[prompt_length:]
        found = {row[len(done)] for row in rows if row[: len(done)] == done and len(done) < len(row)}
        return sorted(found) or [EOS]

    return allowed


@given(st.integers(0, 3), st.integers(1, 5), st.integers(0, 2**31))
def test_allowed_sets_and_scores_are_those_of_a_python_function(generated, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    made = trie()
    tokens = made.vocabulary.encode(CODES)[torch.randint(len(CODES), (rows,), generator=generator), :generated]
    input_ids = torch.cat([torch.full((rows, 4), 5), tokens], 1)
    scores = torch.randn(rows, TOKENS, generator=generator)
    expected = PrefixConstrainedLogitsProcessor(python_function(made, 4), 1)(input_ids, scores)
    found = SIDLogitsProcessor(made, 4, EOS)(input_ids, scores)
    if generated == 3:
        expected[:, EOS] = 0.0  # a whole SID keeps its score
    assert torch.equal(found, expected)


FIRST = torch.tensor([[3, 5], [3, sid(1)[0]]])
SECOND = torch.tensor([[3, 5, sid(1)[0]], [3, *sid(1, 3)]])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_a_result_is_not_written_again(mode):
    processor, scores = SIDLogitsProcessor(trie(), 2, EOS), torch.randn(2, TOKENS)
    with mode():
        first = processor(FIRST, scores)
        copied = first.clone()
        second = processor(SECOND, scores)
    assert torch.equal(first, copied)
    assert torch.equal(second, SIDLogitsProcessor(trie(), 2, EOS)(SECOND, scores))


def test_with_reuse_scores_the_next_call_overwrites_a_result():
    processor, scores = SIDLogitsProcessor(trie(), 2, EOS, reuse_scores=True), torch.randn(2, TOKENS)
    expected = [SIDLogitsProcessor(trie(), 2, EOS)(ids, scores) for ids in (FIRST, SECOND)]
    held = processor(FIRST, scores)
    assert torch.equal(held, expected[0])
    again = processor(SECOND, scores)
    assert again.data_ptr() == held.data_ptr()
    assert torch.equal(again, expected[1])
    again[:, 7] = 0.0  # as a processor after it might
    assert torch.equal(processor(FIRST, scores), expected[0])
    assert torch.equal(processor(SECOND[:1], scores[:1]), expected[1][:1])
    assert torch.equal(processor(SECOND, scores.double()), expected[1].double())
    with torch.inference_mode():  # its tensors have no version to tell whether they were written
        first = processor(FIRST, scores)
        processor(SECOND, scores)
        assert torch.equal(first, expected[0])
    leaf = scores.clone().requires_grad_()
    first = processor(FIRST, leaf)
    processor(SECOND, scores)
    assert torch.equal(first, expected[0])


@pytest.mark.parametrize("options", [{}, {"do_sample": True}])
def test_beam_search_copies_the_scores_that_it_keeps(options):
    """Else `generate_items` could not let them be overwritten."""
    model, inputs = attach(tiny_model(), encoder(), vocabulary()), prompts()
    searches = []
    for reuse in (False, True):
        torch.manual_seed(3)
        searches.append(
            model.generate(
                **inputs,
                **options,
                num_beams=4,
                max_new_tokens=3,
                logits_processor=[SIDLogitsProcessor(trie(), inputs["input_ids"].shape[1], EOS, reuse_scores=reuse)],
                output_scores=True,
                return_dict_in_generate=True,
            )
        )
    assert torch.equal(searches[0].sequences, searches[1].sequences)
    assert all(torch.equal(one, other) for one, other in zip(searches[0].scores, searches[1].scores, strict=True))


def test_sampling_never_leaves_the_catalogue():
    model, inputs = attach(tiny_model(), encoder(), vocabulary()), prompts()
    made = trie()
    processor = LogitsProcessorList([SIDLogitsProcessor(made, inputs["input_ids"].shape[1], EOS)])
    out = model.generate(**inputs, do_sample=True, num_return_sequences=8, max_new_tokens=5, logits_processor=processor)
    assert made.is_leaf(made.walk(out, inputs["input_ids"].shape[1])).all()
    assert len(set(map(tuple, out[:, 8:].tolist()))) > 4


@pytest.mark.parametrize("beams", [3, 12])
def test_a_catalogue_with_fewer_sids_than_beams(beams):
    """transformers fills the beams with copies; they come back empty, not as items."""
    found = generate_items(tiny_model(), trie(CODES[:2]), prompts(), num_beams=beams)
    for row, scores in zip(found.items[:1], found.scores[:1], strict=True):
        assert sorted(row[:2]) == [("item 0",), ("item 1",)]
        assert row[2:] == [()] * (beams - 2)
        assert scores[:2].isfinite().all()
        assert (scores[2:] == -torch.inf).all()
