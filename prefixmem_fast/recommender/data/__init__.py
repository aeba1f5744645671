"""Items and histories on their way to batches of token ids.

interactions.py   who met which items; leave-two-out and time splits
history_files.py  the files that say it
item_text.py      what items are called
synthetic.py      a catalogue and users that need no download
sequences.py      the three kinds of sequences, as token ids
stream.py         the kinds mixed by weight, numbered
batches.py        rows padded or packed
"""

from .history_files import load_interactions
from .interactions import Examples, Histories, Split, leave_two_out, split_by_time
from .item_text import load_item_text
from .sequences import KINDS, Sequences, Tokens, tokens_of
from .stream import SequenceStream
from .synthetic import Synthetic, synthetic

__all__ = [
    "KINDS",
    "Examples",
    "Histories",
    "SequenceStream",
    "Sequences",
    "Split",
    "Synthetic",
    "Tokens",
    "leave_two_out",
    "load_interactions",
    "load_item_text",
    "split_by_time",
    "synthetic",
    "tokens_of",
]
