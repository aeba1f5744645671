"""One training run from its options to its folder, and back.

config.yaml      the options, resolved
checkpoint-N/    Trainer's, to go on from; `complete` marks those that a kill has not cut short
model/           model, tokenizer, vocabulary and encoder
curves.json      training losses, and validations by level
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..._files import write_file
from ...sid import Catalogue, SIDVocabulary
from ..data import (
    KINDS,
    Sequences,
    SequenceStream,
    Split,
    Tokens,
    leave_two_out,
    load_interactions,
    load_item_text,
    split_by_time,
    synthetic,
    tokens_of,
)
from ..data.batches import causal_batch, source_target_batch
from .config import CONFIG, RunConfig, read_options

MODEL, CURVES = "model", "curves.json"


@dataclass
class Data:
    """What a run trains on.

    Attributes:
        name: for tables; synthetic data says so.
        text: of each item, or None.
    """

    name: str
    catalogue: Catalogue
    split: Split
    text: list[str] | None


@dataclass
class Run:
    """A trained model with all that evaluates it."""

    config: RunConfig
    data: Data
    model: nn.Module
    tokenizer: Any
    vocabulary: SIDVocabulary
    tokens: Tokens


def load_data(config: RunConfig) -> Data:
    """Read catalogue, histories and text, and split the histories.

    Raises:
        FileNotFoundError, ValueError: a file is not there or wrong; the message gives file, line or key.
    """
    if config.synthetic:
        generated = synthetic()
        name, catalogue, histories, text = "synthetic", generated.catalogue, generated.histories, generated.text
    else:
        catalogue = Catalogue.load(config.items, codebook_sizes=config.codebook_sizes, token_format=config.token_format)
        histories = load_interactions(config.interactions, catalogue)
        text = load_item_text(config.text, catalogue, config.text_field) if config.text else None
        name = Path(config.items).stem.removesuffix(".index")
    if config.split == "time":
        return Data(name, catalogue, split_by_time(histories, tuple(config.time_fractions)), text)
    return Data(name, catalogue, leave_two_out(histories), text)


def prepare(config: RunConfig, data: Data) -> Run:
    """Model, tokenizer and vocabulary of a run, from its seed; without an encoder yet."""
    from transformers import set_seed

    from .backbone import build_backbone, longest_input

    set_seed(config.seed)
    text = data.text if config.interleaved or config.pairs else None
    model, tokenizer, vocabulary = build_backbone(config, data.catalogue, text)
    tokens = tokens_of(data.catalogue, vocabulary, tokenizer, text, config.max_text_tokens)
    limit, needed = longest_input(model), config.max_items * tokens.levels + tokens.levels + 1
    if limit is not None and needed > limit:
        raise ValueError(
            f"max_items = {config.max_items} items of {tokens.levels} tokens need {needed} positions, the model has "
            f"{limit}; lower max_items"
        )
    return Run(config, data, model, tokenizer, vocabulary, tokens)


def train(
    config: RunConfig,
    out: str | Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    data: Data | None = None,
    add_arm: Callable[[nn.Module, RunConfig, SIDVocabulary], None] | None = None,
    stop_at: int | None = None,
) -> dict[str, Any]:
    """Train a model as its options say, into a folder.

    Args:
        out: the folder; an existing run there is refused unless `resume` goes on with it.
        quiet: no progress bar.
        data: what `load_data` returned, if it is at hand.
        add_arm: puts the encoder on the model, in place of `arms.add_arm`.
        stop_at: stop after this step, as a kill would.

    Returns:
        steps, seconds of this sitting, numbers of parameters, and the curves.

    Raises:
        FileNotFoundError, TypeError, ValueError: an option, a file or the folder is not as it has to be; nothing has
            been trained then.
    """
    from .arms import add_arm as add_arm_of_config
    from .trainer import StopAt, make_trainer, score_examples

    out = Path(out)
    check_folder(config, out, resume)
    _check_processes(config)
    run = prepare(config, load_data(config) if data is None else data)
    (add_arm or add_arm_of_config)(run.model, config, run.vocabulary)
    stream, collate = stream_of(run)
    examples = run.data.split.validation.last(config.max_items).sample(config.eval_users)
    out.mkdir(parents=True, exist_ok=True)
    trainer = make_trainer(
        config,
        out,
        quiet,
        model=run.model,
        train_dataset=stream,
        data_collator=lambda batches: collate(batches[0]),
        eval_dataset=examples,
        score=partial(score_examples, examples=examples, tokens=run.tokens),
    )
    if stop_at is not None:
        trainer.add_callback(StopAt(stop_at))
    report = trainer.run(out, resume)
    if trainer.is_world_process_zero() and stop_at is None:
        save_model(run, out / MODEL)
        write_report(report, out)
    return report


def write_report(report: dict[str, Any], out: Path) -> None:
    text = json.dumps(report, indent=1)
    write_file(out / CURVES, lambda temporary: Path(temporary).write_text(text + "\n", encoding="utf-8"))


def save_model(run: Run, folder: Path) -> None:
    """Model, tokenizer, vocabulary and encoder, all or nothing."""
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    run.model.save_pretrained(temporary)
    run.tokenizer.save_pretrained(temporary)
    run.vocabulary.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def load_run(folder: str | Path) -> Run:
    """A finished run, with its encoder attached.

    Raises:
        FileNotFoundError, ValueError: the folder holds no finished run, or its data are not where they were.
    """
    from ...checkpoint import FOLDER
    from ...encoder import PrefixMem, SIDTransformer
    from ...encoder.saving import kind_of_encoder
    from ...huggingface.attach import attach
    from .backbone import load_model, load_tokenizer

    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"run {folder} holds no {CONFIG}; give a folder that prefixmem train wrote")
    if not (folder / MODEL).is_dir():
        raise FileNotFoundError(
            f"run {folder} holds no {MODEL}/: it has not finished; prefixmem train --resume --out {folder}"
        )
    config = RunConfig(**read_options(folder / CONFIG))
    data = load_data(config)
    model, tokenizer = load_model(folder / MODEL), load_tokenizer(str(folder / MODEL))
    vocabulary = SIDVocabulary.from_pretrained(folder / MODEL, tokenizer)
    if (folder / MODEL / FOLDER).is_dir():
        kind = {"prefixmem": PrefixMem, "sid-transformer": SIDTransformer}[kind_of_encoder(folder / MODEL)]
        attach(model, kind.from_pretrained(folder / MODEL), vocabulary)
    text = data.text if config.interleaved or config.pairs else None
    tokens = tokens_of(data.catalogue, vocabulary, tokenizer, text, config.max_text_tokens)
    return Run(config, data, model.eval(), tokenizer, vocabulary, tokens)


def stream_of(run: Run) -> tuple[SequenceStream, Callable]:
    """The sequences of a run, numbered, and what makes batches of them."""
    config, tokens = run.config, run.tokens
    encoder_decoder = bool(getattr(run.model.config, "is_encoder_decoder", False))
    if encoder_decoder and config.pack > 1:
        raise ValueError(f"pack = {config.pack}: an encoder-decoder takes one sequence a row; give pack = 1")
    kinds = {
        kind: (Sequences(kind, tokens, run.data.split.train, config.max_items, encoder_decoder), getattr(config, kind))
        for kind in KINDS
        if getattr(config, kind)
    }
    batches = config.steps * config.accumulation * process_count()
    stream = SequenceStream(kinds, batches, batch_size=config.batch_size, seed=config.seed, pack=config.pack)
    return stream, partial(source_target_batch if encoder_decoder else causal_batch, pad=tokens.pad)


def check_folder(config: RunConfig, out: Path, resume: bool) -> None:
    file = out / CONFIG
    if not resume:
        if file.is_file():
            raise ValueError(f"out = {out} holds a run already; --resume goes on with it, or give another folder")
        return
    if not file.is_file():
        raise FileNotFoundError(f"out = {out} holds no run to resume; leave --resume out")
    stored = RunConfig(**read_options(file))
    changed = [name for name, value in config.to_dict().items() if getattr(stored, name) != value]
    if changed:
        name = changed[0]
        raise ValueError(
            f"{name} = {getattr(config, name)!r}, and the run in {out} was started with {getattr(stored, name)!r}; a "
            "resumed run keeps its options"
        )


def process_count() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_processes(config: RunConfig) -> None:
    processes = process_count()
    if processes > 1 and config.arm == "prefixmem" and config.grad != "dense":
        raise ValueError(f"grad = {config.grad!r} works in one process, and there are {processes}; give grad = 'dense'")
