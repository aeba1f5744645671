"""The engine on transformers: beam search that reads a history once, over histories of one length at a time."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._environment import installed_version
from .._progress import quiet_transformers
from .catalogue_engine import CatalogueEngine
from .engine import Request


class TransformersEngine(CatalogueEngine):
    """A model of transformers on a GPU where there is one, else on the CPU.

    Args:
        folder, catalogue, options: of `CatalogueEngine`.

    Raises:
        OSError, TypeError, ValueError: an argument is not as stated.
    """

    def __init__(self, folder: str | Path, catalogue: str | Path, **options: Any) -> None:
        from ..recommender.training.run import load_with_encoder

        super().__init__(folder, catalogue, **options)
        with quiet_transformers():
            model, _ = load_with_encoder(self.served.path, self.served.tokenizer)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device)

    def _kind(self, request: Request) -> Hashable:
        return len(request.history), request.num_beams  # nothing is padded

    def _beams(self, prompts: list[list[int]], num_beams: int) -> list[list[tuple[Tensor, Tensor]]]:
        from ..recommender.evaluation.beams import Beams, beam_search

        kept: list[Beams] = []
        given = torch.tensor(prompts, device=self.device)
        beam_search(self.model, given, self.trie.depth, num_beams, self.trie, kept)
        return [[(beams.tokens[row], beams.scores[row]) for beams in kept] for row in range(len(prompts))]

    def describe(self) -> dict[str, Any]:
        encoder = getattr(self.model, "prefixmem", None)
        return {
            "engine": "transformers",
            "version": installed_version("transformers"),
            "encoder": None if encoder is None else type(encoder).__name__,
            **super().describe(),
        }
