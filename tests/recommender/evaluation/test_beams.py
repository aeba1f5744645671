import pytest
import torch

from prefixmem_fast import Catalogue, SIDTrie, SIDVocabulary, attach
from prefixmem_fast.encoder import SIDTransformer, SIDTransformerConfig
from prefixmem_fast.recommender.evaluation import beams as module
from prefixmem_fast.recommender.evaluation.beams import _by_generate, beam_search
from prefixmem_fast.recommender.evaluation.prompts import is_encoder_decoder
from tests.helpers.examples import ENCODERS, PAD, catalogue, made_model
from tests.helpers.models import FAMILIES, HIDDEN, TOKENS, sid, tiny_model, vocabulary

TREE = ["qwen3", "qwen2_tied", "llama", "gpt2", "gpt_neox"]
GENERATE = [family for family in FAMILIES if family not in TREE]
HISTORIES = torch.tensor(
    [
        [1, *sid(1, 3, 4), *sid(0, 1, 5), *sid(3, 3, 3)],
        [1, *sid(3, 0, 0), *sid(3, 3, 3), *sid(1, 3, 0)],
        [1, *sid(0, 1, 5), 7, 8, 9, *sid(3, 4, 5)],
    ]
)


def trie():
    return SIDTrie(catalogue(), vocabulary())


def log_probabilities(model, history, prefixes):
    """Of every next token, float64 ``[P, V]``, after a history and each prefix, by a forward over all of it."""
    rows = history.expand(len(prefixes), -1)
    with torch.no_grad():
        if is_encoder_decoder(model):
            begun = torch.cat([torch.full((len(prefixes), 1), PAD), prefixes], 1)
            logits = model(input_ids=rows, decoder_input_ids=begun, use_cache=False).logits
        else:
            logits = model(input_ids=torch.cat([rows, prefixes], 1), use_cache=False).logits
    return logits[:, -1].double().log_softmax(-1)


def plain_search(model, history, levels, num_beams, allowed=None):
    """Beam search of one history as a loop: [(score, tokens)], best first. `allowed`: the SIDs, as tokens."""
    beams = [(0.0, ())]
    for level in range(levels):
        prefixes = torch.tensor([tokens for _, tokens in beams], dtype=torch.int64).view(len(beams), level)
        after = log_probabilities(model, history, prefixes).tolist()
        grown = [
            (score + logp, (*tokens, token))
            for (score, tokens), row in zip(beams, after, strict=True)
            for token, logp in enumerate(row)
        ]
        if allowed is not None:
            begun = {one[: level + 1] for one in allowed}
            grown = [beam for beam in grown if beam[1] in begun]
        beams = sorted(grown, reverse=True)[:num_beams]
    return beams


def check(found, row, expected):
    """That a row of beams is what a plain search found, and nothing after it."""
    count = len(expected)
    assert [tuple(one) for one in found.tokens[row, :count].tolist()] == [tokens for _, tokens in expected]
    scores = torch.tensor([score for score, _ in expected])
    torch.testing.assert_close(found.scores[row, :count], scores, rtol=1e-4, atol=1e-4)
    assert (found.scores[row, count:] == -torch.inf).all()


SIDS = {tuple(row) for row in vocabulary().encode(catalogue().codes).tolist()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["bare", "prefixmem", "cross-item", "lagged"])
def test_the_search_is_a_plain_beam_search(family, kind):
    model = made_model(family, kind)
    for num_beams in (3, 10):  # 10 are more than the seven SIDs
        free = beam_search(model, HISTORIES, 3, num_beams)
        kept = beam_search(model, HISTORIES, 3, num_beams, trie())
        assert free.tokens.shape == kept.tokens.shape == (3, num_beams, 3)
        assert free.scores.dtype == torch.float32
        for row, history in enumerate(HISTORIES):
            check(free, row, plain_search(model, history, 3, num_beams))
            check(kept, row, plain_search(model, history, 3, num_beams, SIDS))
    assert (kept.scores[:, 7:] == -torch.inf).all()
    assert {tuple(one) for one in kept.tokens[0, :7].tolist()} == SIDS, "all of them are found"


@pytest.mark.parametrize("family", TREE)
@pytest.mark.parametrize("kind", list(ENCODERS))
def test_the_tree_is_what_generate_finds(family, kind, monkeypatch):
    model = made_model(family, kind)
    expected = [_by_generate(model, HISTORIES, 3, 6, made) for made in (None, trie())]
    monkeypatch.setattr(module, "_by_generate", None)  # the tree does without it
    for made, other in zip((None, trie()), expected, strict=True):
        found = beam_search(model, HISTORIES, 3, 6, made)
        assert torch.equal(found.tokens, other.tokens)
        torch.testing.assert_close(found.scores, other.scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "mistral_sliding", "t5"])
def test_the_beams_of_each_level(family):
    model = made_model(family, "prefixmem")
    for made, allowed in ((None, None), (trie(), SIDS)):
        kept = []
        found = beam_search(model, HISTORIES, 3, 6, made, kept)
        assert [beams.tokens.shape[2] for beams in kept] == [1, 2, 3]
        assert kept[-1] is found
        for level, beams in enumerate(kept, 1):
            for row, history in enumerate(HISTORIES):
                check(beams, row, plain_search(model, history, level, 6, allowed))


@pytest.mark.parametrize("family", GENERATE)
def test_sliding_windows_and_encoder_decoders_take_generate(family, monkeypatch):
    monkeypatch.setattr(module, "_by_generate", lambda *given: given)
    made, model = trie(), tiny_model(family)
    assert beam_search(model, HISTORIES, 3, 4, made) == (model, HISTORIES, 3, 4, made)


def test_a_window_that_is_switched_off_is_none(monkeypatch):
    model = tiny_model("qwen2_tied")
    monkeypatch.setattr(module, "_by_generate", lambda *given: "generate")
    model.config.sliding_window, model.config.use_sliding_window = 4, False
    assert beam_search(model, HISTORIES, 1, 2).tokens.shape == (3, 2, 1)
    model.config.use_sliding_window = True
    assert beam_search(model, HISTORIES, 1, 2) == "generate"


@pytest.mark.parametrize("family", FAMILIES)
def test_one_beam_is_greedy(family):
    model = made_model(family, "prefixmem")
    for made, allowed in ((None, None), (trie(), SIDS)):
        found = beam_search(model, HISTORIES, 3, 1, made)
        assert found.tokens.shape == (3, 1, 3)
        for row, history in enumerate(HISTORIES):
            check(found, row, plain_search(model, history, 3, 1, allowed))


@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "t5"])
def test_a_model_that_names_no_end_is_searched_too(family):
    model = tiny_model(family)
    model.generation_config.eos_token_id = None
    check(beam_search(model, HISTORIES, 3, 7, trie()), 0, plain_search(model, HISTORIES[0], 3, 7, SIDS))


@pytest.mark.parametrize("family", ["qwen3", "t5"])
def test_settings_that_the_model_brings_do_not_apply(family):
    model = tiny_model(family)
    plain = beam_search(model, HISTORIES, 3, 5)
    config = model.generation_config
    config.repetition_penalty, config.do_sample, config.length_penalty, config.no_repeat_ngram_size = 3.0, True, 2.0, 1
    config.eos_token_id = plain.tokens[0, 0, 0].item()  # a SID goes on behind it
    again = beam_search(model, HISTORIES, 3, 5)
    assert torch.equal(plain.tokens, again.tokens)
    torch.testing.assert_close(plain.scores, again.scores)
    assert model.generation_config is config


def every_pair(model, history):
    """log-probabilities float64 ``[V, V]`` of all SIDs of two tokens."""
    first = log_probabilities(model, history, torch.zeros(1, 0, dtype=torch.int64))[0]
    return first[:, None] + log_probabilities(model, history, torch.arange(TOKENS)[:, None])


def two_levels():
    """A vocabulary and an encoder of two levels, and the catalogue of all that it can say."""
    entries = [(1, code) for code in range(4)] + [(2, code) for code in range(5)]
    known = SIDVocabulary.from_table(dict(zip((50, 22, 31, 60, 45, 20, 38, 29, 57), entries, strict=True)), (4, 5))
    codes = torch.cartesian_prod(torch.arange(4), torch.arange(5))
    made = SIDTransformer(SIDTransformerConfig((4, 5), HIDDEN, 8, 1, 2, output_init_std=3.0))
    return known, made, SIDTrie(Catalogue(map(str, range(20)), codes, (4, 5)), known)


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "t5"])
@pytest.mark.parametrize("attached", [False, True])
def test_all_sids_of_two_tokens(family, attached):
    """As many beams as there are SIDs: nothing is cut, and constrained means without the text."""
    model = tiny_model(family)
    known, added, full = two_levels()
    if attached:
        attach(model, added, known)
    histories = torch.tensor([[1, 50, 45, 22, 57], [1, 7, 60, 20, 8]])
    count = TOKENS if family == "t5" else TOKENS**2  # generate keeps a copy of the history for each
    free = beam_search(model, histories, 2, count)
    kept = beam_search(model, histories, 2, 30, full)
    for row, history in enumerate(histories):
        scores, order = every_pair(model, history).flatten().sort(descending=True)
        # V beams keep every first token, so these are the best of all pairs.
        torch.testing.assert_close(free.scores[row].double(), scores[:count], rtol=1e-4, atol=1e-4)
        place = free.tokens[row, :, 0] * TOKENS + free.tokens[row, :, 1]
        torch.testing.assert_close(every_pair(model, history).flatten()[place], scores[:count], rtol=1e-4, atol=1e-4)
        assert place.unique().numel() == count
        if count == TOKENS**2:
            torch.testing.assert_close(free.scores[row].double().exp().sum().item(), 1.0, rtol=1e-4, atol=1e-4)
        of_codes = [t for t in order.tolist() if t // TOKENS in (50, 22, 31, 60) and t % TOKENS in (45, 20, 38, 29, 57)]
        found = kept.tokens[row, :20, 0] * TOKENS + kept.tokens[row, :20, 1]
        assert found.tolist() == of_codes
        torch.testing.assert_close(
            kept.scores[row, :20].double(), every_pair(model, history).flatten()[of_codes], rtol=1e-4, atol=1e-4
        )
        assert (kept.scores[row, 20:] == -torch.inf).all()


def test_more_beams_than_the_vocabulary():
    model = made_model("gpt2", "prefixmem")
    assert beam_search(model, HISTORIES, 1, 100).tokens.shape == (3, TOKENS, 1)
    kept = beam_search(model, HISTORIES, 3, 100, trie())
    for row, history in enumerate(HISTORIES):
        check(kept, row, plain_search(model, history, 3, 100, SIDS))


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma3"])
def test_a_history_alone_or_among_others(family):
    model = made_model(family, "prefixmem")
    together = beam_search(model, HISTORIES, 3, 6)
    for row in range(3):
        alone = beam_search(model, HISTORIES[row : row + 1], 3, 6)
        assert torch.equal(alone.tokens[0], together.tokens[row])
        torch.testing.assert_close(alone.scores[0], together.scores[row], rtol=1e-4, atol=1e-4)


def test_the_mask_shows_the_history_and_the_own_prefix():
    sees = torch.tensor([[[True, False], [False, True]]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        mask, least = module._mask(sees, 3, torch.empty(0, dtype=dtype)), torch.finfo(dtype).min
        assert mask.dtype == dtype, "kernels of a GPU want the dtype of the queries"
        assert mask.tolist() == [[[[0, 0, 0, 0, least], [0, 0, 0, least, 0]]]]


def test_bfloat16():
    """Scores are summed in float32."""
    model = made_model("qwen3", "prefixmem").bfloat16()
    found = beam_search(model, HISTORIES, 3, 7, trie())
    assert found.scores.dtype == torch.float32
    for row, history in enumerate(HISTORIES):
        scores = {tokens: score for score, tokens in plain_search(model, history, 3, 7, SIDS)}
        for tokens, score in zip(found.tokens[row].tolist(), found.scores[row].tolist(), strict=True):
            assert abs(scores[tuple(tokens)] - score) < 0.3
