"""PrefixMem (arXiv 2606.00324): a hashed prefix-n-gram encoder for Semantic IDs, with fused Triton kernels."""

from .checkpoint import CheckpointError
from .decoding import DecodingState
from .integrations.attach import attach, detach
from .modules import PrefixMem, PrefixMemConfig, PrefixMemory
from .ops import prefix_memory, prefix_rows, token_memory
from .sid import Catalogue, SIDTrie, SIDVocabulary
from .spec import AddressSpec

__version__ = "0.1.0"
_OF_TRANSFORMERS = ("GeneratedItems", "SIDLogitsProcessor", "generate_items")
__all__ = [
    "AddressSpec",
    "Catalogue",
    "CheckpointError",
    "DecodingState",
    "GeneratedItems",
    "PrefixMem",
    "PrefixMemConfig",
    "PrefixMemory",
    "SIDLogitsProcessor",
    "SIDTrie",
    "SIDVocabulary",
    "attach",
    "detach",
    "generate_items",
    "prefix_memory",
    "prefix_rows",
    "token_memory",
]


def __getattr__(name: str):
    if name in _OF_TRANSFORMERS:  # importing transformers takes seconds
        from .integrations import constrained

        return getattr(constrained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
