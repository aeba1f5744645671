"""Which argument of a model takes its KV cache, whatever a release of transformers calls it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Optional

import pytest
import torch
import transformers
from transformers import Cache, DynamicCache

from prefixmem_fast import attach
from prefixmem_fast.huggingface.kv_cache import cache_argument, cache_returned
from tests.helpers.models import HIDDEN, TOKENS, encoder, prompts, tiny_model, vocabulary


class Attention(torch.nn.Module):
    """A causal LM of one attention layer over a Cache of transformers, of no family and no release."""

    def __init__(self) -> None:
        super().__init__()
        self.config = transformers.PretrainedConfig(num_hidden_layers=1)
        self.embed = torch.nn.Embedding(TOKENS, HIDDEN)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed

    def attend(self, input_ids, cache):
        x = self.embed(input_ids)
        cache = DynamicCache() if cache is None else cache
        keys, values = cache.update(x[:, None], x[:, None], 0)
        new, seen = x.shape[1], keys.shape[2]
        mask = torch.ones(new, seen, dtype=torch.bool).tril(seen - new)
        return torch.nn.functional.scaled_dot_product_attention(x[:, None], keys, values, mask)[:, 0], cache


class PastKeyValues(Attention):
    def forward(self, input_ids, past_key_values: list[torch.Tensor] | None = None, use_cache=True):
        logits, cache = self.attend(input_ids, past_key_values)
        return {"logits": logits, "past_key_values": cache}


class NamedCache(Attention):
    def forward(self, input_ids, cache=None, use_cache=True):
        logits, cache = self.attend(input_ids, cache)
        return {"logits": logits, "cache": cache}


class Annotated(Attention):
    def forward(self, input_ids, remembered: Optional[Cache] = None, use_cache=True):  # noqa: UP045
        logits, cache = self.attend(input_ids, remembered)
        return {"logits": logits, "remembered": cache}


class ReturnsTuple(Attention):
    def forward(self, input_ids, remembered: Cache | None = None, use_cache=True):
        return self.attend(input_ids, remembered)


class OfAnUnknownType(Attention):
    def forward(self, input_ids, cache: NotImported | None = None, use_cache=True):  # noqa: F821
        return self.attend(input_ids, cache)


MODELS = {
    PastKeyValues: "past_key_values",
    NamedCache: "cache",
    Annotated: "remembered",
    ReturnsTuple: "remembered",
}


@pytest.mark.parametrize(("kind", "name"), MODELS.items())
def test_a_cached_loop_is_one_call_whatever_the_cache_is_called(kind, name):
    torch.manual_seed(0)
    model, input_ids = attach(kind().eval(), encoder(), vocabulary()), prompts()["input_ids"][:3]
    logits_of = lambda output: output[0] if isinstance(output, tuple) else output["logits"]  # noqa: E731
    whole, cache, cached = logits_of(model(input_ids)), None, []
    for column in input_ids.split([2, 1, 5], 1):
        output = model(column, **{name: cache})
        cache = cache_returned(output)
        cached.append(logits_of(output))
    torch.testing.assert_close(torch.cat(cached, 1), whole)
    assert cache.seen.tolist() == input_ids.tolist()


def test_names_and_annotations():
    assert [cache_argument(kind()) for kind in MODELS] == list(MODELS.values())
    assert cache_argument(tiny_model("t5")) in ("past_key_values", "cache")
    assert cache_argument(torch.nn.Linear(2, 2)) is None
    assert cache_argument(OfAnUnknownType()) is None  # as is xLSTM's


SIZES = {"vocab_size": TOKENS, "hidden_size": HIDDEN}
RECURRENT = {
    "Mamba": SIZES | {"num_hidden_layers": 1},
    "Mamba2": SIZES | {"num_hidden_layers": 1, "num_heads": 2, "head_dim": 32, "n_groups": 1, "state_size": 8},
    "Rwkv": SIZES | {"num_hidden_layers": 2},
    "XLNet": {"vocab_size": TOKENS, "d_model": HIDDEN, "n_layer": 1, "n_head": 2, "d_inner": 32},
    "xLSTM": SIZES | {"num_hidden_layers": 1, "num_blocks": 1, "num_heads": 2},
    "Reformer": SIZES
    | {"is_decoder": True, "num_attention_heads": 2, "attn_layers": ["local"], "axial_pos_embds": False},
}
HEADS = {"XLNet": "XLNetLMHeadModel", "Reformer": "ReformerModelWithLMHead"}


@pytest.mark.parametrize("family", RECURRENT)
def test_models_that_keep_their_past_elsewhere_are_refused(family):
    config = getattr(transformers, f"{family}Config")(**RECURRENT[family], pad_token_id=0)
    model = getattr(transformers, HEADS.get(family, f"{family}ForCausalLM"))(config)
    with pytest.raises(
        NotImplementedError, match=f"^{type(model).__name__} keeps its past in something else than a KV"
    ):
        attach(model, encoder(), vocabulary())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_other_caches_are_refused(name):
    model = attach(tiny_model(), encoder(), vocabulary())
    with pytest.raises(NotImplementedError, match=r"called with a SimpleNamespace as its KV cache; .* use generate"):
        model(**prompts(), **{name: SimpleNamespace()})


def test_continuous_batching_is_refused():
    """It gives its paged cache as `cache`, in all releases."""
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    model = attach(tiny_model(), encoder(), vocabulary())
    with pytest.raises(NotImplementedError, match=r"a PagedAttentionCache as its KV cache; .* use generate"):
        model(**prompts(), cache=PagedAttentionCache.__new__(PagedAttentionCache))
