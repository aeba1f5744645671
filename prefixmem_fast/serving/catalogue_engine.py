"""What the engines have in common: a folder's model, the items of a catalogue, and requests that go together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .engine import Request, Search, check_request, search_of
from .folder import read_served


class CatalogueEngine:
    """An `Engine` whose library is asked for nothing but beams.

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
        self.served = read_served(folder, catalogue, **options)
        self.limits = self.served.limits(max_history, max_beams)
        self.trie = self.served.trie()

    def search(self, requests: Sequence[Request]) -> list[Search]:
        """One search a request; those of one kind go through the model together."""
        groups: dict[Hashable, list[int]] = {}
        for i, request in enumerate(requests):
            check_request(request, self.limits)
            groups.setdefault(self._kind(request), []).append(i)
        found: dict[int, Search] = {}
        for rows in groups.values():
            prompts = [self.served.prompt(requests[i].history) for i in rows]
            kept = self._beams(prompts, requests[rows[0]].num_beams)
            found |= {i: search_of(self.trie, of_row, self.served.before) for i, of_row in zip(rows, kept, strict=True)}
        return [found[i] for i in range(len(requests))]

    def _kind(self, request: Request) -> Hashable:
        """What requests that are searched together share; the number of beams at least."""
        return request.num_beams

    def _beams(self, prompts: list[list[int]], num_beams: int) -> list[list[tuple[Tensor, Tensor]]]:
        """The beams that each prompt's search keeps, as `search_of` takes them."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        return {
            "model": self.served.config.model_type,
            "items": len(self.served.catalogue),
            "levels": self.trie.levels,
            "codebook_sizes": list(self.served.vocabulary.codebook_sizes),
            "limits": self.limits,
        }
