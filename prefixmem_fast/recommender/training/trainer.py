"""transformers' Trainer for next-item models: TF-L as its evaluation, and checkpoints that a kill cannot spoil."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ...encoder import PrefixMem, SIDTransformer
from ..data import Examples, Tokens
from ..evaluation.teacher_forcing import teacher_forced
from .arms import optimizer_for
from .config import CONFIG, RunConfig, write_options

COMPLETE = "complete"  # a file in a checkpoint whose every other file has been written


class RecommenderTrainer(Trainer):
    """Trains on a numbered stream of sequences, in its order, and validates by `score`.

    Args:
        config: options of the run.
        score: gives the loss and other figures of a model on the validation examples.
        options: of `Trainer`.
    """

    def __init__(self, *, config: RunConfig, score: Callable[[nn.Module], dict[str, float]], **options: Any) -> None:
        super().__init__(optimizers=(optimizer_for(options["model"], config), None), **options)
        self.config, self.score = config, score
        self._validating = 0.0  # seconds of this sitting
        self._before: float | None = None  # seconds of training in earlier ones
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        if not self.args.disable_tqdm:
            self.add_callback(_Progress())
        if config.patience:
            self.add_callback(EarlyStoppingCallback(config.patience))

    def run(self, out: Path, resume: bool) -> dict[str, Any]:
        """Write the options, train from the start or from the last complete checkpoint, and report."""
        write_options(self.config, out / CONFIG)
        self._started = time.perf_counter()
        self.train(resume_from_checkpoint=last_checkpoint(out) if resume else None)
        return {
            "steps": self.state.global_step,
            "best_step": _best_step(self.state.log_history),
            "seconds": max((row.get("eval_seconds", 0.0) for row in self.state.log_history), default=0.0),
            "parameters": _parameters(self.model),
            **_curves(self.state.log_history),
        }

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """What `score` says of the model, logged with the seconds of training up to here."""
        begun = time.perf_counter()
        if self._before is None:
            self._before = max((row.get("eval_seconds", 0.0) for row in self.state.log_history), default=0.0)
        seconds = self._before + begun - self._started - self._validating
        scored = {"seconds": round(seconds, 1), **self.score(self.model)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scored.items()}
        self._validating += time.perf_counter() - begun
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        super()._save_checkpoint(*args, **options)
        if self.is_world_process_zero():
            (Path(self._get_output_dir(None)) / f"checkpoint-{self.state.global_step}" / COMPLETE).touch()


def make_trainer(config: RunConfig, out: Path, quiet: bool, **options: Any) -> RecommenderTrainer:
    """A trainer by the options of a run.

    Args:
        out: the folder of the run.
        quiet: no progress bar.
        options: of `RecommenderTrainer`, aside from `config` and `args`.
    """
    with _environment_of_precision(config.precision):
        return RecommenderTrainer(config=config, args=_training_arguments(config, out, quiet), **options)


@contextmanager
def _environment_of_precision(precision: str) -> Iterator[None]:
    """While a Trainer is built the options decide its precision, not ACCELERATE_MIXED_PRECISION, which is put back.

    transformers 4.57 also writes it for bfloat16, so that the next Trainer of the process would take it from there.
    """
    name, outside = "ACCELERATE_MIXED_PRECISION", os.environ.get("ACCELERATE_MIXED_PRECISION")
    os.environ[name] = {"float32": "no", "bfloat16": "bf16"}[precision]
    try:
        yield
    finally:
        if outside is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = outside


def _training_arguments(config: RunConfig, out: Path, quiet: bool) -> TrainingArguments:
    """The options as transformers names them."""
    return TrainingArguments(
        str(out),
        max_steps=config.steps,
        per_device_train_batch_size=1,  # the stream gives whole batches
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant_with_warmup" if config.schedule == "constant" else config.schedule,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.precision == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=config.log_every,
        eval_strategy="steps",
        eval_steps=config.eval_every,
        save_strategy="steps",
        save_steps=config.eval_every,
        save_total_limit=2,
        load_best_model_at_end=config.keep_best,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        report_to=[],
        seed=config.seed,
        data_seed=config.seed,
        remove_unused_columns=False,
        disable_tqdm=quiet,
        dataloader_pin_memory=False,
        log_level_replica="error",
    )


class _Progress(ProgressCallback):
    """A bar with the last loss, in place of a line of text for each."""

    def on_log(self, args, state, control, logs=None, **options) -> None:
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {name: f"{logs[name]:.3f}" for name in ("loss", "eval_loss") if name in logs}
            self.training_bar.set_postfix(shown, refresh=False)


class StopAt(TrainerCallback):
    """Stops a run after some steps as a kill would, but between two of them; the schedule is that of the whole run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **options):
        control.should_training_stop = state.global_step >= self.step
        return control


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is complete; those that a kill has cut short are removed."""
    complete = []
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / COMPLETE).is_file():
            complete.append(checkpoint)
        elif checkpoint.is_dir():
            shutil.rmtree(checkpoint)
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


def score_examples(model: nn.Module, examples: Examples, tokens: Tokens) -> dict[str, float]:
    """Cross-entropy of a whole SID in nats, and accuracy and cross-entropy of each level."""
    scored = teacher_forced(model, examples, tokens)
    figures = {"loss": float(scored.loss.sum(1).mean())}
    for level, (accuracy, loss) in enumerate(zip(scored.accuracy, scored.loss.mean(0), strict=True), start=1):
        figures[f"accuracy_{level}"], figures[f"loss_{level}"] = accuracy, float(loss)
    return figures


def _curves(history: list[dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """What a Trainer has logged: training losses, and validations, by step."""
    losses = [{"step": row["step"], "loss": row["loss"]} for row in history if "loss" in row]
    validations = [
        {"step": row["step"], **{name.removeprefix("eval_"): value for name, value in row.items() if "eval_" in name}}
        for row in history
        if "eval_loss" in row
    ]
    return {"training": losses, "validation": validations}


def _best_step(history: list[dict[str, Any]]) -> int | None:
    """The step of the lowest validation loss."""
    rows = [row for row in history if "eval_loss" in row]
    return min(rows, key=lambda row: row["eval_loss"])["step"] if rows else None


def _parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters, of the model and of the encoder in it."""
    encoders = [module for module in model.modules() if isinstance(module, (PrefixMem, SIDTransformer))]
    encoder = sum(p.numel() for module in encoders for p in module.parameters())
    return {"model": sum(p.numel() for p in model.parameters()) - encoder, "encoder": encoder}
