"""From a catalogue to recommendations: a Qwen3-like model with PrefixMem, LoRA and the Trainer.

    pip install 'prefixmem_fast[train]'
    python -m prefixmem_fast.examples.next_item

The model is small and of random weights and the catalogue is synthetic, so that it runs anywhere. With your own,
replace `make_tokenizer` and `make_model` by from_pretrained, and `make_catalogue` by Catalogue.load.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

from .. import (
    AddressSpec,
    Catalogue,
    PrefixMem,
    PrefixMemConfig,
    SIDTrie,
    SIDVocabulary,
    attach,
    generate_items,
    optim,
)

USERS, HISTORY = 256, 6


def make_catalogue() -> Catalogue:
    """300 synthetic items of three levels; real ones come from Catalogue.load("items.index.json")."""
    codes = torch.randint(0, 12, (300, 3))
    return Catalogue([f"item-{i}" for i in range(300)], codes, codebook_sizes=(12, 12, 12))


def make_histories(catalogue: Catalogue) -> list[list[int]]:
    """Items that each user met in turn. Users stay with one code of level 1 and walk through its items in order."""
    shelves = [torch.nonzero(catalogue.codes[:, 0] == code).squeeze(1).tolist() for code in range(12)]
    histories = []
    for user in range(USERS):
        shelf = shelves[user % 12]
        start = int(torch.randint(0, len(shelf), ()))
        histories.append([shelf[(start + step) % len(shelf)] for step in range(HISTORY)])
    return histories


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "The", "user", "met", "then"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=7,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def text_of(history: list[int], catalogue: Catalogue, vocabulary: SIDVocabulary) -> str:
    return "The user met " + " then ".join(vocabulary.text(catalogue.codes[item]) for item in history)


def train(folder: Path, catalogue: Catalogue, histories: list[list[int]], steps: int) -> None:
    """Train on all items of each history but the last, and save all that `load` needs."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)

    # One token a code, with rows for them in the model.
    vocabulary = SIDVocabulary.extend(tokenizer, model, catalogue.codebook_sizes, codes=catalogue.codes)
    model.save_pretrained(folder / "base")  # a model from the hub lies there already
    tokenizer.save_pretrained(folder / "adapters")

    # LoRA on the attention; the embeddings have new rows, so they train whole. Then the encoder.
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        model, LoraConfig(r=16, target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens", "lm_head"])
    )
    spec = AddressSpec(catalogue.codebook_sizes, table_rows=4096, max_order=2, active_levels=(1, 2))
    encoder = PrefixMem(PrefixMemConfig(spec, memory_dim=64, hidden_size=model.config.hidden_size), grad="sparse")
    attach(model, encoder, vocabulary)

    texts = [text_of(history[:-1], catalogue, vocabulary) + "<eos>" for history in histories]
    rows = [{"input_ids": ids} for ids in tokenizer(texts)["input_ids"]]
    arguments = TrainingArguments(
        str(folder / "run"),
        max_steps=steps,
        per_device_train_batch_size=64,
        logging_steps=max(steps // 5, 1),
        save_strategy="no",
        report_to=[],
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        optimizers=(optim.for_model(model, lr=3e-3), None),  # rows of the tables: row-wise Adagrad; the rest: AdamW
    )
    trainer.train()
    model.save_pretrained(folder / "adapters")  # the adapters, and the encoder beside them


def load(folder: Path) -> tuple[nn.Module, PreTrainedTokenizerFast, SIDVocabulary]:
    from peft import PeftModel

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "adapters")
    model = PeftModel.from_pretrained(Qwen3ForCausalLM.from_pretrained(folder / "base"), folder / "adapters")
    vocabulary = SIDVocabulary.from_pretrained(folder / "adapters", tokenizer)
    attach(model, PrefixMem.from_pretrained(folder / "adapters"), vocabulary)
    return model.eval(), tokenizer, vocabulary


def recommend(folder: Path, catalogue: Catalogue, histories: list[list[int]]) -> float:
    """Share of the users whose last item is among ten that the model names after the others."""
    model, tokenizer, vocabulary = load(folder)
    trie = SIDTrie(catalogue, vocabulary)
    prompts = [text_of(history[:-1], catalogue, vocabulary) + " then" for history in histories]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    recommendations = generate_items(model, trie, inputs, num_beams=10)
    hits = 0
    for history, ranking in zip(histories, recommendations.items, strict=True):
        hits += any(catalogue.items[history[-1]] in items for items in ranking)
    print(f"user 0 met {text_of(histories[0][:-1], catalogue, vocabulary)}")
    items, scores = recommendations.items[0][:3], recommendations.scores[0, :3].tolist()
    print(f"and next, with their log-probabilities: {items}, {scores}")
    return hits / len(histories)


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="training steps (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder to write to (default: a temporary one)")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    catalogue = make_catalogue()
    histories = make_histories(catalogue)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        train(folder, catalogue, histories, options.steps)
        recall = recommend(folder, catalogue, histories[:64])
    print(f"recall of the next item among 10 of {len(catalogue)}: {recall:.2f}")
    return recall


if __name__ == "__main__":
    main()
