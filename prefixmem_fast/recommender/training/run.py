"""One training run from its options to its folder, and back.

run.json         says that the folder is a run's, see folder.py
config.yaml      the options, resolved, and the digests of the files that the run reads, see inputs.py
checkpoint-N/    Trainer's, to go on from
curves.json      training losses, and validations by level
model/           model, tokenizer, vocabulary and encoder; it comes last, so a run that has it has finished
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

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
from .config import CONFIG, RunConfig, read_run
from .folder import CLASSIFICATION, ENCODER, MODEL, TRAIN, RunFolder, command_of
from .inputs import DATA, located
from .session import Session, options_digest, process_count


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
    add_arm: Callable[[nn.Module, RunConfig, SIDVocabulary], nn.Module | None] | None = None,
    stop_at: int | None = None,
    kind: str = TRAIN,
) -> dict[str, Any]:
    """Train a model as its options say, into a folder.

    Args:
        out: the folder; a new or an empty one, or with `resume` that of the run to go on with.
        quiet: no progress.
        data: what `load_data` returned, if it is at hand.
        add_arm: puts the encoder on the model, in place of `arms.add_arm`; may return a model around it, such as one
            of PEFT, that is trained and saved in its place.
        stop_at: stop after this step, as a kill would.
        kind: what the folder is marked as.

    Returns:
        steps, the best one and the saved model's, seconds of training, numbers of parameters, and the curves.

    Raises:
        OSError, TypeError, ValueError: an option, a file or the folder is not as it has to be; nothing has been
            trained then.
        DivergedError: a loss is not finite.
    """
    from .arms import add_arm as add_arm_of_config
    from .trainer import StopAt, make_trainer, score_examples

    with Session(config, out, kind, MODEL, resume) as session:
        if session.report is not None:
            return session.report
        config = session.config
        run = prepare(config, load_data(config) if data is None else data)
        run.model = (add_arm or add_arm_of_config)(run.model, config, run.vocabulary) or run.model
        stream, collate = stream_of(run)
        examples = run.data.split.validation.last(config.max_items).sample(config.eval_users)
        trainer = make_trainer(
            config,
            session.begin(getattr(run.model.config, "_commit_hash", None)),
            quiet=quiet,
            model=run.model,
            train_dataset=stream,
            data_collator=lambda batches: collate(batches[0]),
            eval_dataset=examples,
            score=partial(score_examples, examples=examples, tokens=run.tokens),
        )
        if stop_at is not None:
            trainer.add_callback(StopAt(stop_at))
        report = trainer.run()
        if trainer.is_world_process_zero() and stop_at is None:
            session.finish(report, partial(save_model, run))
        return report


def save_model(run: Run, folder: Path) -> None:
    """Model, tokenizer, vocabulary and encoder."""
    run.model.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)
    run.vocabulary.save_pretrained(folder)


def load_run(folder: str | Path) -> Run:
    """A finished run, with its encoder attached.

    Raises:
        FileNotFoundError, ValueError: the folder holds no finished run, or its data are not where they were.
    """
    from .backbone import load_tokenizer

    folder, config, inputs = finished_run(folder)
    config = located(config, inputs, folder, DATA)
    data = load_data(config)
    tokenizer = load_tokenizer(str(folder / MODEL))
    model, vocabulary = load_with_encoder(folder / MODEL, tokenizer)
    text = data.text if config.interleaved or config.pairs else None
    tokens = tokens_of(data.catalogue, vocabulary, tokenizer, text, config.max_text_tokens)
    return Run(config, data, model, tokenizer, vocabulary, tokens)


def finished_run(folder: str | Path) -> tuple[Path, RunConfig, dict[str, Any]]:
    """The folder of a finished run, its options, and what it keeps of its inputs; its files are compared.

    Raises:
        FileNotFoundError, ValueError: the folder holds no finished run, or its files are not those that it wrote.
    """
    marked = RunFolder.read(folder)
    folder = marked.path
    if marked.kind == CLASSIFICATION:
        raise ValueError(
            f"run {folder} pre-trained an encoder alone, so there is no model to evaluate; prefixmem train --encoder "
            f"{folder / ENCODER} trains one with it"
        )
    if not (folder / MODEL).is_dir():
        raise FileNotFoundError(
            f"run {folder} holds no {MODEL}/: it has not finished; prefixmem {command_of(marked.kind)} --resume --out "
            f"{folder} goes on with it"
        )
    options, inputs = read_run(folder / CONFIG)
    marked.options = options_digest(options)
    marked.check_options(folder / MODEL)
    problem = marked.problem_of(folder / MODEL)
    if problem is not None:
        raise ValueError(f"run {folder}: {problem}; bring the old files back, or train anew")
    return folder, RunConfig(**options), inputs


def load_with_encoder(folder: Path, tokenizer: Any | None) -> tuple[nn.Module, SIDVocabulary]:
    """A saved model in eval mode, with its encoder attached if it has one, and its vocabulary."""
    from ...checkpoint import FOLDER
    from ...encoder import PrefixMem, SIDTransformer
    from ...encoder.saving import kind_of_encoder
    from ...huggingface.attach import attach
    from .backbone import load_model

    model, vocabulary = load_model(folder), SIDVocabulary.from_pretrained(folder, tokenizer)
    if (folder / FOLDER).is_dir():
        kind = {"prefixmem": PrefixMem, "sid-transformer": SIDTransformer}[kind_of_encoder(folder)]
        attach(model, kind.from_pretrained(folder), vocabulary)
    return model.eval(), vocabulary


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
