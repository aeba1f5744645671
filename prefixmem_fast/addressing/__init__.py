"""Where a memory row lives: the address spec, and in PyTorch the rows of a Semantic ID and of a token stream.

spec.py          AddressSpec: the tables, their sizes and their primes
primes.py        the seeded generator of the primes
addresses.py     codes -> rows: the prefix hash, the exact index, where a prefix ends
token_stream.py  tokens -> codes: which tokens form a Semantic ID
"""

from .addresses import first_codes, item_windows, lagged_item_windows, prefix_length, prefix_rows
from .spec import AddressSpec
from .token_stream import StreamSIDs, TokenStream, lagged_windows, stream_sids, token_codes, window_codes

__all__ = [
    "AddressSpec",
    "StreamSIDs",
    "TokenStream",
    "first_codes",
    "item_windows",
    "lagged_item_windows",
    "lagged_windows",
    "prefix_length",
    "prefix_rows",
    "stream_sids",
    "token_codes",
    "window_codes",
]
