"""transformers' Trainer for next-item models: TF-L as its evaluation, and checkpoints in the folder of a run."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..._progress import on_a_terminal, say
from ...distributed import replicate
from ...encoder import PrefixMem, PrefixMemory, SIDTransformer
from ..data import Examples, Tokens
from ..evaluation.teacher_forcing import teacher_forced
from .arms import optimizer_for
from .config import MEMORY_ARMS, RunConfig
from .folder import RunFolder
from .session import process_count


class DivergedError(ArithmeticError):
    """A loss is not finite, so the run has stopped; the message gives the step and what to try."""


class RecommenderTrainer(Trainer):
    """Trains on a numbered stream of sequences, in its order, and validates by `score`.

    Args:
        config: options of the run.
        folder: of the run; checkpoints go there.
        quiet: show no progress.
        score: gives the loss and other figures of a model on the validation examples.
        options: of `Trainer`.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        folder: RunFolder,
        quiet: bool,
        score: Callable[[nn.Module], dict[str, float]],
        **options: Any,
    ) -> None:
        super().__init__(optimizers=(optimizer_for(options["model"], config), None), **options)
        self.config, self.folder, self.score = config, folder, score
        self._validating = 0.0  # seconds of this session
        self._before: float | None = None  # seconds of training in earlier ones
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(_PlaceOfBest(folder.path))
        self.add_callback(_LastLoss())
        if not quiet:
            self.add_callback(_Progress() if on_a_terminal() else _Lines())
        if config.patience:
            self.add_callback(EarlyStoppingCallback(config.patience))
        if config.restart_rows:
            self.add_callback(_RestartRows(config.restart_rows, config.seed))

    def run(self) -> dict[str, Any]:
        """Train from the last whole checkpoint, or from the start where there is none, and report."""
        self._started = time.perf_counter()
        checkpoint = self.folder.last_checkpoint()
        self._loaded_step = None
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return {
            "steps": self.state.global_step,
            "best_step": _best_step(self.state.log_history),
            "model_step": self._loaded_step or self.state.global_step,
            "seconds": max((row.get("eval_seconds", 0.0) for row in self.state.log_history), default=0.0),
            "parameters": _parameters(self.model),
            **_curves(self.state.log_history),
        }

    def create_scheduler(self, *args: Any, **options: Any) -> Any:
        scheduler = super().create_scheduler(*args, **options)
        if self.config.history_lr is not None:
            warmup = max(self.config.warmup_steps, 1)
            across = {id(memory.weight) for memory in cross_item_memories(self.model)}
            for i, group in enumerate(self.optimizer.param_groups):
                if across.issuperset(map(id, group["params"])):
                    scheduler.lr_lambdas[i] = lambda step: min(step / warmup, 1.0)
        return scheduler

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
        self._check_finite("validation loss", scored["loss"])
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scored.items()}
        self._validating += time.perf_counter() - begun
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Log figures; a training loss that is not finite stops the run before anything is saved of it."""
        if "loss" in logs:
            self._check_finite("training loss", logs["loss"])
        super().log(logs, *args, **options)

    def _check_finite(self, name: str, loss: float) -> None:
        if not math.isfinite(loss):
            rows = [row for row in self.state.log_history if "loss" in row]
            before = f", after {rows[-1]['loss']:.4g} at step {rows[-1]['step']}" if rows else ""
            rate = max(self.lr_scheduler.get_last_lr())
            clip = "a smaller max_grad_norm" if self.config.max_grad_norm else "a max_grad_norm of 1"
            raise DivergedError(
                f"the run diverged: at step {self.state.global_step} the {name} is {loss}{before}, at learning "
                f"rates up to {rate:.3g}; try a lower learning_rate or encoder_lr_multiple, more warmup_steps, or "
                f"{clip}; what was saved before stays in {self.folder.path}"
            )

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        if self.is_world_process_zero():
            self.folder.begin_checkpoint(self.state.global_step)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(*args, **options)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            self.folder.end_checkpoint(self.state.global_step)
            self.folder.rotate(self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()  # the best checkpoint is read next, where this was the last one

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        problem = self.folder.problem_of(best)
        if problem is None:
            super()._load_best_model()
            self._loaded_step = int(best.name.rpartition("-")[2])
        else:
            warnings.warn(f"{problem}; the last model is kept in place of the best one", stacklevel=2)


def make_trainer(config: RunConfig, folder: RunFolder, **options: Any) -> RecommenderTrainer:
    """A trainer by the options of a run.

    Args:
        options: of `RecommenderTrainer`, aside from `config`, `folder` and `args`.
    """
    with _environment_of_precision(config.precision):
        arguments = _training_arguments(config, folder.path)  # initialises torch.distributed under torchrun
        if process_count() > 1 and config.grad != "dense" and config.arm in MEMORY_ARMS:
            replicate(options["model"])
        return RecommenderTrainer(config=config, folder=folder, args=arguments, **options)


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


def _training_arguments(config: RunConfig, out: Path) -> TrainingArguments:
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
        logging_nan_inf_filter=False,  # it would log a loss that is not finite as 0
        load_best_model_at_end=config.keep_best,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        report_to=[],
        seed=config.seed,
        data_seed=config.seed,
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        log_level_replica="error",
    )


class _Progress(ProgressCallback):
    """A bar with the last loss, in place of a line of text for each."""

    def on_log(self, args, state, control, logs=None, **options) -> None:
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {name: f"{logs[name]:.3f}" for name in ("loss", "eval_loss") if name in logs}
            self.training_bar.set_postfix(shown, refresh=False)


class _Lines(TrainerCallback):
    """A line for each validation, where there is no terminal to draw a bar on."""

    def on_evaluate(self, args, state, control, metrics=None, **options) -> None:
        if state.is_world_process_zero:
            losses = [row["loss"] for row in state.log_history if "loss" in row]
            training = f"training loss {losses[-1]:.3f}, " if losses else ""
            step = f"step {state.global_step} of {state.max_steps}"
            say(f"{step}: {training}validation loss {metrics['eval_loss']:.3f}")


def cross_item_memories(model: nn.Module) -> list[PrefixMemory]:
    return [module for module in model.modules() if isinstance(module, PrefixMemory) and module.config.spec.history]


class _RestartRows(TrainerCallback):
    """Starts the tables of cross-item orders anew every `steps` steps, their optimizer's state with them.

    Most transitions occur once. A row that was trained on one knows the target when it comes again, and a model that
    reads such rows trusts them more than those of transitions to come deserve. In the first epoch no row knows what it
    will be asked: so every epoch is made a first one (Fan et al., "Multi-Epoch Learning for Deep Click-Through Rate
    Prediction Models", 2023, arXiv 2305.19531).
    """

    def __init__(self, steps: int, seed: int) -> None:
        self.steps, self.seed = steps, seed

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **options):
        if not state.global_step or state.global_step % self.steps:
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1_000_003 + state.global_step)
            for memory in cross_item_memories(model):
                memory.reset_parameters()
                optimizer.state.pop(memory.weight, None)  # begun again at the next step


class _PlaceOfBest(TrainerCallback):
    """Finds the best checkpoint again in a run's folder that has another name since.

    By its step: transformers 5.24 forgets the place in a resumed run where nothing is there any more.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_begin(self, args, state, control, **options) -> None:
        if state.best_global_step is not None:
            state.best_model_checkpoint = str(self.folder / f"checkpoint-{state.best_global_step}")


class _LastLoss(TrainerCallback):
    """Logs the loss up to the last step, so that the last steps are checked before their model is saved."""

    def on_step_end(self, args, state, control, **options):
        control.should_log |= state.global_step >= state.max_steps
        return control


class StopAt(TrainerCallback):
    """Stops a run after some steps as a kill would, but between two of them; the schedule is that of the whole run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **options):
        control.should_training_stop = state.global_step >= self.step
        return control


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
    encoder = sum(p.numel() for p in {p for module in encoders for p in module.parameters()})
    return {"model": sum(p.numel() for p in model.parameters()) - encoder, "encoder": encoder}
