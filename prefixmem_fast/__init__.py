"""PrefixMem (arXiv 2606.00324): a hashed prefix-n-gram encoder for Semantic IDs, with fused Triton kernels."""

from pathlib import Path

from ._version import __version__
from .addressing import AddressSpec
from .checkpoint import CheckpointError
from .encoder import DecodingState, PrefixMem, PrefixMemConfig, PrefixMemory
from .huggingface.attach import attach, detach
from .operation import prefix_memory, prefix_rows, token_memory
from .sid import Catalogue, SIDTrie, SIDVocabulary

if not (Path(__file__).parent / "kernels").is_dir():  # a checkout, where kernels/ and bench/ lie beside this folder
    __path__.append(str(Path(__file__).parents[1]))

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
    "__version__",
    "attach",
    "detach",
    "generate_items",
    "prefix_memory",
    "prefix_rows",
    "token_memory",
]


def __getattr__(name: str):
    if name in _OF_TRANSFORMERS:  # importing transformers takes seconds
        from .huggingface import constrained

        return getattr(constrained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
