"""PrefixMem (arXiv 2606.00324): a hashed prefix-n-gram encoder for Semantic IDs, with fused Triton kernels.

Names are imported when they are first used, so that `prefixmem --help` waits neither for torch nor for transformers.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from .addressing import AddressSpec
    from .checkpoint import CheckpointError
    from .encoder import DecodingState, PrefixMem, PrefixMemConfig, PrefixMemory
    from .huggingface.attach import attach, detach
    from .huggingface.constrained import GeneratedItems, SIDLogitsProcessor, generate_items
    from .operation import prefix_memory, prefix_rows, token_memory
    from .sid import Catalogue, SIDTrie, SIDVocabulary

if not (Path(__file__).parent / "kernels").is_dir():  # a checkout, where kernels/ and bench/ lie beside this folder
    __path__.append(str(Path(__file__).parents[1]))

_MODULE_OF = {
    "AddressSpec": "addressing",
    "Catalogue": "sid",
    "CheckpointError": "checkpoint",
    "DecodingState": "encoder",
    "GeneratedItems": "huggingface.constrained",
    "PrefixMem": "encoder",
    "PrefixMemConfig": "encoder",
    "PrefixMemory": "encoder",
    "SIDLogitsProcessor": "huggingface.constrained",
    "SIDTrie": "sid",
    "SIDVocabulary": "sid",
    "attach": "huggingface.attach",
    "detach": "huggingface.attach",
    "generate_items": "huggingface.constrained",
    "prefix_memory": "operation",
    "prefix_rows": "operation",
    "token_memory": "operation",
}
_PACKAGES = (
    "addressing",
    "checks",
    "distributed",
    "encoder",
    "examples",
    "huggingface",
    "operation",
    "optim",
    "recommender",
    "serving",
    "sid",
)
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
    if name in _PACKAGES:
        return import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
