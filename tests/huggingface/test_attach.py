import copy
import gc
import pickle
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    EncoderDecoderCache,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    StaticCache,
)

from prefixmem_fast import (
    PrefixMem,
    PrefixMemConfig,
    PrefixMemory,
    SIDVocabulary,
    attach,
    detach,
)
from tests.helpers.models import (
    CACHE,
    FAMILIES,
    HIDDEN,
    TOKENS,
    call,
    cross_item_encoder,
    encoder,
    lagged_encoder,
    prompts,
    sid,
    tiny_model,
    vocabulary,
)

SEARCHES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 4, "num_return_sequences": 4},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "static cache": {"cache_implementation": "static"},
}


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def logits_in_parts(model, parts, past):
    """Of one call for each part of the tokens, over one cache."""
    found = []
    for part in parts:
        with torch.no_grad():
            out = model(part, **{CACHE: past}, use_cache=True)
        past = out[CACHE]
        found.append(out.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_w_out_changes_no_bit_and_detach_restores(family):
    model, inputs = tiny_model(family), call(family)
    plain, state = logits(model, **inputs), model.state_dict()
    assert attach(model, encoder(std=0.0), vocabulary()) is model
    assert torch.equal(logits(model, **inputs), plain)
    torch.nn.init.normal_(model.prefixmem.out_proj.weight)
    assert not torch.equal(logits(model, **inputs), plain)
    given = model.prefixmem
    assert detach(model) is given
    assert torch.equal(logits(model, **inputs), plain)
    assert model.state_dict().keys() == state.keys()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "save_pretrained" not in model.__dict__


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_with_a_cache_is_recomputation(family, search):
    attached = attach(tiny_model(family), encoder(), vocabulary())
    assert_a_cache_changes_nothing(attached, call(family), search)


@pytest.mark.parametrize("make", [cross_item_encoder, lagged_encoder])
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("family", ["qwen3", "mistral_sliding", "gpt2", "t5"])
def test_cross_item_orders_with_a_cache_are_recomputation(family, search, make):
    """Prompts of whole items, and of those that break off, so that windows reach far into what the cache holds."""
    model, inputs = attach(tiny_model(family), make(), vocabulary()), call(family)
    rows = [
        [*sid(1, 3, 4), *sid(0, 1, 5), *sid(3, 0, 1)],
        [7, *sid(1, 3, 4), *sid(3, 0, 1), *sid(3, 1)],
        [0, 0, 12, *sid(3, 3, 3), *sid(1, 1, 1)],
        [*sid(0, 1, 5), 11, *sid(1, 0, 0), *sid(1, 0)],
    ]
    inputs["input_ids"] = torch.tensor(rows)
    inputs["attention_mask"] = (inputs["input_ids"] != 0).long()
    assert_a_cache_changes_nothing(model, inputs, search)


def test_cross_item_orders_change_what_a_model_says():
    """So the test above compares something; and they read the item before through the cache, a token at a time."""
    history, other = [*sid(1, 3, 4), *sid(0, 1, 5)], [*sid(3, 0, 1), *sid(0, 1, 5)]
    one = cross_item_encoder()
    first, second = (one.encode_tokens(torch.tensor([ids]), vocabulary())[0] for ids in (history, other))
    assert not torch.equal(first[3], second[3])  # c_1 behind another item
    assert not torch.equal(first[5], second[5])  # the whole item, and another two back
    model, ids = attach(tiny_model(), one, vocabulary()), torch.tensor([history, other])
    whole = logits(model, input_ids=ids)
    for past in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)):
        for cuts in ([1] * 6, [2, 1, 3], [4, 2]):
            found = logits_in_parts(model, ids.split(cuts, 1), copy.deepcopy(past))
            torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_below_the_output_layer(family):
    """Logits are those of the last hidden states with W_head S added, wherever they are asked for; detach ends it."""
    model, inputs = tiny_model(family), call(family)
    one = lagged_encoder(codes=None)
    torch.nn.init.zeros_(one.out_proj.weight)
    torch.nn.init.zeros_(one.cross_item.out_proj.weight)  # so that it reaches the model there alone
    attach(model, one, vocabulary())
    decoded = inputs.get("decoder_input_ids", inputs["input_ids"])
    rows = torch.tensor([[*sid(1, 3, 4), *sid(0, 1, 5)]] * len(decoded))
    inputs = {**inputs, **({"decoder_input_ids": rows} if "decoder_input_ids" in inputs else {"input_ids": rows})}
    inputs.pop("attention_mask", None)
    found = logits(model, **inputs)
    head = one.encode_stream(rows, vocabulary()).head
    assert head[:, 2:].any(-1).all()
    assert not head[:, :2].any()
    given = detach(model)
    assert given is one
    before = logits(model, **inputs)
    scale = HIDDEN**-0.5 if model.config.model_type == "t5" else 1.0
    layer = model.get_output_embeddings().weight
    torch.testing.assert_close(found - before, scale * head @ layer.T, rtol=1e-4, atol=1e-4)


def test_memory_of_a_failed_call_does_not_reach_the_next(monkeypatch):
    model, ids = attach(tiny_model(), lagged_encoder(), vocabulary()), torch.tensor([[*sid(1, 3, 4), *sid(0, 1, 5)]])
    embeds = torch.randn(1, 6, HIDDEN, generator=torch.Generator().manual_seed(0))
    expected = logits(model, inputs_embeds=embeds)

    def fails(*given, **named):
        raise OSError("on its way")

    with monkeypatch.context() as patched:
        patched.setattr(model.model.norm, "forward", fails)
        with pytest.raises(OSError, match="on its way"):
            model(ids)
    assert torch.equal(logits(model, inputs_embeds=embeds), expected)


def test_memory_of_the_last_hidden_states_goes_with_the_embeddings_of_its_tokens():
    """Embeddings that the model's embedding returned, in any order; others get none and the user is told once."""
    model, first = attach(tiny_model(), lagged_encoder(), vocabulary()), torch.tensor([[*sid(1, 3, 4), *sid(0, 1, 5)]])
    second = first.roll(3, 1)
    embed = model.get_input_embeddings()
    with torch.no_grad():
        embeds = [embed(ids) for ids in (first, second)]
        inner = model.model(inputs_embeds=embeds[0]).last_hidden_state
    assert torch.equal(model.lm_head(inner), logits(model, input_ids=first))
    assert torch.equal(logits(model, inputs_embeds=embeds[0]), logits(model, input_ids=first))
    assert torch.equal(logits(model, inputs_embeds=embeds[1]), logits(model, input_ids=second))
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled, inputs_embeds=embeds[1]), logits(model, input_ids=second))

    embed(first)
    with pytest.warns(UserWarning, match="nothing is added to the last hidden states"):
        found = logits(model, inputs_embeds=embeds[0].clone())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompt = torch.cat([torch.zeros(1, 3, HIDDEN), embed(second)], 1)
        assert logits(model, inputs_embeds=prompt).shape == (1, 9, TOKENS)
    detach(model)
    assert torch.equal(found, logits(model, inputs_embeds=embeds[0]))


def test_memory_of_an_encoders_tokens_does_not_reach_the_decoder():
    model = attach(tiny_model("t5"), lagged_encoder(), vocabulary())
    ids = torch.tensor([[*sid(1, 3, 4), *sid(0, 1, 5)]])
    embeds = torch.randn(1, 6, HIDDEN, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = model.get_encoder()(ids)
        found = model(encoder_outputs=seen, decoder_inputs_embeds=embeds).logits
        assert torch.equal(model(input_ids=ids, decoder_inputs_embeds=embeds).logits, found)
        known = model.get_decoder().get_input_embeddings()(ids)
        expected = model(encoder_outputs=seen, decoder_input_ids=ids).logits
        assert torch.equal(model(input_ids=ids, decoder_inputs_embeds=known).logits, expected)
    detach(model)
    assert torch.equal(logits(model, encoder_outputs=seen, decoder_inputs_embeds=embeds), found)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_memory_of_the_last_hidden_states_of_a_model_without_an_output_layer(family):
    whole, ids = tiny_model(family), torch.tensor([[*sid(1, 3, 4), *sid(0, 1, 5)]])
    body, one = copy.deepcopy(whole.base_model), lagged_encoder()
    attach(whole, one, vocabulary())
    attach(body, copy.deepcopy(one), vocabulary())
    with torch.no_grad():
        found = body(ids).last_hidden_state
        assert torch.equal(whole.get_output_embeddings()(found), whole(ids).logits)
        assert not torch.equal(found, body(inputs_embeds=body.get_input_embeddings()(ids).clone()).last_hidden_state)


def assert_a_cache_changes_nothing(model, inputs, search):
    found = []
    for use_cache in (True, False):
        options = dict(SEARCHES[search])
        if not use_cache:
            options.pop("cache_implementation", None)
        torch.manual_seed(3)
        found.append(
            model.generate(
                **inputs,
                **options,
                max_new_tokens=7,
                use_cache=use_cache,
                output_scores=True,
                return_dict_in_generate=True,
            )
        )
    cached, recomputed = found
    assert torch.equal(cached.sequences, recomputed.sequences)
    for one, other in zip(cached.scores, recomputed.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    table = vocabulary().table
    new = cached.sequences[:, -7:]
    assert (table[new.clamp(max=len(table) - 1), 0] > 1).any(), "no deep SID token was generated: nothing was tested"


@pytest.mark.parametrize("family", ["qwen3", "mistral_sliding"])
def test_speculation_and_chunked_prefill_are_greedy_decoding(family):
    model = attach(tiny_model(family), encoder(), vocabulary())
    draft = attach(tiny_model(family), encoder(std=0.5), vocabulary())
    inputs = {name: value[:1] for name, value in prompts().items()}
    expected = model.generate(**inputs, max_new_tokens=10)
    for how in (
        {"assistant_model": draft, "num_assistant_tokens": 3},
        {"prompt_lookup_num_tokens": 2},
        {"prefill_chunk_size": 3},
    ):
        assert torch.equal(model.generate(**inputs, max_new_tokens=10, **how)[:, : expected.shape[1]], expected), how


def test_one_token_at_a_time_in_a_loop_of_ones_own():
    model, input_ids = attach(tiny_model(), encoder(), vocabulary()), prompts()["input_ids"][:3]
    whole = logits(model, input_ids=input_ids)
    for cache in (None, DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)):
        for cuts in ([1] * 8, [2, 1, 5], [6, 2]):
            found = logits_in_parts(model, input_ids.split(cuts, 1), copy.deepcopy(cache))
            torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


def test_a_cache_given_by_position():
    model, input_ids = attach(tiny_model(), encoder(), vocabulary()), prompts()["input_ids"][:3]
    with torch.no_grad():
        whole = model.model(input_ids)[0]
        past = model.model(input_ids[:, :6])[CACHE]
        last = model.model(input_ids[:, 6:], None, None, past)[0]
    torch.testing.assert_close(last, whole[:, 6:])


def test_a_model_that_does_not_call_its_embedding_is_told(monkeypatch):
    model = attach(tiny_model(), encoder(), vocabulary())
    by_hand = lambda self, ids: torch.nn.functional.embedding(ids, self.weight)  # noqa: E731
    monkeypatch.setattr(type(model.get_input_embeddings()), "__call__", by_hand)
    with pytest.raises(RuntimeError, match="Qwen3ForCausalLM embedded its tokens without the encoder"):
        logits(model, **prompts())
    with pytest.raises(RuntimeError, match="without the encoder"):
        logits(model, **{**prompts(), "attention_mask": None})


def test_a_cache_that_is_copied_cropped_repeated_selected_or_reset_keeps_its_tokens():
    model, input_ids = attach(tiny_model(), encoder(), vocabulary()), prompts()["input_ids"][:3]
    whole = logits(model, input_ids=input_ids)

    def last(cache, rows=slice(None)):
        with torch.no_grad():
            return model(input_ids[rows, -1:], **{CACHE: cache}, use_cache=True).logits[:, -1]

    def prefilled(tokens=None):
        tokens = input_ids[:, :-1] if tokens is None else tokens
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(tokens, **{CACHE: cache}, use_cache=True)
        return cache

    cache = prefilled()
    prompt_cache = copy.deepcopy(cache)
    torch.testing.assert_close(last(cache), whole[:, -1])
    torch.testing.assert_close(last(prompt_cache), whole[:, -1])
    longer = prefilled(torch.cat([input_ids[:, :-1], torch.full((3, 2), 5)], 1))
    longer.crop(-2)
    torch.testing.assert_close(last(longer), whole[:, -1])
    cache = prefilled()
    cache.batch_select_indices(torch.tensor([2, 0]))
    torch.testing.assert_close(last(cache, [2, 0]), whole[[2, 0], -1])
    cache = prefilled()
    cache.batch_repeat_interleave(2)
    torch.testing.assert_close(last(cache, [0, 0, 1, 1, 2, 2]), whole[[0, 0, 1, 1, 2, 2], -1])
    cache = prefilled()
    with pytest.raises(ValueError, match="the KV cache has seen 3 sequences and the input has 2"):
        last(cache, [0, 1])
    static = StaticCache(config=model.config, max_cache_len=16)
    for _ in range(2):
        with torch.no_grad():
            model(input_ids[:, :-1], **{CACHE: static}, use_cache=True)
        torch.testing.assert_close(last(static), whole[:, -1])
        static.reset()
    begun = torch.tensor([sid(1), sid(1), sid(1)])
    with torch.no_grad():
        model(begun, **{CACHE: static}, use_cache=True)
        static.reset()
        after = model(torch.tensor([[sid(1, 3)[1]]] * 3), **{CACHE: static}, use_cache=True).logits
    torch.testing.assert_close(after, logits(model, input_ids=torch.tensor([[sid(1, 3)[1]]] * 3)))


def test_tokens_that_came_as_embeddings_are_text_and_said_so():
    model = attach(tiny_model(), encoder(), vocabulary())
    input_ids = prompts()["input_ids"][:3]
    embeds = model.get_input_embeddings()(input_ids)
    assert torch.equal(logits(model, inputs_embeds=embeds), logits(model, input_ids=input_ids))
    with torch.no_grad():
        past = model(inputs_embeds=embeds.clone(), use_cache=True)[CACHE]
        with pytest.warns(UserWarning, match="holds 8 tokens that came as inputs_embeds"):
            out = model(torch.tensor([sid(1, 3)[1:]] * 3), **{CACHE: past}, use_cache=True)
        next_tokens = torch.tensor([sid(0)] * 3)
        model(next_tokens, **{CACHE: out[CACHE]}, use_cache=True)
    assert out[CACHE].seen.tolist() == [[-1] * 8 + sid(1, 3)[1:] + sid(0)] * 3


@pytest.mark.parametrize("how", ["position_ids", "segment_ids"])
def test_packed_sequences_do_not_continue_each_other(how):
    model = attach(tiny_model(), encoder(), vocabulary())
    first, second = [5, *sid(1, 3)], [sid(1, 3, 4)[2], 6, 7]  # the second goes on where the first was cut
    packed = torch.tensor([first + second])
    added = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: added.append(output))
    given = {"position_ids": torch.tensor([[0, 1, 2] * 2]), "segment_ids": torch.tensor([[7] * 3 + [8] * 3])}
    logits(model, input_ids=packed, **{how: given[how]})
    logits(model, input_ids=torch.tensor([first]))
    logits(model, input_ids=torch.tensor([second]))
    torch.testing.assert_close(added[0], torch.cat(added[1:], 1))
    logits(model, input_ids=packed)
    assert (added[0] - added[3]).abs().max() > 0.1, "unpacked, the cut SID goes on: else the case tests nothing"


def test_a_cache_filled_with_packed_sequences_goes_on_with_the_last():
    model = attach(tiny_model(), encoder(), vocabulary())
    with torch.no_grad():
        past = model(
            torch.tensor([[*sid(1, 3), 5, *sid(0)]]), position_ids=torch.tensor([[0, 1, 0, 1]]), use_cache=True
        )[CACHE]
    assert past.seen.tolist() == [[-1, -1, 5, *sid(0)]]


def test_padding_cut_and_malformed_sids():
    model = attach(tiny_model(), encoder(), vocabulary())
    row = [5, *sid(1, 3, 4), 6]
    alone = logits(model, input_ids=torch.tensor([row]))
    for padded, mask in ([[0, 0, *row], [0, 0, 1, 1, 1, 1, 1]], [[*row, 0, 0], [1, 1, 1, 1, 1, 0, 0]]):
        positions = (torch.tensor([mask]).cumsum(1) - 1).clamp(min=0)
        found = logits(
            model, input_ids=torch.tensor([padded]), attention_mask=torch.tensor([mask]), position_ids=positions
        )
        torch.testing.assert_close(found[:, torch.tensor(mask).bool()], alone, rtol=1e-4, atol=1e-5)
    m = model.prefixmem.encode_tokens(
        torch.tensor([[*sid(1, 3, 4)[1:], 5, sid(1)[0], sid(1, 3, 4)[2], *sid(1, 3, 4)]]), vocabulary()
    )
    assert (m[0].abs().sum(-1) > 0).tolist() == [False, False, False, True, False, True, True, True]


@pytest.mark.slow
def test_training_options_agree():
    """Gradient checkpointing, torch.compile and bfloat16 give the gradients of the plain step."""
    input_ids = prompts()["input_ids"]

    def gradient(change, dtype=torch.float32):
        model = attach(tiny_model(), encoder(), vocabulary()).to(dtype).train()
        changed = change(model)
        step = model if changed is None else changed
        step(input_ids=input_ids, labels=input_ids).loss.backward()
        return model.prefixmem.memory.weight.grad.float()

    plain = gradient(lambda model: None)
    assert plain.abs().max() > 0
    assert torch.equal(gradient(lambda model: model.gradient_checkpointing_enable()), plain)
    compiled = gradient(lambda model: torch.compile(model, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)
    rounded = gradient(lambda model: None, torch.bfloat16)
    assert torch.nn.functional.cosine_similarity(rounded.flatten(), plain.flatten(), 0) > 0.95


@pytest.mark.slow
def test_a_compiled_model_decodes_with_its_cache():
    model, input_ids = attach(tiny_model(), encoder(), vocabulary()), prompts()["input_ids"][:3]
    whole = logits(model, input_ids=input_ids)
    compiled = torch.compile(model, backend="aot_eager")
    for past in (None, StaticCache(config=model.config, max_cache_len=16)):
        found = logits_in_parts(compiled, input_ids.split([5, 1, 1, 1], 1), past)
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


def test_resized_exchanged_and_copied():
    model, input_ids = attach(tiny_model(), encoder(), vocabulary()), prompts()["input_ids"]
    before = logits(model, input_ids=input_ids)
    model.resize_token_embeddings(TOKENS + 8, mean_resizing=False)
    assert torch.equal(logits(model, input_ids=input_ids)[..., :TOKENS], before)
    exchanged = torch.nn.Embedding(TOKENS + 8, HIDDEN)
    exchanged.weight.data = model.get_input_embeddings().weight.data
    model.set_input_embeddings(exchanged)
    assert torch.equal(logits(model, input_ids=input_ids)[..., :TOKENS], before)
    copied = copy.deepcopy(model)
    torch.nn.init.zeros_(copied.prefixmem.out_proj.weight)
    assert not torch.equal(logits(copied, input_ids=input_ids)[..., :TOKENS], before)
    assert torch.equal(logits(model, input_ids=input_ids)[..., :TOKENS], before)
    detach(copied)
    assert torch.equal(logits(model, input_ids=input_ids)[..., :TOKENS], before)


def test_a_failed_call_leaves_no_trace():
    model, input_ids = attach(tiny_model(), encoder(), vocabulary()), prompts()["input_ids"][:3]
    before = logits(model, input_ids=input_ids)
    with pytest.raises(Exception, match=r"shape|size|dim|expand|broadcast"):
        logits(model, input_ids=input_ids, attention_mask=torch.ones(7, 3, 2, 2, 2))
    assert model.prefixmem_attachment._calls == []
    assert torch.equal(logits(model, input_ids=input_ids), before)


def test_gpt2_token_types_are_no_tokens():
    model = attach(tiny_model("gpt2"), encoder(), vocabulary())
    input_ids = prompts()["input_ids"][:3]
    types = torch.full_like(input_ids, sid(1)[0])
    embeddings = model.get_input_embeddings()
    expected = logits(model, inputs_embeds=embeddings(input_ids) + embeddings.weight[types])
    torch.testing.assert_close(logits(model, input_ids=input_ids, token_type_ids=types), expected)
    embeds = embeddings(input_ids)
    torch.testing.assert_close(logits(model, inputs_embeds=embeds, token_type_ids=types), expected)
    with torch.no_grad():
        past = model(input_ids, token_type_ids=types, use_cache=True)[CACHE]
    assert torch.equal(past.seen, input_ids)


def test_threads_do_not_mix_their_tokens():
    model = attach(tiny_model(), encoder(), vocabulary())
    inputs = [{"input_ids": row[None]} for row in prompts()["input_ids"][:3]]
    expected = [model.generate(**one, max_new_tokens=8, num_beams=2) for one in inputs]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(4):
            found = pool.map(lambda one: model.generate(**one, max_new_tokens=8, num_beams=2), inputs)
            assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_a_model_is_freed_when_it_is_dropped():
    model = attach(tiny_model(), encoder(), vocabulary())
    model.generate(**prompts(), max_new_tokens=2)
    watched = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert watched() is None
    finally:
        gc.enable()


def test_exchanged_embeddings_are_followed_on_every_path():
    for family in ("t5", "qwen3"):
        model, inputs = attach(tiny_model(family), encoder(), vocabulary()), call(family)
        expected = model.generate(**inputs, max_new_tokens=4, output_scores=True, return_dict_in_generate=True)
        other = torch.nn.Embedding(TOKENS, HIDDEN)
        other.weight = model.get_input_embeddings().weight
        model.set_input_embeddings(other)
        found = model.generate(**inputs, max_new_tokens=4, output_scores=True, return_dict_in_generate=True)
        assert all(torch.equal(one, two) for one, two in zip(found.scores, expected.scores, strict=True))


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
def test_embeddings_between_tokens_end_a_sid(cache):
    model = attach(tiny_model(), encoder(), vocabulary())
    begun, ended = torch.tensor([[5, *sid(1)]]), torch.tensor([[sid(1, 3)[1]]])
    text = torch.tensor([[6, 7]])
    past = cache(config=model.config, **({"max_cache_len": 16} if cache is StaticCache else {}))
    with torch.no_grad():
        model(begun, **{CACHE: past}, use_cache=True)
        model(inputs_embeds=model.get_input_embeddings()(text), **{CACHE: past}, use_cache=True)
        last = model(ended, **{CACHE: past}, use_cache=True).logits
    whole = logits(model, input_ids=torch.cat([begun, text, ended], 1))
    torch.testing.assert_close(last, whole[:, -1:], rtol=1e-4, atol=1e-4)


def test_an_encoder_called_with_the_decoders_cache():
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=TOKENS,
        d_model=HIDDEN,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        pad_token_id=0,
    )
    model = attach(BartForConditionalGeneration(config).eval(), encoder(), vocabulary())
    input_ids, decoder = prompts()["input_ids"], torch.tensor([[0, *sid(1, 3)]] * 4)
    whole = logits(model, input_ids=input_ids, decoder_input_ids=decoder)
    past = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    parts = [
        logits(model, input_ids=input_ids, decoder_input_ids=part, **{CACHE: past}, use_cache=True)
        for part in decoder.split(1, 1)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_a_cached_loop_with_gradients():
    model, input_ids = attach(tiny_model(), encoder(), vocabulary()).train(), prompts()["input_ids"][:3]
    past = model(input_ids[:, :6], use_cache=True)[CACHE]
    last = model(input_ids[:, 6:], **{CACHE: past}, use_cache=True).logits
    torch.testing.assert_close(last, model(input_ids).logits[:, 6:], rtol=1e-4, atol=1e-4)


def test_positions_that_jump_ahead_are_one_sequence():
    model = attach(tiny_model(), encoder(), vocabulary())
    added = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: added.append(output))
    for positions in ([0, 1, 2, 9], [0, 2, 4, 6]):
        logits(model, input_ids=torch.tensor([[5, *sid(1, 3, 4)]]), position_ids=torch.tensor([positions]))
    logits(model, input_ids=torch.tensor([[5, *sid(1, 3, 4)]]))
    assert torch.equal(added[0], added[2])
    assert torch.equal(added[1], added[2])


def test_a_cached_sequence_that_starts_again_is_another():
    model = attach(tiny_model(), encoder(), vocabulary())
    with torch.no_grad():
        past = model(torch.tensor([[5, *sid(1)]]), use_cache=True)[CACHE]
        model(torch.tensor([[sid(1, 3)[1], 6]]), **{CACHE: past}, position_ids=torch.tensor([[0, 1]]))
        expected = model.prefixmem.encode_tokens(torch.tensor([[sid(1, 3)[1]]]), vocabulary())
    assert not expected.any()
    added = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: added.append(output))
    token = torch.tensor([[sid(1, 3)[1]]])
    with torch.no_grad():
        past = model(torch.tensor([[5, *sid(1)]]), use_cache=True)[CACHE]
        model(token, **{CACHE: past}, position_ids=torch.tensor([[0]]))
    assert torch.equal(added[-1], model.get_input_embeddings().weight[token])


def test_caches_are_pickled():
    model, input_ids = attach(tiny_model(), encoder(), vocabulary()), prompts()["input_ids"][:3]
    with torch.no_grad():
        past = pickle.loads(pickle.dumps(model(input_ids[:, :6], use_cache=True)[CACHE]))
        last = model(input_ids[:, 6:], **{CACHE: past}, use_cache=True).logits
    torch.testing.assert_close(last, logits(model, input_ids=input_ids)[:, 6:], rtol=1e-4, atol=1e-4)


def test_a_whole_model_is_pickled(tmp_path):
    model = attach(tiny_model(), encoder(), vocabulary())
    expected = logits(model, **prompts())
    torch.save(model, tmp_path / "model.pt")
    found = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(found, **prompts()), expected)
    detach(found)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in found.modules())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m, e, v: (torch.nn.Linear(2, 2), e, v), TypeError, "model is a Linear; give a model of transformers"),
        (lambda m, e, v: (m, PrefixMemory(e.config), v), TypeError, "encoder is a PrefixMemory; give a PrefixMem"),
        (lambda m, e, v: (m, e, {}), TypeError, "vocabulary is a dict; give a SIDVocabulary"),
        (lambda m, e, v: (attach(m, e, v), e, v), ValueError, "attached to this Qwen3ForCausalLM already"),
        (lambda m, e, v: (attach(m.model, e, v) and m, e, v), ValueError, "attached to this Qwen3ForCausalLM already"),
        (lambda m, e, v: (torch.compile(m), e, v), TypeError, "model is compiled; attach the encoder first"),
        (
            lambda m, e, v: (m, e.to("meta"), v),
            ValueError,
            "the encoder is on meta and the model's embeddings are on cpu",
        ),
        (lambda m, e, v: (tiny_model("gpt2").resize_token_embeddings(30) and m, e, v), None, ""),
        (
            lambda m, e, v: (m, e, SIDVocabulary.from_table({}, (4, 5))),
            ValueError,
            r"codebook_sizes \(4, 5\) differ from the encoder's \(4, 5, 6\)",
        ),
        (
            lambda m, e, v: (m, e, SIDVocabulary.from_table({900: (1, 1)}, (4, 5, 6))),
            ValueError,
            "token id 900 and the model's embeddings have 64 rows",
        ),
        (
            lambda m, e, v: (m, e, SIDVocabulary.from_table({0: (1, 3)}, (4, 5, 6))),
            ValueError,
            "pad_token_id = 0 is the token of level 1, code 3; pad with another",
        ),
    ],
)
def test_errors_change_nothing(make, error, message):
    model, one, known = make(tiny_model(), encoder(), vocabulary())
    if error is None:
        attach(model, one, known)
        return
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    with pytest.raises(error, match=message):
        attach(model, one, known)
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks


def test_widths_differ():
    config = PrefixMemConfig(encoder().config.spec, memory_dim=8, hidden_size=16)
    with pytest.raises(ValueError, match=r"hidden_size = 16 .* 32 columns; give PrefixMemConfig\(hidden_size=32\)"):
        attach(tiny_model(), PrefixMem(config), vocabulary())


def test_detach_without_attach():
    with pytest.raises(ValueError, match="no encoder is attached to this Qwen3ForCausalLM"):
        detach(tiny_model())


def test_a_model_without_any_cache():
    torch.manual_seed(0)
    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=TOKENS, n_embd=HIDDEN, n_layer=1, n_head=2)).eval()
    plain = logits(model, input_ids=prompts()["input_ids"])
    attach(model, encoder(), vocabulary())
    assert not torch.equal(logits(model, input_ids=prompts()["input_ids"]), plain)


def test_segment_ids_of_another_shape_or_an_encoder_decoder():
    model = attach(tiny_model(), encoder(), vocabulary())
    with pytest.raises(ValueError, match=r"segment_ids has shape \(4, 3\); give \(4, 8\)"):
        logits(model, **prompts(), segment_ids=torch.zeros(4, 3, dtype=torch.int64))
    t5 = attach(tiny_model("t5"), encoder(), vocabulary())
    with pytest.raises(NotImplementedError, match="segment_ids: packed rows are for decoder-only models"):
        logits(t5, **call("t5"), segment_ids=torch.zeros(4, 8, dtype=torch.int64))


def test_no_warning_in_plain_use():
    model = attach(tiny_model(), encoder(), vocabulary())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.generate(**prompts(), max_new_tokens=2, num_beams=2)
