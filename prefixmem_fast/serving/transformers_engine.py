"""The engine on transformers: beam search that reads a history once, over histories of one length at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .._environment import installed_version
from .._progress import quiet_transformers
from .engine import Request, Search, check_request, search_of
from .folder import read_served


class TransformersEngine:
    """A model of transformers on a GPU where there is one, else on the CPU; see `Engine`.

    Args:
        folder, catalogue, start, begin, end, token_format: of `read_served`.
        max_history: items of a history; None takes what the model was trained on, see `Served.limits`.
        max_beams: beams of a search.

    Raises:
        OSError, TypeError, ValueError: an argument is not as stated.
    """

    def __init__(
        self,
        folder: str | Path,
        catalogue: str | Path,
        *,
        max_history: int | None = None,
        max_beams: int = 50,
        **options: Any,
    ) -> None:
        from ..recommender.training.run import load_with_encoder

        self.served = read_served(folder, catalogue, **options)
        self.limits = self.served.limits(max_history, max_beams)
        with quiet_transformers():
            model, _ = load_with_encoder(self.served.path, self.served.tokenizer)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device)
        self.trie = self.served.trie()

    def search(self, requests: Sequence[Request]) -> list[Search]:
        """One search a request; those of one length and one number of beams go through the model together."""
        groups: dict[tuple[int, int], list[int]] = {}
        for i, request in enumerate(requests):
            check_request(request, self.limits)
            groups.setdefault((len(request.history), request.num_beams), []).append(i)
        found: dict[int, Search] = {}
        for (_, num_beams), rows in groups.items():
            found |= zip(rows, self._search([requests[i] for i in rows], num_beams), strict=True)
        return [found[i] for i in range(len(requests))]

    def _search(self, requests: Sequence[Request], num_beams: int) -> list[Search]:
        from ..recommender.evaluation.beams import Beams, beam_search

        prompts = torch.tensor([self.served.prompt(request.history) for request in requests], device=self.device)
        kept: list[Beams] = []
        beam_search(self.model, prompts, self.trie.depth, num_beams, self.trie, kept)
        before = self.served.before
        return [
            search_of(self.trie, [(beams.tokens[row], beams.scores[row]) for beams in kept], before)
            for row in range(len(requests))
        ]

    def describe(self) -> dict[str, Any]:
        encoder = getattr(self.model, "prefixmem", None)
        return {
            "engine": "transformers",
            "version": installed_version("transformers"),
            "model": self.served.config.model_type,
            "encoder": None if encoder is None else type(encoder).__name__,
            "items": len(self.served.catalogue),
            "levels": self.trie.levels,
            "codebook_sizes": list(self.served.vocabulary.codebook_sizes),
            "limits": self.limits,
        }
