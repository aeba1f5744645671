"""What an engine is: batches of histories go in, searches come out.

Nothing here imports an engine's library. `make_engine` is what the worker's process calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .. import _checks
from .._choices import ENGINES

if TYPE_CHECKING:
    from torch import Tensor

    from ..sid import SIDTrie

Codes = tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """One search.

    Attributes:
        history: the Semantic IDs that a user met, oldest first, each as its codes c_1 .. c_L from 0.
        num_beams: beams kept at each level.
    """

    history: tuple[Codes, ...]
    num_beams: int


@dataclass(frozen=True)
class Beam:
    """A prefix that a search kept.

    Attributes:
        codes: c_1 .. c_l.
        logprob: natural logarithm of its probability after the history, over the model's whole vocabulary.
    """

    codes: Codes
    logprob: float


@dataclass(frozen=True)
class Found:
    """A whole Semantic ID that a search found.

    Attributes:
        names: the items that share it.
        codes: c_1 .. c_L.
        logprob: as that of `Beam`.
    """

    names: tuple[str, ...]
    codes: Codes
    logprob: float


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        beams: of each level 1 .. L, best first; fewer than `num_beams` where the catalogue has fewer prefixes.
        items: best first.
    """

    beams: tuple[tuple[Beam, ...], ...]
    items: tuple[Found, ...]


class Engine(Protocol):
    """Holds a model; used by one thread at a time."""

    def search(self, requests: Sequence[Request]) -> list[Search]:
        """One search a request, in their order. Blocks until all are done.

        Raises:
            ValueError: a history is longer than the limit, has a code without a token, or `num_beams` is too large.
        """

    def describe(self) -> dict[str, Any]:
        """For JSON: ``engine`` and its ``version``, ``model`` (its type), ``encoder`` or None, ``items``, ``levels``,
        ``codebook_sizes``, and ``limits``: ``min_history``, ``max_history``, ``max_beams``."""


def make_engine(
    kind: str, folder: str | Path, catalogue: str | Path, *, vllm: dict[str, Any] | None = None, **options: Any
) -> Engine:
    """An engine by its name, `_choices.ENGINES`; "auto" takes vLLM where it is installed and serves such a model.

    Args:
        folder, catalogue, options: of `TransformersEngine`; other engines take the same.
        vllm: further arguments of `vllm.LLM`, where that is the engine.

    Raises:
        ModuleNotFoundError, OSError, TypeError, ValueError: the engine's library is not installed, or an argument is
            not as stated.
    """
    _checks.choice("engine", kind, ENGINES)
    if kind == "auto":
        kind = "vllm" if find_spec("vllm") is not None and _vllm_serves(folder) else "transformers"
    if kind == "vllm" and find_spec("vllm") is None:
        raise ValueError("engine = 'vllm', and vllm is not installed: install it, or give 'transformers'")
    if kind == "vllm":
        options["engine"] = vllm
    name = {"transformers": "TransformersEngine", "vllm": "VLLMEngine"}[kind]
    return getattr(import_module(f".{kind}_engine", __package__), name)(folder, catalogue, **options)


def _vllm_serves(folder: str | Path) -> bool:
    from .folder import model_folder
    from .vllm import serves

    return serves(model_folder(folder))


def check_request(request: Request, limits: dict[str, int]) -> None:
    """Hold a request against the limits of `Engine.describe`.

    Raises:
        ValueError: it is outside of them; the message names the argument.
    """
    items, least, most = len(request.history), limits["min_history"], limits["max_history"]
    if items > most:
        raise ValueError(f"history has {items} items; allowed are {most} at most: send the last {most}")
    if items < least:
        raise ValueError(f"history has {items} items; this model needs {least} or more: send the items of a user")
    if not 1 <= request.num_beams <= limits["max_beams"]:
        raise ValueError(f"num_beams = {request.num_beams}; allowed are 1..{limits['max_beams']}")


def search_of(trie: SIDTrie, kept: Sequence[tuple[Tensor, Tensor]], before: int = 0) -> Search:
    """A search from the beams that it kept after each of `trie.depth` tokens.

    Args:
        trie: that the beams stayed in.
        kept: token ids int64 ``[K, t]`` and log-probabilities float ``[K]``, best first, -inf where there is no beam;
            for t = 1 .. `trie.depth`.
        before: tokens of a SID before its codes: 1 where the trie has a `begin`.
    """
    beams = []
    for tokens, scores in kept[before : before + trie.levels]:
        codes = trie.vocabulary.table[tokens[:, before:].cpu(), 1].tolist()
        level = zip(codes, scores.tolist(), strict=True)
        beams.append(tuple(Beam(tuple(row), score) for row, score in level if score > -math.inf))
    tokens, scores = kept[-1]
    leaves = trie.follow(tokens.new_zeros(len(tokens)), tokens)
    whole = zip(trie.items_of(leaves), trie.sids_of(leaves).tolist(), scores.tolist(), strict=True)
    found = (Found(names, tuple(row), score) for names, row, score in whole if names and score > -math.inf)
    return Search(tuple(beams), tuple(found))
