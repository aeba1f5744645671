"""The Semantic IDs of a token stream, one after another, are read and touched as the stream's."""

import pytest
import torch

from prefixmem_fast import AddressSpec, prefix_memory, token_memory
from prefixmem_fast.addressing import TokenStream, stream_sids
from prefixmem_fast.operation.backends import functions_of

# Tokens 3 .. 5 are the codes of level 1, 6 .. 8 those of level 2, 9 .. 11 those of level 3; the others are text.
TABLE = torch.tensor([(0, 0)] * 3 + [(l, code) for l in (1, 2, 3) for code in range(3)], dtype=torch.int32)
# A whole one, text, one that is cut after its second code, one after its first, one that starts in the middle.
TOKENS = torch.tensor([[3, 7, 11, 0, 4, 6, 1, 5, 8, 9, 10], [5, 8, 10, 5, 8, 10, 2, 3, 0, 4, 6]])


@pytest.mark.parametrize(
    ("active", "codes", "tokens"),
    [
        (None, [[0, 1, 2], [1, 0, -1], [2, 2, 0], [2, 2, 1], [2, 2, 1], [0, -1, -1], [1, 0, -1]], [4, 5, 22]),
        ((1, 3), [[0, 1, 2], [1, -1, -1], [2, 2, 0], [2, 2, 1], [2, 2, 1], [0, -1, -1], [1, -1, -1]], [4, 22]),
        ((3,), [[0, 1, 2], [2, 2, 0], [2, 2, 1], [2, 2, 1]], [9]),
    ],
)
def test_codes_end_at_the_deepest_active_level(active, codes, tokens):
    """A code behind it would touch rows that the stream does not."""
    spec = AddressSpec((3, 3, 3), heads=2, table_rows=20, active_levels=active)
    found = stream_sids(TokenStream(TOKENS, TABLE), spec)
    assert found.codes.tolist() == codes
    assert found.tokens[1].tolist() == tokens


@pytest.mark.parametrize("mode", ["prefix", "suffix", "full"])
@pytest.mark.parametrize("active", [None, (1, 3), (2,)])
@pytest.mark.parametrize("backend", ["reference", "cpu", "native"])
def test_they_are_read_and_touched_as_the_stream_is(mode, active, backend):
    spec = AddressSpec((3, 3, 3), heads=2, table_rows=20, mode=mode, active_levels=active)
    weight, stream = torch.randn(spec.total_rows, 4), TokenStream(TOKENS, TABLE)
    sids, S = stream_sids(stream, spec), token_memory(TOKENS, TABLE, weight, spec, backend=backend)
    put = torch.zeros(TOKENS.numel() + 1, 8)
    put[sids.tokens.flatten()] = prefix_memory(sids.codes, weight, spec, backend=backend).flatten(0, 1)
    assert torch.equal(put[:-1].view_as(S), S)
    dS, functions = torch.randn_like(S), functions_of(backend)
    of_sids = torch.cat([dS.flatten(0, 1), torch.zeros(1, 8)])[sids.tokens]
    found = functions.row_sums(of_sids, sids.codes, spec, torch.float32)
    expected = functions.row_sums(dS, stream, spec, torch.float32)
    assert torch.equal(found.rows, expected.rows)
    assert torch.equal(found.sums, expected.sums)
