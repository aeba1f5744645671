import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from prefixmem_fast import Catalogue, SIDTrie, SIDVocabulary

WRAPPERS = ({}, {"begin": 1}, {"end": 2}, {"begin": 1, "end": 2})


@st.composite
def tries(draw):
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    sids = draw(st.lists(st.tuples(*(st.integers(0, k - 1) for k in sizes)), min_size=1, max_size=20))
    ids = draw(st.permutations(range(5, 5 + sum(sizes))))
    entries = [(l, c) for l, k in enumerate(sizes, 1) for c in range(k)]
    vocabulary = SIDVocabulary.from_table(dict(zip(ids, entries, strict=True)), sizes)
    catalogue = Catalogue([f"item {i}" for i in range(len(sids))], torch.tensor(sids), sizes)
    wrappers = draw(st.sampled_from(WRAPPERS))
    return SIDTrie(catalogue, vocabulary, **wrappers), wrappers


def token_rows(trie, wrappers):
    before, after = ([wrappers[name]] if name in wrappers else [] for name in ("begin", "end"))
    return [[*before, *row, *after] for row in trie.vocabulary.encode(trie.catalogue.codes).tolist()]


def allowed_sets(trie, nodes, width=40):
    place = trie.allowed(nodes, width)
    assert torch.equal(place, place.unique())
    found = [set() for _ in range(len(nodes))]
    for row, token in zip((place // width).tolist(), (place % width).tolist(), strict=True):
        found[row].add(token)
    return found


@given(tries(), st.data())
def test_walks_and_allowed_tokens_are_those_of_the_items(made, data):
    trie, wrappers = made
    rows = token_rows(trie, wrappers)
    codes = trie.catalogue.codes.tolist()
    assert trie.prefixes == tuple(len({tuple(row[:l]) for row in codes}) for l in range(1, trie.levels + 1))
    assert len(trie) == sum(trie.prefixes)
    text = data.draw(st.lists(st.sampled_from([3, 4, 39]), min_size=1, max_size=4))
    generated = data.draw(st.integers(0, trie.depth + 1))
    tails, expected, given_tokens = [], [], len(text) + trie.depth
    for row in rows:
        cut = data.draw(st.integers(0, trie.depth))  # the prompt ends with so many tokens of a SID
        prompt = ([3] * trie.depth + text + row[:cut])[-given_tokens:]
        known = row[:cut] if cut < trie.depth else []
        new = data.draw(st.lists(st.sampled_from(sum(rows, [3])), min_size=generated, max_size=generated))
        tails.append(prompt + new)
        path = known + new
        whole = next((n for n in range(len(known), len(path) + 1) if path[:n] in rows), None)
        if whole is not None:
            expected.append(set())
        else:
            expected.append({r[len(path)] for r in rows if r[: len(path)] == path and len(r) > len(path)})
    nodes = trie.walk(torch.tensor(tails), given_tokens)
    assert allowed_sets(trie, nodes) == expected


@given(tries())
def test_leaves_name_their_items(made):
    trie, wrappers = made
    rows = token_rows(trie, wrappers)
    nodes = trie.walk(torch.tensor([[3, *row] for row in rows]), 1)
    assert trie.is_leaf(nodes).all()
    assert torch.equal(trie.sids_of(nodes), trie.catalogue.codes)
    for row, items in zip(rows, trie.items_of(nodes), strict=True):
        assert items == tuple(item for item, other in zip(trie.catalogue.items, rows, strict=True) if other == row)
    assert trie.items_of(torch.tensor([0, -1])) == [(), ()]
    assert (trie.sids_of(torch.tensor([0, -1])) == -1).all()


def test_a_prefix_that_no_item_has_is_text():
    vocabulary = SIDVocabulary.from_table({10: (1, 0), 11: (1, 1), 20: (2, 0), 21: (2, 1)}, (2, 2))
    trie = SIDTrie(Catalogue(["a", "b"], torch.tensor([[0, 0], [0, 0]]), (2, 2)), vocabulary)
    assert allowed_sets(trie, trie.walk(torch.tensor([[3, 11], [3, 10], [10, 20], [20, 10]]), 2)) == [
        {10},
        {20},
        {10},
        {20},
    ]
    three = SIDVocabulary.from_table({10: (1, 0), 11: (1, 1), 20: (2, 0), 30: (3, 0)}, (2, 1, 1))
    deep = SIDTrie(Catalogue(["a", "b"], torch.tensor([[0, 0, 0], [1, 0, 0]]), (2, 1, 1)), three)
    begun = torch.tensor([[3, 10, 11], [3, 10, 20], [10, 20, 11], [11, 20, 30]])
    assert allowed_sets(deep, deep.walk(begun, 3)) == [{20}, {30}, {20}, {10, 11}], (
        "one begins where another breaks off"
    )
    assert trie.walk(torch.tensor([[3, 11]]), 1).tolist() == [-1], "generated, it has left the trie"
    assert trie.items_of(trie.walk(torch.tensor([[3, 10, 20, 2]]), 1)) == [("a", "b")]
    assert repr(trie).startswith("SIDTrie(items=2, prefixes=(1, 1), bytes=")
    assert trie.allowed(torch.empty(0, dtype=torch.int64), 30).tolist() == []
    assert trie.allowed(torch.tensor([-1, -1]), 30).tolist() == []


@pytest.mark.parametrize(
    ("wrappers", "message"),
    [
        ({"begin": -1}, r"begin = -1 is no token id; give one of 0\.\.2\^31 - 1, or None for none"),
        ({"end": 1 << 31}, "end = 2147483648 is no token id"),
        ({"begin": 1.0}, "begin = 1.0 is not an integer"),
        ({"end": True}, "end = True is not an integer"),
    ],
)
def test_wrappers_are_token_ids(wrappers, message):
    catalogue = Catalogue(["x"], torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises((TypeError, ValueError), match=message):
        SIDTrie(catalogue, SIDVocabulary.from_table({10: (1, 0)}, (1,)), **wrappers)


@pytest.mark.parametrize("wrappers", [{"begin": 3, "end": 3}, {"begin": 10}, {"end": 20}])
def test_wrappers_are_two_text_tokens(wrappers):
    vocabulary = SIDVocabulary.from_table({10: (1, 0), 20: (2, 0)}, (1, 1))
    with pytest.raises(ValueError, match="give two different tokens that stand for no code"):
        SIDTrie(Catalogue(["a"], torch.tensor([[0, 0]])), vocabulary, **wrappers)


@given(tries())
@settings(max_examples=25)
def test_a_saved_trie_is_the_same(made):
    trie, _ = made
    trie.catalogue = Catalogue([f"{i} ä\0\ud800" for i in range(len(trie.catalogue))], trie.catalogue.codes, None)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trie.safetensors")
        trie.save(file)
        again = SIDTrie.load(file)
        assert [path.name for path in Path(folder).iterdir()] == [file.name]
    assert (again.begin, again.end, again.depth) == (trie.begin, trie.end, trie.depth)
    assert again.vocabulary == trie.vocabulary
    leaves = trie.follow(torch.zeros(1, dtype=torch.int64), torch.tensor(token_rows(trie, made[1])[-1:]))
    nodes = torch.arange(-1, int(leaves.max()) + 1)
    assert again.items_of(nodes) == trie.items_of(nodes)
    assert torch.equal(again.sids_of(nodes), trie.sids_of(nodes))
    assert torch.equal(again.allowed(nodes, 40), trie.allowed(nodes, 40))


def test_a_file_that_is_no_trie_is_refused(tmp_path):
    vocabulary = SIDVocabulary.from_table({10: (1, 0)}, (1,))
    file = tmp_path / "trie.safetensors"
    SIDTrie(Catalogue(["a"], torch.tensor([[0]])), vocabulary).save(file)
    whole = file.read_bytes()
    for content in (b"", whole[:-1], whole[:60], whole.replace(b"[10, 1, 0", b"[10, 1, 7"), b"\xff" * 100):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"trie .*trie\.safetensors"):
            SIDTrie.load(file)
    save_file({"codes": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"it holds no trie; write one with SIDTrie\.save"):
        SIDTrie.load(file)
    with pytest.raises(FileNotFoundError, match=r"trie .* is not there"):
        SIDTrie.load(tmp_path / "none.safetensors")


def test_scores_that_stay():
    catalogue = Catalogue(["a", "b"], torch.tensor([[0, 0], [1, 0]]))
    trie = SIDTrie(catalogue, SIDVocabulary.from_table({5: (1, 0), 6: (1, 1), 7: (2, 0)}, (2, 1)))
    scores = torch.arange(32.0).view(4, 8)
    kept, found = trie.allowed_scores(torch.tensor([0, 1, 3, -1]), scores, 2)
    assert dict(zip(kept.tolist(), found.tolist(), strict=True)) == {5: 5, 6: 6, 15: 15, 18: 0, 26: 0}
    with pytest.raises(ValueError, match="reach token id 9, the scores 7"):
        trie.allowed_scores(torch.tensor([0]), scores[:1], 9)
