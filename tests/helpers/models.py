"""Tiny models of random weights, one a family, and a vocabulary whose ids are shuffled and partly missing."""

import inspect
import random

import torch
import transformers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from prefixmem_fast import AddressSpec, PrefixMem, PrefixMemConfig, SIDVocabulary

transformers.logging.set_verbosity_error()

SIZES = (4, 5, 6)
HIDDEN, TOKENS = 32, 64
# What the release of transformers calls a KV cache, among the arguments and in the output.
CACHE = next(n for n in ("cache", "past_key_values") if n in inspect.signature(GPT2LMHeadModel.forward).parameters)
FIRST_TEXT, FIRST_SID = 3, 20  # ids 3 .. 19 are text, SID tokens stand among 20 .. 63

_LLAMA = {
    "vocab_size": TOKENS,
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_NEOX = {name: value for name, value in _LLAMA.items() if name != "num_key_value_heads"}
_MODELS = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_LLAMA, head_dim=16)),
    "qwen2_tied": lambda: Qwen2ForCausalLM(Qwen2Config(**_LLAMA, tie_word_embeddings=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA)),
    "mistral_sliding": lambda: MistralForCausalLM(MistralConfig(**_LLAMA, sliding_window=5)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_LLAMA, head_dim=16, sliding_window=6)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=TOKENS, n_embd=HIDDEN, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2, pad_token_id=0
        )
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_NEOX)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=TOKENS,
            d_model=HIDDEN,
            d_kv=16,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            eos_token_id=2,
            pad_token_id=0,
            decoder_start_token_id=0,
        )
    ),
}
FAMILIES = list(_MODELS)


def tiny_model(family: str = "qwen3"):
    """In eval mode, with weights large enough that the encoder changes what is generated."""
    torch.manual_seed(0)
    model = _MODELS[family]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.tie_weights()
    return model


def vocabulary() -> SIDVocabulary:
    """12 of the 15 codes have a token, in shuffled order."""
    entries = [(l, code) for l, size in enumerate(SIZES, start=1) for code in range(size) if code != 2]
    ids = random.Random(0).sample(range(FIRST_SID, TOKENS), len(entries))
    return SIDVocabulary.from_table(dict(zip(ids, entries, strict=True)), SIZES)


def encoder(std: float = 1.0, **options) -> PrefixMem:
    torch.manual_seed(1)
    spec = AddressSpec(SIZES, table_rows=50, heads=2, max_order=3, **options.pop("spec", {}))
    config = PrefixMemConfig(spec, memory_dim=8, hidden_size=HIDDEN, output_init_std=std, memory_init_std=1.0)
    return PrefixMem(config, **options)


def cross_item_encoder(std: float = 1.0, history: int = 2, **options) -> PrefixMem:
    """Of orders within an item, and of those of each of the items up to `history` back."""
    torch.manual_seed(1)
    starts = {"hidden_size": HIDDEN, "output_init_std": std, "memory_init_std": 1.0}
    config = None
    for back in range(history, 0, -1):
        spec = AddressSpec.cross_item(SIZES, history=back, heads=2, table_rows=50)
        config = PrefixMemConfig(spec, 6, **starts, cross_item=config)
    within = AddressSpec(SIZES, table_rows=50, heads=2, max_order=2, active_levels=(1, 2))
    return PrefixMem(PrefixMemConfig(within, 8, **starts, cross_item=config), **options)


def lagged_encoder(lags: int = 3, first: int = 1, codes: int | None = 2, **options) -> PrefixMem:
    """Of orders within an item, and of cross-item rows that several items share, also at the output layer.

    Within them such rows of the first `codes` of an earlier item, unless None.
    """
    torch.manual_seed(1)
    starts = {"hidden_size": HIDDEN, "output_init_std": 1.0, "memory_init_std": 1.0}
    spec = AddressSpec.cross_item(SIZES, history=first, heads=2, table_rows=50)
    short = None if codes is None else PrefixMemConfig(spec, 4, **starts, lags=2, earlier_codes=codes)
    across = PrefixMemConfig(spec, 6, **starts, lags=lags, output_slot=True, cross_item=short)
    within = AddressSpec(SIZES, table_rows=50, heads=2, max_order=2, active_levels=(1, 2))
    return PrefixMem(PrefixMemConfig(within, 8, **starts, cross_item=across), **options)


def sid(*codes: int) -> list[int]:
    known = vocabulary()
    return [known.token_id(level, code) for level, code in enumerate(codes, start=1)]


def prompts() -> dict[str, torch.Tensor]:
    """Rows that end after text and inside a SID at each level, the last one padded on the left."""
    rows = [
        [*sid(1, 3, 4), 5, *sid(0, 1, 5), 9],
        [7, *sid(1, 3, 4), 5, 6, 8, *sid(3)],
        [*sid(0, 1, 5), 11, 4, 9, *sid(1, 0)],
        [0, 0, 0, 12, *sid(3, 3, 3), sid(0)[0]],
    ]
    input_ids = torch.tensor(rows)
    return {"input_ids": input_ids, "attention_mask": (input_ids != 0).long()}


def call(family: str) -> dict[str, torch.Tensor]:
    """Arguments of forward: `prompts`, and for T5 a decoder input that ends inside a SID."""
    inputs = prompts()
    if family == "t5":
        inputs["decoder_input_ids"] = torch.tensor([[0, *sid(1, 3)]] * len(inputs["input_ids"]))
    return inputs
