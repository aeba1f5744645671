"""What the encoder adds to a training step of a language model: random weights, Qwen3's shapes, histories of SIDs."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from prefixmem_fast import AddressSpec, PrefixMem, PrefixMemConfig, attach, optim
from prefixmem_fast.addressing import TokenStream
from prefixmem_fast.operation import reference

from ..registry import Case, Contender, benchmark
from .providers import TRAINING_TOTAL, training_step
from .workloads import (
    BATCHES,
    CODES,
    FIRST_TOKEN,
    HEADS,
    LEVELS,
    WIDTH,
    token_stream,
    vocabulary_of,
)

QWEN3 = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 28}
SHAPES = {
    "Qwen3 0.6B": {**QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "vocab_size": 151_936},
    "Qwen3 1.7B": {**QWEN3, "hidden_size": 2048, "intermediate_size": 6144, "vocab_size": 151_936},
    "Qwen3, 4 layers of 256": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "intermediate_size": 768,
        "vocab_size": FIRST_TOKEN,
    },
}
SIDS, TEXT = 32, 3  # engagements a history, tokens of text before each


def workloads(device: str) -> list[dict[str, Any]]:
    if device == "cuda":
        shape = {"histories": 32, "table_rows": 2_000_000, "dtype": "bfloat16"}
        return [{"model": name, **shape} for name in ("Qwen3 0.6B", "Qwen3 1.7B")]
    return [{"model": "Qwen3, 4 layers of 256", "histories": 4, "table_rows": 200_000, "dtype": "float32"}]


class Model:
    """A causal LM with or without the encoder, and its optimizers: AdamW, and row-wise Adagrad in the backward pass."""

    def __init__(self, shape: dict[str, Any], spec: AddressSpec, dtype: torch.dtype, device: str, grad: str) -> None:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        vocabulary = vocabulary_of(spec)
        size = shape["vocab_size"] + LEVELS * CODES
        config = Qwen3Config(**{**shape, "vocab_size": size}, tie_word_embeddings=True)
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                self.model = Qwen3ForCausalLM(config)
        finally:
            torch.set_default_dtype(default)
        dense = list(self.model.parameters())
        self.encoder: PrefixMem | None = None
        self.optimizers: list[torch.optim.Optimizer] = []
        if grad:
            # W_out starts from zero, so the first loss is that of the model alone.
            given = PrefixMemConfig(spec, HEADS * WIDTH, config.hidden_size, output_init_std=0.0)
            encoder = PrefixMem(given, grad=grad, device=device, dtype=dtype)
            attach(self.model, encoder, vocabulary)
            self.encoder, self.vocabulary = encoder, vocabulary
            self.optimizers.append(optim.RowWiseAdagrad([encoder.memory.weight], lr=1e-2))
            dense.append(encoder.out_proj.weight)
        self.optimizers.append(torch.optim.AdamW(dense, lr=1e-5, fused=device == "cuda"))

    def loss(self, ids: Tensor) -> Tensor:
        return _loss(self.model(input_ids=ids).logits, ids)

    @torch.no_grad()
    def wrong_memory(self, ids: Tensor, without: float) -> str | None:
        """How the loss is wrong with a W_out that is not zero, against embeddings to which the reference is added."""
        memory, W_out = self.encoder.memory.weight, self.encoder.out_proj.weight
        generator = torch.Generator(W_out.device).manual_seed(3)
        W_out.normal_(std=1.0, generator=generator)
        loss = float(self.loss(ids))
        table = self.vocabulary.token_table(ids.device)
        S = reference.forward(TokenStream(ids, table), memory, self.encoder.config.spec)
        embeddings = self.model.get_input_embeddings()(ids) + nn.functional.linear(S, W_out)
        W_out.zero_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that embeddings are read as text, which is what is wanted here
            expected = float(_loss(self.model(inputs_embeds=embeddings).logits, ids))
        if abs(expected - without) < 1e-2:
            return f"the memory moves the loss by {abs(expected - without):.2g} alone, too little to be checked"
        off = abs(loss - expected)
        return f"its loss {loss:.5g} is not the reference's {expected:.5g}" if not off <= 2e-3 * expected else None

    def update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def state_bytes(self) -> int:
        states = [s for optimizer in self.optimizers for state in optimizer.state.values() for s in state.values()]
        tensors = [*self.model.parameters(), *(s for s in states if isinstance(s, Tensor))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@benchmark(workloads, {"model": "Qwen3, 4 layers of 256", "histories": 1, "table_rows": 500, "dtype": "float32"})
def language_model(device: str, model: str, histories: int, table_rows: int, dtype: str) -> Case:
    """A training step of a causal LM over histories of 32 SIDs, without the encoder and with it."""
    import transformers  # noqa: F401  said to be missing before anything is set up

    if model not in SHAPES:
        raise ValueError(f"model = {model!r}; allowed are {', '.join(SHAPES)}")
    spec = AddressSpec((CODES,) * LEVELS, table_rows=table_rows, active_levels=(3, 4))
    vocabulary = vocabulary_of(spec)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(BATCHES):
        codes = torch.randint(0, CODES, (histories * SIDS, LEVELS), generator=generator)
        batches.append(token_stream(codes, vocabulary, histories, TEXT).to(device))
    shape, kind = SHAPES[model], getattr(torch, dtype)
    expected: list[float] = []

    @torch.no_grad()
    def check(model: Model) -> str | None:
        loss = float(model.loss(batches[0]))
        expected.append(loss)  # the first contender is the model alone
        if not abs(loss - expected[0]) <= 1e-3:
            return f"its loss {loss:.5g} with W_out zero is not that of the model alone, {expected[0]:.5g}"
        return model.wrong_memory(batches[0], loss) if model.encoder else None

    needs = _parameters(shape) * kind.itemsize * 5
    names = {"without the encoder": "", "prefixmem_fast, fused": "fused", "prefixmem_fast, sparse gradient": "sparse"}
    contenders = [
        Contender(name, lambda grad=grad: Model(shape, spec, kind, device, grad), needs=needs)
        for name, grad in names.items()
    ]
    return Case(
        contenders,
        training_step(batches),
        check,
        totals=TRAINING_TOTAL,
        least_turns=7 if histories > 1 else 3,
        state_bytes=Model.state_bytes if device == "cuda" else None,
    )


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def _parameters(shape: dict[str, Any]) -> int:
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"] + shape["num_key_value_heads"]
    layer = 2 * heads * shape["head_dim"] * hidden + 3 * hidden * shape["intermediate_size"]
    return shape["num_hidden_layers"] * layer + (shape["vocab_size"] + LEVELS * CODES) * hidden
