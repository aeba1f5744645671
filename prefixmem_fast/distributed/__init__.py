"""Tables on several processes, on torch.distributed and TorchRec.

exchange.py    what crosses between ranks: codes, slices of S and of its gradient
replicated.py  replicate: whole tables on every rank; the backward pass gathers (codes, gradient of S)
sharded.py     shard: whole rows divided by heads; S and its gradient cross
checkpoint.py  save_tables, load_tables: an entry for each order and head, read by any number of ranks
saving.py      save_pretrained of divided tables: each rank its own rows
ranks.py       what ranks tell one another around files
torchrec.py    to_torchrec, from_torchrec: rows divided by TorchRec, also in host memory and on SSDs
plan.py        which layout when: bytes a rank and bytes sent a SID, by formulas
capacity.py    what a catalogue costs in rows and bytes, and where it fits
tables.py      the tables of a model, and keeping them from what wraps it
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoint import load_tables, save_tables
    from .exchange import ExchangeError
    from .replicated import replicate
    from .saving import save_pretrained
    from .sharded import shard
    from .torchrec import from_torchrec, to_torchrec

_MODULE_OF = {  # imported when first used: the formulas need no torch
    "ExchangeError": "exchange",
    "from_torchrec": "torchrec",
    "load_tables": "checkpoint",
    "replicate": "replicated",
    "save_pretrained": "saving",
    "save_tables": "checkpoint",
    "shard": "sharded",
    "to_torchrec": "torchrec",
}
__all__ = [
    "ExchangeError",
    "from_torchrec",
    "load_tables",
    "replicate",
    "save_pretrained",
    "save_tables",
    "shard",
    "to_torchrec",
]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
