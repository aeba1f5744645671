"""Windows of made-up batches: requests in parts, in any order, in shared and reused blocks."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixmem_fast.serving.item_logits import nodes_of_rows, only_items
from prefixmem_fast.serving.token_windows import TokenStore, requests_of_tokens, windows_of_step
from prefixmem_fast.serving.vllm_processors import ItemsOnly
from prefixmem_fast.sid import Catalogue, SIDTrie, SIDVocabulary

WIDTH, BLOCK = 5, 4


def expected_windows(requests, parts):
    """The last WIDTH tokens up to each token of the parts (request, first, last + 1) of a step."""
    rows = []
    for request, first, last in parts:
        padded = [-1] * WIDTH + requests[request]
        rows += [padded[end + 1 : end + 1 + WIDTH] for end in range(first, last)]
    return torch.tensor(rows).view(-1, WIDTH)


@st.composite
def batches(draw):
    """Requests, and steps that take one or several tokens of some of them, in any order, until all are read."""
    count = draw(st.integers(1, 4))
    requests = [draw(st.lists(st.integers(0, 99), min_size=1, max_size=15)) for _ in range(count)]
    done, steps = [0] * count, []
    while done != [len(request) for request in requests]:
        parts = []
        for i in draw(st.permutations(range(count))):
            left = len(requests[i]) - done[i]
            taken = left - draw(st.integers(0, left))  # all of them is the smallest example
            if taken:
                parts.append((i, done[i], done[i] + taken))
                done[i] += taken
        if parts:
            steps.append(parts)
    return requests, steps


def inputs_of(requests, parts):
    ids = torch.tensor([token for i, first, last in parts for token in requests[i][first:last]], dtype=torch.int32)
    positions = torch.tensor([place for _, first, last in parts for place in range(first, last)])
    begins = torch.tensor([0, *(last - first for _, first, last in parts)], dtype=torch.int32).cumsum(0).int()
    return ids, positions, begins


@given(batches())
@settings(max_examples=100, deadline=None)
def test_windows_from_rows_of_tokens(batch):
    """The newest tokens stand in the step alone: what the rows hold of them is wrong here."""
    requests, steps = batch
    slots = torch.randperm(6)[: len(requests)]
    for parts in steps:
        rows = torch.full((6, 20), 77, dtype=torch.int32)
        for i, first, _ in parts:
            rows[slots[i], :first] = torch.tensor(requests[i][:first], dtype=torch.int32)
        ids, positions, begins = inputs_of(requests, parts)
        found = windows_of_step(ids, positions, begins, slots[[i for i, _, _ in parts]], rows, WIDTH)
        assert torch.equal(found, expected_windows(requests, parts))


@given(batches(), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_windows_from_slots_of_a_cache(batch, padding):
    requests, steps = batch
    blocks = torch.randperm(16).view(4, 4)  # of each request
    store = TokenStore(16 * BLOCK, BLOCK, torch.device("cpu"))
    for parts in steps:
        ids, positions, begins = inputs_of(requests, parts)
        table = blocks[[i for i, _, _ in parts]]
        places = [(i, place) for i, first, last in parts for place in range(first, last)]
        slots = torch.tensor([blocks[i, place // BLOCK] * BLOCK + place % BLOCK for i, place in places])
        ids, positions, slots = (
            torch.nn.functional.pad(tensor, (0, padding), value=value)
            for tensor, value in ((ids, 0), (positions, 0), (slots, -1))
        )
        found = store.windows(ids, positions, slots, begins, table.int(), WIDTH)
        assert torch.equal(found[: len(places)], expected_windows(requests, parts))


def test_a_cached_block_carries_its_tokens():
    """A second request reads the blocks of the first, whose tokens it never gives; a reused block has the new ones."""
    store = TokenStore(4 * BLOCK, BLOCK, torch.device("cpu"))
    first = torch.arange(10, 16)

    def step(ids, begin, table):
        positions = torch.arange(begin, begin + len(ids))
        table = torch.tensor([table])
        slots = table[0, positions // BLOCK] * BLOCK + positions % BLOCK
        return store.windows(ids, positions, slots, torch.tensor([0, len(ids)]), table, WIDTH)

    step(first, 0, [2, 3])
    assert step(torch.tensor([50]), 4, [2, 1]).tolist() == [[10, 11, 12, 13, 50]]
    step(torch.arange(60, 64), 0, [2])
    assert step(torch.tensor([51]), 4, [2, 0]).tolist() == [[60, 61, 62, 63, 51]]


def test_another_layout_is_refused():
    """Blocks of 8 tokens, taken for blocks of 4."""
    store, positions = TokenStore(32, BLOCK, torch.device("cpu")), torch.arange(6)
    with pytest.raises(NotImplementedError, match="not those of its blocks of 4 tokens"):
        store.windows(positions, positions, 8 + positions, torch.tensor([0, 6]), torch.tensor([[1, 2]]), WIDTH)


def test_which_request_a_token_is_of():
    assert requests_of_tokens(torch.tensor([0, 2, 2, 5]), 7).tolist() == [0, 0, 2, 2, 2, 2, 2]


# The processor of both runners

CODES = torch.tensor([[0, 1], [0, 2], [3, 1], [3, 3]])
KNOWN = SIDVocabulary.from_table({10 + l * 4 + c: (l + 1, c) for l in range(2) for c in range(4)}, (4, 4))
END, SIZE = 1, 20


@pytest.fixture(scope="module")
def trie():
    return SIDTrie(Catalogue(["a", "b", "c", "d"], CODES, (4, 4)), KNOWN)


@pytest.fixture(scope="module")
def config(trie, tmp_path_factory):
    path = tmp_path_factory.mktemp("trie") / "trie.safetensors"
    trie.save(path)
    return SimpleNamespace(additional_config={"prefixmem": {"trie": str(path), "end": END}})


FIRST = [10, 13]  # tokens of level 1 that an item has
AFTER = {10: [15, 16], 13: [15, 17]}


def allowed_of(prompt, output):
    """By hand: what may follow, where a SID may have begun in the prompt."""
    begun = prompt[-1:] if prompt and prompt[-1] in AFTER else []
    sid = begun + output
    if len(sid) >= 2:
        return [END]
    return AFTER[sid[0]] if sid else FIRST


REQUESTS = [([5, 10, 15], []), ([5], [13]), ([7, 13], []), ([7, 13], [17]), ([7, 13], [17, END]), ([], [10, 16])]


def check(logits, found, rows):
    for i, (prompt, output) in enumerate(REQUESTS):
        row = found[i]
        if i not in rows:
            assert torch.equal(row, logits[i])
            continue
        allowed = allowed_of(prompt, output)
        assert (row > -torch.inf).nonzero().flatten().tolist() == allowed
        expected = [0.0] if allowed == [END] else logits[i].log_softmax(-1)[allowed].tolist()
        assert row[allowed].tolist() == pytest.approx(expected)


def test_the_older_runner_moves_requests(config):
    """Places change: removed, added, moved and swapped, and outputs grow in the lists that were given."""
    processor = ItemsOnly(config, torch.device("cpu"), False)
    params, free = SimpleNamespace(extra_args=None), SimpleNamespace(extra_args={"prefixmem_free": True})
    outputs = [list(output) for _, output in REQUESTS]
    added = [(5 - i, params if i != 2 else free, prompt, outputs[i]) for i, (prompt, _) in enumerate(REQUESTS)]
    update = SimpleNamespace(removed=[], added=[(3, params, [9], [13])], moved=[])
    processor.update_state(update)
    processor.update_state(SimpleNamespace(removed=[3], added=added, moved=[]))
    swap, one_way = SimpleNamespace(name="SWAP"), SimpleNamespace(name="UNIDIRECTIONAL")
    processor.update_state(SimpleNamespace(removed=[], added=[], moved=[(0, 5, swap), (1, 4, swap), (2, 3, swap)]))
    processor.update_state(None)
    logits = torch.randn(6, SIZE)
    assert not processor.is_argmax_invariant()
    check(logits, processor.apply(logits.clone()), {0, 1, 3, 4, 5})
    processor.update_state(SimpleNamespace(removed=[0], added=[], moved=[(5, 0, one_way)]))
    found = processor.apply(logits[:1].clone())
    assert (found[0] > -torch.inf).nonzero().flatten().tolist() == [END]


def test_the_newer_runner_has_slots(config):
    """Rows are in another order than slots, and the newest token stands in the step alone."""
    slots = torch.tensor([4, 2, 0, 5, 1, 3])
    tokens = torch.full((6, 12), 88, dtype=torch.int32)
    lengths, last, prompts = [], [], torch.zeros(6, dtype=torch.int32)
    for slot, (prompt, output) in zip(slots.tolist(), REQUESTS, strict=True):
        whole = (prompt or [5]) + output
        tokens[slot, : len(whole) - 1] = torch.tensor(whole[:-1], dtype=torch.int32)
        prompts[slot] = len(prompt or [5])
        lengths.append(len(whole) - 1)
        last.append(whole[-1])
    state = SimpleNamespace(all_token_ids=SimpleNamespace(gpu=tokens), prompt_len=SimpleNamespace(gpu=prompts))
    processor = ItemsOnly(config, state)
    for i, slot in enumerate(slots.tolist()):
        extra = {"prefixmem_free": True} if i == 2 else None
        assert processor.add_request(slot, SimpleNamespace(extra_args=extra)) is (i != 2)
    context = SimpleNamespace(
        expanded_idx_mapping=slots.int(), pos=torch.tensor(lengths), input_ids=torch.tensor(last, dtype=torch.int32)
    )
    logits = torch.randn(6, SIZE)
    check(logits, processor.apply(logits.clone(), context), {0, 1, 3, 4, 5})
    processor.add_request(0, SimpleNamespace(extra_args=None))  # the slot's next request
    check(logits, processor.apply(logits.clone(), context), set(range(6)))


def test_what_has_left_the_trie_ends(trie):
    nodes = nodes_of_rows(trie, torch.tensor([[5]]), torch.tensor([[12, 15]]), torch.tensor([2]))
    assert nodes.tolist() == [-1]
    masked = only_items(torch.randn(1, SIZE), trie, nodes, END)
    assert (masked[0] > -torch.inf).nonzero().flatten().tolist() == [END]
