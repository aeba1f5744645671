"""PrefixMem (arXiv 2606.00324): a hashed prefix-n-gram encoder for Semantic IDs, with fused Triton kernels."""

from .modules import PrefixMem, PrefixMemConfig, PrefixMemory
from .ops import prefix_memory, prefix_rows, token_memory
from .sid import SIDVocabulary
from .spec import AddressSpec

__version__ = "0.1.0"
__all__ = [
    "AddressSpec",
    "PrefixMem",
    "PrefixMemConfig",
    "PrefixMemory",
    "SIDVocabulary",
    "prefix_memory",
    "prefix_rows",
    "token_memory",
]
