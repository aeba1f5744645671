"""The encoder as modules: tables, W_out, decoding a token at a time, and the paper's comparator.

config.py           PrefixMemConfig
memory.py           PrefixMemory: the tables, S
host_tables.py      tables that stay in the host's memory: what crosses, and gathers ahead
table_worker.py     the thread that gathers and updates beside the model
quantized.py        QuantizedMemory: the same in 8 bits a number, for serving
projection.py       W_out and W_head
prefixmem.py        PrefixMem: m = W_out * S
decoding.py         DecodingState: one token of each sequence
sid_transformer.py  SIDTransformer: the comparator in the same slot
saving.py           folders of encoders
"""

from .config import PrefixMemConfig
from .decoding import DecodingState
from .memory import PrefixMemory
from .prefixmem import PrefixMem
from .quantized import QuantizedMemory
from .sid_transformer import SIDTransformer, SIDTransformerConfig

__all__ = [
    "DecodingState",
    "PrefixMem",
    "PrefixMemConfig",
    "PrefixMemory",
    "QuantizedMemory",
    "SIDTransformer",
    "SIDTransformerConfig",
]
