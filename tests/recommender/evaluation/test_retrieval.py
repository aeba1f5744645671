import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefixmem_fast import SIDTrie
from prefixmem_fast.recommender.evaluation import retrieval as module
from prefixmem_fast.recommender.evaluation.beams import Beams, beam_search
from prefixmem_fast.recommender.evaluation.prompts import prompts_of
from prefixmem_fast.recommender.evaluation.retrieval import NOT_FOUND, ndcg, ranking_metrics, recall, retrieve
from tests.helpers.examples import CODES, CPU, Says, catalogue, examples, made_model, tokens
from tests.helpers.models import sid, tiny_model, vocabulary

POPULARITY = np.array([5, 2, 9, 9, 0, 1, 1, 7])
KNOWN, STUB = tokens(), Says([0.0])  # `STUB` stands where a model does that beams are made up for


def trie():
    return SIDTrie(catalogue(), vocabulary())


TRIE = trie()


def read_by_hand(beams, scores, target, popularity):
    """Rank, hits by level and first codes of the beams of one search, as lists."""
    sids = [tuple(row) for row in KNOWN.sids.tolist()]
    real = [tuple(beam) for beam, score in zip(beams, scores, strict=True) if score > -math.inf]
    ranked = []
    for beam in real:
        items = sorted((i for i in range(len(sids)) if sids[i] == beam), key=lambda i: (-popularity[i], i))
        ranked += items or ["no item"]
    hits = [sum(any(one[:l] == beam[:l] for one in sids) for beam in real) / max(len(real), 1) for l in (1, 2, 3)]
    codes = {token for token, (level, _) in enumerate(TRIE.vocabulary.table.tolist()) if level == 1}
    first = {beam[0] for beam in real} & codes  # text is no code
    return ranked.index(target) if target in ranked else NOT_FOUND, hits, len(first)


@st.composite
def searches(draw, rows=6):
    """Beams ``[rows, K, 3]``: items, beginnings of items, codes in the wrong order, text; the last ones not there."""
    known = KNOWN.sids.tolist()
    beam = st.one_of(
        st.sampled_from(known),
        st.sampled_from(known),
        st.tuples(st.sampled_from(known), st.sampled_from(known)).map(lambda two: [*two[0][:2], two[1][2]]),
        st.tuples(st.sampled_from(known), st.integers(3, 19)).map(lambda two: [two[0][0], two[1], two[0][2]]),
        st.sampled_from(known).map(lambda one: one[::-1]),
    ).map(tuple)
    count = draw(st.integers(1, 8))
    lists = [draw(st.lists(beam, min_size=count, max_size=count, unique=True)) for _ in range(rows)]
    real = torch.tensor([draw(st.integers(0, count)) for _ in range(rows)])
    scores = torch.where(torch.arange(count) < real[:, None], -torch.arange(count).float(), -torch.inf)
    return torch.tensor(lists), scores


@given(searches(), st.lists(st.integers(0, len(CODES) - 1), min_size=6, max_size=6), st.booleans())
def test_what_beams_tell(search, targets, by_popularity):
    """All targets after one history of one length, so that the batch is the beams as they are."""
    sids, scores = search
    chosen = examples((2,) * 6)
    chosen.targets = np.array(targets)
    popularity = POPULARITY if by_popularity else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "beam_search", lambda *given: Beams(sids, scores))
        found = retrieve(STUB, chosen, KNOWN, TRIE, popularity=popularity)
    for row in range(6):
        order = np.zeros(len(CODES)) if popularity is None else popularity
        rank, hits, first = read_by_hand(sids[row].tolist(), scores[row].tolist(), targets[row], order)
        assert found.rank[row] == rank
        np.testing.assert_allclose(found.hits[row], hits, rtol=1e-6)
        assert found.first_codes[row] == first


@pytest.mark.parametrize(
    ("target", "beams", "popularity", "rank"),
    [
        (3, [0, 3], None, 1),
        (4, [0, 3], None, NOT_FOUND),
        (1, [0, 1], POPULARITY, 2),  # behind item 7, which has its SID and is more popular
        (7, [0, 1], POPULARITY, 1),
        (1, [0, 1], None, 1),
        (7, [0, 1], None, 2),
        (7, [0, 1], np.ones(8), 2),
        (3, [1, 3], POPULARITY, 2),  # items 1 and 7 stand before it
        (3, [-1, -1, 3], None, 2),  # SIDs of no item stand before it
        (0, [], None, NOT_FOUND),
    ],
)
def test_ranks_by_hand(target, beams, popularity, rank, monkeypatch):
    wrong = [[*sid(1, 3), sid(0, 0, 5)[2]], [5, 6, 7]]  # a code that does not follow, and text
    sids = [wrong.pop() if beam < 0 else tokens().sids[beam].tolist() for beam in beams]
    sids += [tokens().sids[0].tolist()] * (3 - len(beams))
    scores = torch.full((1, 3), -torch.inf)
    scores[0, : len(beams)] = -torch.arange(len(beams)).float()
    monkeypatch.setattr(module, "beam_search", lambda *given: Beams(torch.tensor([sids]), scores))
    chosen = examples((1,))
    chosen.targets = np.array([target])
    found = retrieve(STUB, chosen, KNOWN, TRIE, popularity=popularity)
    assert found.rank.dtype == np.int64
    assert found.rank.tolist() == [rank]


@pytest.mark.parametrize("family", ["qwen3", "t5"])
@pytest.mark.parametrize("constrained", [True, False])
def test_a_search_of_a_model(family, constrained):
    model, chosen, done = made_model(family, "prefixmem"), examples(), []
    found = retrieve(
        model,
        chosen,
        tokens(),
        trie(),
        num_beams=12,
        constrained=constrained,
        popularity=POPULARITY,
        progress=done.append,
    )
    assert sum(done) == len(chosen)
    for batch in prompts_of(chosen, tokens(), encoder_decoder=family == "t5", device=CPU):
        beams = beam_search(model, batch.input_ids, 3, 12, trie() if constrained else None)
        for i, row in enumerate(batch.rows):
            rank, hits, first = read_by_hand(
                beams.tokens[i].tolist(), beams.scores[i].tolist(), chosen.targets[row], POPULARITY
            )
            assert (found.rank[row], found.first_codes[row]) == (rank, first)
            np.testing.assert_allclose(found.hits[row], hits, rtol=1e-6)
    if constrained:
        assert (found.rank < len(CODES)).all(), "twelve beams hold the whole catalogue"
        assert (found.hits == 1).all()
        assert (found.first_codes == 3).all()
    else:
        assert (found.hits < 1).any()


def test_batches_do_not_matter():
    model, chosen, sizes = made_model("qwen3", "prefixmem"), examples(), []
    whole = retrieve(model, chosen, tokens(), trie(), num_beams=4, constrained=False)
    single = retrieve(
        model, chosen, tokens(), trie(), num_beams=4, constrained=False, max_tokens=1, progress=sizes.append
    )
    assert sizes == [1] * len(chosen)
    for one, other in zip(vars(whole).values(), vars(single).values(), strict=True):
        np.testing.assert_array_equal(one, other)
    nobody = retrieve(model, examples(()), tokens(), trie())
    assert (nobody.rank.shape, nobody.hits.shape, nobody.first_codes.shape) == ((0,), (0, 3), (0,))


@pytest.mark.parametrize("most", [60, 200])
def test_beams_count_into_a_batch(most, monkeypatch):
    """Rows times the tokens of history and beams stay below the limit."""
    shapes, given = [], module.beam_search

    def watched(model, input_ids, levels, num_beams, trie):
        shapes.append(len(input_ids) * (input_ids.shape[1] - 1 + levels + levels * num_beams))
        return given(model, input_ids, levels, num_beams, trie)

    monkeypatch.setattr(module, "beam_search", watched)
    retrieve(tiny_model(), examples((4,) * 9), tokens(), trie(), num_beams=4, max_tokens=most)
    assert max(shapes) <= most
    assert len(shapes) == {60: 5, 200: 2}[most]  # 27 tokens a row


@pytest.mark.parametrize("training", [True, False])
def test_searched_in_eval_mode_and_given_back_as_it_was(training, monkeypatch):
    model = made_model("gpt2")
    expected = retrieve(model, examples(), tokens(), trie(), num_beams=3)
    model.train(training)
    found = retrieve(model, examples(), tokens(), trie(), num_beams=3)
    np.testing.assert_array_equal(found.rank, expected.rank)
    assert model.training == model.transformer.h[0].training == training

    def fails(*given):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(module, "beam_search", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        retrieve(model, examples(), tokens(), trie())
    assert model.training == training


def test_metrics_by_hand():
    rank = np.array([0, 1, 5, NOT_FOUND])
    assert [recall(rank, k) for k in (1, 2, 5, 6, 100)] == [0.25, 0.5, 0.5, 0.75, 0.75]
    assert ndcg(rank, 1) == 0.25
    assert ndcg(rank, 2) == pytest.approx((1 + 1 / math.log2(3)) / 4)
    assert ndcg(rank, 10) == pytest.approx((1 + 1 / math.log2(3) + 1 / math.log2(7)) / 4)
    assert math.isnan(recall(rank[:0], 10))
    assert math.isnan(ndcg(rank[:0], 10))
    found = ranking_metrics(rank, (1, 6))
    assert list(found) == ["recall@1", "ndcg@1", "recall@6", "ndcg@6"]
    assert found["recall@6"] == 0.75
    assert found["ndcg@6"] == ndcg(rank, 6)
    assert ranking_metrics(rank, ()) == {}
    assert all(type(value) is float for value in found.values())


@given(st.lists(st.one_of(st.integers(0, 30), st.just(NOT_FOUND)), min_size=1, max_size=20), st.integers(1, 30))
def test_metrics_of_any_ranks(ranks, at):
    rank = np.array(ranks)
    slow = [1 / math.log2(r + 2) if r < at else 0.0 for r in ranks]
    assert ndcg(rank, at) == pytest.approx(sum(slow) / len(slow))
    assert recall(rank, at) == pytest.approx(sum(r < at for r in ranks) / len(ranks))
    assert 0 <= ndcg(rank, at) <= recall(rank, at) <= 1
    assert recall(rank, at) <= recall(rank, at + 1)
    assert ndcg(rank, at) <= ndcg(rank, at + 1) + 1e-12
    assert ndcg(rank, 1) == recall(rank, 1)
    better = np.maximum(rank - 1, 0)
    assert recall(better, at) >= recall(rank, at)
    assert ndcg(better, at) >= ndcg(rank, at)
