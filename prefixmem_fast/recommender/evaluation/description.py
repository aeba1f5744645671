"""SID to text: the model names an item from its Semantic ID, and BLEU compares it with the item's text."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from ..data import Tokens
from .prompts import is_encoder_decoder


@torch.no_grad()
def describe(
    model: nn.Module, tokenizer: Any, tokens: Tokens, items: np.ndarray, *, max_new_tokens: int = 32, batch: int = 64
) -> list[str]:
    """Greedy texts of items, from the prompt of the pairs that the model was trained on."""
    from ...huggingface.constrained import generation_arguments

    encoder_decoder, device, texts = is_encoder_decoder(model), next(model.parameters()).device, []
    if tokens.texts is None:
        raise ValueError("tokens holds no text; describe needs a model that was trained with the text of the items")
    training = model.training
    model.eval()
    try:
        for start in range(0, len(items), batch):
            begin = [] if encoder_decoder else tokens.begin
            prompts = torch.tensor(
                [begin + tokens.describe(int(item)) for item in items[start : start + batch]], device=device
            )
            generated = model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                **generation_arguments(
                    model, max_new_tokens=max_new_tokens, eos_token_id=tokens.end, pad_token_id=tokens.pad
                ),
            )
            texts += tokenizer.batch_decode(
                generated[:, 0 if encoder_decoder else prompts.shape[1] :], skip_special_tokens=True
            )
    finally:
        model.train(training)
    return [" ".join(text.split()) for text in texts]


def bleu(texts: list[str], references: list[str]) -> float:
    """Corpus BLEU of 0 to 100, by sacrebleu."""
    try:
        import sacrebleu
    except ImportError:
        raise ValueError("BLEU needs sacrebleu: pip install 'prefixmem_fast[train]'") from None
    return float(sacrebleu.corpus_bleu(texts, [references]).score)
