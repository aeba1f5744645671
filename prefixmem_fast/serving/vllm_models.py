"""Models of vLLM with an encoder in front of them; vLLM loads them by name, see `vllm.register`.

`PrefixMemMixin` before a model class of vLLM is all that another family needs:

    class PrefixMemMistralForCausalLM(PrefixMemMixin, MistralForCausalLM): ...

vLLM has two model runners. The newer one (V2) keeps the tokens of each request, and asks the model for a state that
prepares its inputs: `PrefixMemModelState`, which keeps nothing itself. The older one (V1) tells a model nothing of the
tokens before, so `forward` keeps them as the KV cache keeps their keys (`token_windows.TokenStore`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from ..encoder import PrefixMem
from ..encoder.projection import Encoded, has_head
from ..sid import SIDVocabulary
from .token_windows import TokenStore, windows_of_step
from .vllm import NAME, settings_of


class PrefixMemMixin:
    """A causal LM of vLLM whose token embeddings have m added.

    The encoder is read from the folder of the model, where `save_pretrained` of an attached model put it.

    Raises:
        NotImplementedError: vLLM is to do what the encoder cannot follow.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_engine(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        settings, folder = settings_of(vllm_config), vllm_config.model_config.model
        encoder = PrefixMem.from_pretrained(folder, tables=settings.get("tables", "device"))
        if settings.get("quantization") is not None:
            encoder = encoder.quantize(settings["quantization"])
        self.prefixmem = encoder.eval().requires_grad_(False)
        self.sid_vocabulary = SIDVocabulary.from_pretrained(folder)
        self.sid_vocabulary.check_codebooks(encoder.config)
        self._vllm_config = vllm_config
        self._store: TokenStore | None = None

    @staticmethod
    def get_model_state_cls() -> type:
        """What the V2 runner asks for."""
        return _model_state()

    @property
    def window(self) -> int:
        """Tokens that say what the last of them reads."""
        return self.prefixmem.config.lookback + 1

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """As of the model; the encoder's tensors among them have been read with the encoder."""
        own = f"{NAME}."
        loaded = super().load_weights((name, weight) for name, weight in weights if not name.startswith(own))
        return (loaded or set()) | {own + name for name, _ in self.prefixmem.named_parameters()}

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        prefixmem_head: Tensor | None = None,
        **arguments: Any,
    ) -> Any:
        """As of the model. `inputs_embeds` and `prefixmem_head` come from `PrefixMemModelState`, on V2."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_input_ids(input_ids)
            encoded = self._encode_by_slots(input_ids, positions)
            if encoded is not None:
                inputs_embeds = inputs_embeds + encoded.m.to(inputs_embeds.dtype)
                prefixmem_head = encoded.head
        hidden = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **arguments)
        return hidden if prefixmem_head is None else hidden + prefixmem_head.to(hidden.dtype)

    def _encode_by_slots(self, input_ids: Tensor, positions: Tensor) -> Encoded | None:
        """What is added on V1; None in a run for its memory or its compilation alone, which has no requests."""
        metadata = get_forward_context().attn_metadata
        if not isinstance(metadata, dict) or not metadata:
            return None
        layer = next(iter(metadata.values()))
        fields = ("slot_mapping", "query_start_loc", "block_table")
        missing = [name for name in fields if getattr(layer, name, None) is None]
        if missing:
            raise NotImplementedError(
                f"the attention backend's {type(layer).__name__} has no {missing[0]}, which says where the tokens "
                "before stand; take the V2 model runner (VLLM_USE_V2_MODEL_RUNNER=1) or another attention backend"
            )
        slots, begins, blocks = (getattr(layer, name) for name in fields)
        if self._store is None:
            cache = self._vllm_config.cache_config
            self._store = TokenStore(cache.num_gpu_blocks * cache.block_size, cache.block_size, input_ids.device)
        n = min(len(slots), len(input_ids))  # the rest is padding
        windows = self._store.windows(input_ids[:n], positions[:n], slots[:n], begins, blocks, self.window)
        encoded = self.prefixmem.encode_last(windows, self.sid_vocabulary)
        if n == len(input_ids):
            return encoded
        padded = (None if m is None else torch.nn.functional.pad(m, (0, 0, 0, len(input_ids) - n)) for m in encoded)
        return Encoded(*padded)


class PrefixMemQwen3ForCausalLM(PrefixMemMixin, Qwen3ForCausalLM):
    """Qwen3."""


class PrefixMemQwen2ForCausalLM(PrefixMemMixin, Qwen2ForCausalLM):
    """Qwen2."""


class PrefixMemLlamaForCausalLM(PrefixMemMixin, LlamaForCausalLM):
    """Llama, and what has its architecture."""


def check_engine(config: VllmConfig) -> None:
    """Refuse what the encoder cannot follow, in one sentence.

    Raises:
        NotImplementedError: with what to leave out.
    """
    refused = {
        "enable_prompt_embeds": (config.model_config.enable_prompt_embeds, "prompt embeddings have no tokens"),
        "pipeline_parallel_size above 1": (
            config.parallel_config.pipeline_parallel_size > 1,
            "the encoder stands before the first layer and after the last one",
        ),
    }
    if not config.use_v2_model_runner:
        refused["kv_transfer_config"] = (
            config.kv_transfer_config is not None,
            "on the V1 model runner the tokens before a token stand where their keys were computed, and keys from "
            "elsewhere come without",
        )
    for name, (asked, why) in refused.items():
        if asked:
            raise NotImplementedError(f"{name} does not go with a PrefixMem encoder: {why}; leave it out")


def _model_state() -> type:
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    class PrefixMemModelState(DefaultModelState):
        """The embeddings of a step with m added, in a buffer that a CUDA graph reads; nothing else is kept."""

        supports_prompt_embeds = False

        def __init__(self, vllm_config: VllmConfig, model: Any, encoder_cache: Any, device: torch.device) -> None:
            super().__init__(vllm_config, model, encoder_cache, device)
            shape = self.max_num_tokens, self.inputs_embeds_size
            self.embeds = torch.zeros(shape, dtype=self.dtype, device=device)
            self.head = torch.zeros_like(self.embeds) if has_head(model.prefixmem) else None

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
            n, model = input_batch.num_tokens, self.model
            ids = input_batch.input_ids[:n]
            windows = windows_of_step(
                ids,
                input_batch.positions[:n],
                input_batch.query_start_loc[: input_batch.num_reqs + 1],
                input_batch.idx_mapping,
                req_states.all_token_ids.gpu,
                model.window,
            )
            m, head = model.prefixmem.encode_last(windows, model.sid_vocabulary)
            torch.add(model.embed_input_ids(ids), m.to(self.dtype), out=self.embeds[:n])
            if head is not None:
                self.head[:n].copy_(head)
            given = super().prepare_inputs(input_batch, req_states)
            return {**given, **self._buffers(input_batch.num_tokens_after_padding)}

        def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
            return {**super().prepare_dummy_inputs(num_reqs, num_tokens), **self._buffers(num_tokens)}

        def _buffers(self, tokens: int) -> dict[str, Tensor]:
            given = {"inputs_embeds": self.embeds[:tokens]}
            return given if self.head is None else {**given, "prefixmem_head": self.head[:tokens]}

    return PrefixMemModelState
