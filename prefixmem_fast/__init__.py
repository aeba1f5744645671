"""PrefixMem (arXiv 2606.00324): a hashed prefix-n-gram encoder for Semantic IDs, with fused Triton kernels."""

from .checkpoint import CheckpointError
from .decoding import DecodingState
from .integrations.attach import attach, detach
from .modules import PrefixMem, PrefixMemConfig, PrefixMemory
from .ops import prefix_memory, prefix_rows, token_memory
from .sid import Catalogue, SIDTrie, SIDVocabulary
from .spec import AddressSpec

__version__ = "0.1.0"
__all__ = [
    "AddressSpec",
    "Catalogue",
    "CheckpointError",
    "DecodingState",
    "PrefixMem",
    "PrefixMemConfig",
    "PrefixMemory",
    "SIDTrie",
    "SIDVocabulary",
    "attach",
    "detach",
    "prefix_memory",
    "prefix_rows",
    "token_memory",
]
