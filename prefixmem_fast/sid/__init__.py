"""Semantic IDs outside the encoder: their tokens, the items that they name, and the trie of their prefixes."""

from .catalogue import Catalogue
from .formats import KNOWN_FORMATS, TokenFormat
from .trie import SIDTrie
from .vocabulary import SIDVocabulary

__all__ = ["KNOWN_FORMATS", "Catalogue", "SIDTrie", "SIDVocabulary", "TokenFormat"]
