"""A run from options to folder and back: what is written, what is refused, and that a kill changes nothing."""

import json
import multiprocessing
import os
import random
import signal
import time
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from prefixmem_fast import PrefixMem, PrefixMemory
from prefixmem_fast.encoder import SIDTransformer
from prefixmem_fast.recommender.evaluation.teacher_forcing import teacher_forced
from prefixmem_fast.recommender.training import classification, trainer
from prefixmem_fast.recommender.training import run as runs
from prefixmem_fast.recommender.training.folder import MARKER
from prefixmem_fast.recommender.training.trainer import DivergedError
from tests.helpers.cases import mostly_slow
from tests.helpers.runs import TINY_T5, options

train = runs.train


def losses(report):
    return [(row["step"], row["loss"]) for row in report["training"]]


def validations(report):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in report["validation"]]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


ARMS = [
    {"arm": "plain"},
    {"arm": "prefixmem"},
    {"arm": "prefixmem", "grad": "dense"},
    {"arm": "prefixmem", "grad": "fused", "max_grad_norm": 0.0, "row_optimizer": "lazy-adam"},
    {"arm": "prefixmem", "memory_dropout": 0.5, "row_weight_decay": 0.1, "muon_lr": 0.02, "precision": "bfloat16"},
    {"history": 2, "history_codes": [2, 3], "history_rows": 60, "history_dim": 8, "history_lr": 0.1, "restart_rows": 2},
    {
        "arm": "cross-item",
        "grad": "fused",
        "max_grad_norm": 0.0,
        "history_rows": 60,
        "history_dim": 8,
        "restart_rows": 4,
    },
    {"arm": "sid-transformer"},
    {"model": "tiger", "model_options": TINY_T5},
    {"pack": 3, "interleaved": 1.0, "pairs": 0.5},
    {"model": "tiger", "model_options": TINY_T5, "interleaved": 1.0, "pairs": 1.0, "precision": "bfloat16"},
]


@pytest.mark.parametrize("changes", ARMS, ids=lambda c: "-".join(map(str, c.values()))[:40].replace(" ", ""))
def test_arms_train_stop_resume_and_load(tmp_path, changes):
    config = options(tmp_path, **changes)
    whole = train(config, tmp_path / "whole", quiet=True)
    train(config, tmp_path / "halves", quiet=True, stop_at=5)
    halves = train(config, tmp_path / "halves", quiet=True, resume=True)
    assert losses(whole) == losses(halves)
    assert validations(whole) == validations(halves)
    assert [step for step, _ in losses(whole)] == list(range(1, 9))
    assert whole["training"][-1]["loss"] < whole["training"][0]["loss"]

    loaded = runs.load_run(tmp_path / "whole")
    kind = {"plain": type(None), "sid-transformer": SIDTransformer}.get(config.arm, PrefixMem)
    assert isinstance(getattr(loaded.model, "prefixmem", None), kind)
    best = next(row for row in whole["validation"] if row["step"] == whole["best_step"])
    examples = loaded.data.split.validation.last(config.max_items)
    scored = teacher_forced(loaded.model, examples, loaded.tokens)
    # bfloat16 was the arithmetic of training alone.
    close = {"abs": 0.05} if config.precision == "bfloat16" else {"rel": 1e-5}
    assert float(scored.loss.sum(1).mean()) == pytest.approx(best["loss"], **close)


def _train_in_child(config, out, resume):
    torch.set_num_threads(1)
    train(config, out, quiet=True, resume=resume)


@pytest.mark.slow
def test_five_kills_at_random_moments_change_nothing(tmp_path):
    across = {"history": 1, "history_rows": 60, "history_dim": 8, "history_lr": 0.1, "restart_rows": 3}
    config = options(tmp_path, steps=150, eval_every=3, eval_users=20, memory_dropout=0.5, **across)
    whole = train(config, tmp_path / "whole", quiet=True)
    out = tmp_path / "killed"
    # A fork of this process would inherit the threads of autograd, which other tests may have started.
    context, moments = multiprocessing.get_context("forkserver"), random.Random(0)
    context.set_forkserver_preload(["prefixmem_fast.recommender.training.trainer"])
    kills = 0
    for _ in range(20):
        if kills == 5:
            break
        child = context.Process(target=_train_in_child, args=(config, out, (out / MARKER).is_file()))
        child.start()
        seen = last_seen(out)
        while child.is_alive() and last_seen(out) <= seen + 2:  # some progress, then any moment
            time.sleep(0.01)
        time.sleep(moments.random() * 0.3)
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += child.exitcode == -signal.SIGKILL
    assert kills == 5
    report = train(config, out, quiet=True, resume=True)
    assert losses(report) == losses(whole)
    assert validations(report) == validations(whole)
    for file in ("model.safetensors", "tokenizer.json", "sid_vocabulary.json"):
        assert (out / runs.MODEL / file).read_bytes() == (tmp_path / "whole" / runs.MODEL / file).read_bytes()


def last_seen(out):
    """The step of the newest whole checkpoint."""
    marks = [path for path in out.glob(f"checkpoint-*/{MARKER}") if '"files"' in path.read_text()]
    return max((int(path.parent.name[11:]) for path in marks), default=0)


@pytest.mark.parametrize(
    ("damage", "cut"),
    mostly_slow(
        lambda damage, cut: (damage == "optimizer.pt") == cut and damage != "model.safetensors",
        ["optimizer.pt", "rng_state.pth", "model.safetensors", "prefixmem/config.json"],
        [True, False],
    ),
)
def test_a_damaged_checkpoint_is_named_and_the_curves_stay(tmp_path, damage, cut):
    config = options(tmp_path, steps=8, eval_every=2, memory_dropout=0.5)
    whole = train(config, tmp_path / "whole", quiet=True)
    train(config, tmp_path / "hurt", quiet=True, stop_at=6)
    file = tmp_path / "hurt" / "checkpoint-6" / damage
    content = file.read_bytes()
    file.write_bytes(content[:-10]) if cut else file.unlink()
    with pytest.warns(UserWarning, match=rf"checkpoint-6.*{damage}.*; going on from checkpoint-4"):
        report = train(config, tmp_path / "hurt", quiet=True, resume=True)
    assert losses(report) == losses(whole)
    assert validations(report) == validations(whole)


def test_no_sound_checkpoint_stops_a_resumed_run(tmp_path):
    config = options(tmp_path)
    train(config, tmp_path / "run", quiet=True, stop_at=4)
    (tmp_path / "run" / "checkpoint-4" / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-4 lacks scheduler\.pt; no sound checkpoint is left"):
        train(config, tmp_path / "run", quiet=True, resume=True)


OVERFITS = {"learning_rate": 1.0, "schedule": "constant", "warmup_steps": 4, "max_grad_norm": 0.0}


def test_a_damaged_best_checkpoint_is_said(tmp_path):
    config = options(tmp_path, steps=12, eval_every=2, **OVERFITS)
    best = train(config, tmp_path / "whole", quiet=True)["best_step"]
    assert best < 8  # the rotation has kept it
    train(config, tmp_path / "run", quiet=True, stop_at=10)
    (tmp_path / "run" / f"checkpoint-{best}" / "model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match=rf"checkpoint-{best}.*; the last model is kept in place of the best one"):
        report = train(config, tmp_path / "run", quiet=True, resume=True)
    assert (report["best_step"], report["model_step"]) == (best, 12)


@pytest.mark.parametrize("stop_at", [8, 12])
def test_a_run_goes_on_in_a_folder_that_has_moved(tmp_path, monkeypatch, stop_at):
    """Its best checkpoint and its files are found, from another directory; after the last step none is saved again."""
    config = options(tmp_path, steps=12, eval_every=2, **OVERFITS)
    whole = train(config, tmp_path / "whole", quiet=True)
    monkeypatch.chdir(tmp_path)
    train(config, "run", quiet=True, stop_at=stop_at)
    (tmp_path / "away").mkdir()
    (tmp_path / "run").rename(tmp_path / "away" / "again")
    monkeypatch.chdir(tmp_path / "away")
    report = train(config, "again", quiet=True, resume=True)
    assert losses(report) == losses(whole)
    assert report["model_step"] == report["best_step"] == whole["best_step"] < 8
    weights = (tmp_path / place / "model" / "model.safetensors" for place in ("whole", "away/again"))
    assert len({file.read_bytes() for file in weights}) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e9, "max_grad_norm": 0.0, "eval_every": 1}, "validation loss is nan, after"),
        ({"learning_rate": 1e9, "max_grad_norm": 0.0, "eval_every": 8, "keep_best": False}, "training loss is nan"),
        # fewer steps than are between two losses
        (
            {"learning_rate": 1e9, "max_grad_norm": 0.0, "log_every": 10, "eval_every": 10, "keep_best": False},
            "training loss is nan",
        ),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, changes, message):
    config = options(tmp_path, warmup_steps=0, schedule="constant", **changes)
    with pytest.raises(
        DivergedError, match=rf"at step \d+ the {message}.*rates up to 5e\+09; try a lower learning_rate"
    ):
        train(config, tmp_path / "run", quiet=True)
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        history = json.loads((folder / "trainer_state.json").read_text(), parse_constant=pytest.fail)["log_history"]
        assert all(row.get("loss", 1) > 0 for row in history)
    assert not (tmp_path / "run" / runs.MODEL).exists()


def test_seconds_are_those_of_training_in_all_sessions(tmp_path, monkeypatch):
    """By a clock of which each reading takes ten seconds: two around each validation, one at the start."""
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=count(0, 10).__next__))
    config = options(tmp_path)
    whole = train(config, tmp_path / "whole", quiet=True)
    assert [row["seconds"] for row in whole["validation"]] == [10, 20]
    train(config, tmp_path / "halves", quiet=True, stop_at=5)
    halves = train(config, tmp_path / "halves", quiet=True, resume=True)
    assert [row["seconds"] for row in halves["validation"]] == [10, 20]
    assert halves["seconds"] == 20


def test_a_finished_run_is_not_done_again(tmp_path, monkeypatch):
    config = options(tmp_path)
    report = train(config, tmp_path / "run", quiet=True)
    weights = tmp_path / "run" / runs.MODEL / "model.safetensors"
    written = weights.stat().st_mtime_ns, weights.stat().st_ino
    monkeypatch.setattr(runs, "prepare", pytest.fail)
    assert train(config, tmp_path / "run", quiet=True, resume=True) == report
    assert (weights.stat().st_mtime_ns, weights.stat().st_ino) == written


def test_a_kill_before_the_model_is_whole(tmp_path, monkeypatch):
    config = options(tmp_path)
    save = runs.save_model

    def killed(run, folder):
        save(run, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "save_model", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / runs.MODEL).exists()
    monkeypatch.setattr(runs, "save_model", save)
    train(config, tmp_path / "run", quiet=True, resume=True)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"run.json", "config.yaml", "curves.json", "model", "checkpoint-4", "checkpoint-8"}


def test_foreign_folders_stay(tmp_path):
    config = options(tmp_path, steps=12, eval_every=2)
    train(config, tmp_path / "run", quiet=True, stop_at=2)
    mine = [tmp_path / "run" / name for name in ("checkpoint-500", "checkpoint-mine", "checkpoint-1", "notes")]
    for folder in mine:
        folder.mkdir()
        (folder / "thesis").write_text("x")
    train(config, tmp_path / "run", quiet=True, resume=True)
    assert all((folder / "thesis").read_text() == "x" for folder in mine)


def test_changed_data_are_refused(tmp_path):
    config = options(tmp_path)
    train(config, tmp_path / "run", quiet=True, stop_at=4)
    train(config, tmp_path / "done", quiet=True)
    index = tmp_path / "items.index.json"
    codes = json.loads(index.read_text())
    index.write_text(json.dumps(dict(zip(codes, [*list(codes.values())[1:], codes["item 0"]], strict=True))))
    with pytest.raises(ValueError, match=r"items .* is not what the run in .* was trained with: its SHA-256 is"):
        train(config, tmp_path / "run", quiet=True, resume=True)
    with pytest.raises(ValueError, match=r"items .* is not what the run in .* was trained with: its SHA-256 is"):
        runs.load_run(tmp_path / "done")


def test_a_pre_training_run_is_not_evaluated(tmp_path):
    classification.pretrain(options(tmp_path, model_options=None), tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match="pre-trained an encoder alone, so there is no model to evaluate"):
        runs.load_run(tmp_path / "run")
    with pytest.raises(ValueError, match="was started by prefixmem pretrain --method classification"):
        train(options(tmp_path, model_options=None), tmp_path / "run", quiet=True, resume=True)


def test_early_stopping_and_the_best_model(tmp_path):
    config = options(tmp_path, steps=40, eval_every=2, learning_rate=0.3, patience=2, schedule="constant")
    report = train(config, tmp_path / "run", quiet=True)
    assert report["steps"] < 40
    rows = {row["step"]: row["loss"] for row in report["validation"]}
    assert report["best_step"] == min(rows, key=rows.get) == report["steps"] - 4


def test_pre_trained_tables_start_the_encoder_with_a_fresh_projection(tmp_path):
    config = options(tmp_path)
    train(config, tmp_path / "first", quiet=True)
    first = PrefixMem.from_pretrained(tmp_path / "first" / runs.MODEL)
    again = config.replace(encoder=str(tmp_path / "first" / runs.MODEL), active_levels=[1])
    made = runs.prepare(again, runs.load_data(again))
    from prefixmem_fast.recommender.training.arms import add_arm

    add_arm(made.model, again, made.vocabulary)
    encoder = made.model.prefixmem
    assert torch.equal(encoder.memory.weight, first.memory.weight)
    assert encoder.config.spec.active_levels == (1,)
    assert not torch.equal(encoder.out_proj.weight, first.out_proj.weight)
    assert encoder.out_proj.weight.std() < 2e-3


def test_a_saved_model_trains_on_and_its_tokens_are_recognised(tmp_path):
    config = options(tmp_path, arm="plain")
    train(config, tmp_path / "first", quiet=True)
    folder = str(tmp_path / "first" / runs.MODEL)
    again = runs.prepare(config.replace(model=folder, model_options=None), runs.load_data(config))
    first = runs.load_run(tmp_path / "first")
    assert again.vocabulary == first.vocabulary
    assert len(again.tokenizer) == len(first.tokenizer)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_the_resolved_options_and_the_curves_are_saved(tmp_path):
    config = options(tmp_path)
    report = train(config, tmp_path / "run", quiet=True)
    from prefixmem_fast.recommender.training.config import RunConfig, read_options

    assert RunConfig(**read_options(tmp_path / "run" / "config.yaml")) == config
    assert json.loads((tmp_path / "run" / "curves.json").read_text()) == report
    seconds = [row["seconds"] for row in report["validation"]]
    assert seconds == sorted(seconds)
    assert report["parameters"]["encoder"] == sum(
        p.numel() for p in runs.load_run(tmp_path / "run").model.prefixmem.parameters()
    )


def refused(tmp_path, match, *, error=ValueError, out="run", resume=False, **changes):
    with pytest.raises(error, match=match):
        train(options(tmp_path, **changes), tmp_path / out, quiet=True, resume=resume)
    assert not list(tmp_path.glob(f"{out}/checkpoint-*"))


def test_wrong_options_stop_before_any_training(tmp_path):
    refused(tmp_path, "max_items = 90 .* need 274 positions, the model has 256", max_items=90)
    refused(tmp_path, "pack = 2: an encoder-decoder", model="tiger", model_options=TINY_T5, pack=2)
    refused(tmp_path, "model = {'hidden_size': 3} has no model_type", model={"hidden_size": 3})
    refused(tmp_path, "transformers refuses its configuration", model={"model_type": "nothing"})
    refused(tmp_path, "model .*none.json is not there", error=FileNotFoundError, model=str(tmp_path / "none.json"))
    refused(tmp_path, "holds no run: run.json is not there", error=FileNotFoundError, resume=True)
    refused(tmp_path, "encoder .* is no folder|is no folder", error=FileNotFoundError, encoder=str(tmp_path / "no"))
    refused(tmp_path, "'interleaved' need the text", text=None, interleaved=1.0)
    refused(tmp_path, "active_levels", active_levels=[4])


def test_a_run_is_not_overwritten_and_keeps_its_options(tmp_path):
    config = options(tmp_path)
    train(config, tmp_path / "run", quiet=True, stop_at=4)
    with pytest.raises(ValueError, match="holds a run already; --resume"):
        train(config, tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match=r"learning_rate = 0\.5, and the run in .* was started with 0\.01"):
        train(config.replace(learning_rate=0.5), tmp_path / "run", quiet=True, resume=True)
    with pytest.raises(FileNotFoundError, match="has not finished"):
        runs.load_run(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"holds no run"):
        runs.load_run(tmp_path)


def test_encoders_of_other_codebooks_are_refused(tmp_path):
    config = options(tmp_path)
    train(config, tmp_path / "first", quiet=True)
    folder = str(tmp_path / "first" / runs.MODEL)
    refused(tmp_path, r"codebook_sizes \(6, 6, 6\), the index \(9, 9, 9\)", encoder=folder, codebook_sizes=[9, 9, 9])


def test_the_options_say_the_precision(tmp_path, monkeypatch):
    """Not the environment, in which an earlier run of the process or a launcher may have left another."""
    found = []
    for name, left in (("first", "no"), ("again", "bf16")):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", left)
        found.append(losses(train(options(tmp_path), tmp_path / name, quiet=True)))
        assert os.environ["ACCELERATE_MIXED_PRECISION"] == left
    assert found[0] == found[1]
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    rounded = losses(train(options(tmp_path, precision="bfloat16"), tmp_path / "rounded", quiet=True))
    assert "ACCELERATE_MIXED_PRECISION" not in os.environ
    assert rounded != found[0]
    assert losses(train(options(tmp_path), tmp_path / "last", quiet=True)) == found[0]


def test_training_sees_neither_validation_nor_test_items(tmp_path):
    config = options(tmp_path)
    run = runs.prepare(config, runs.load_data(config))
    stream, _ = runs.stream_of(run)
    split = run.data.split
    trained = {tuple(run.tokens.history(items[-5:])) for items in split.train.items}
    for row in (row for i in range(8) for row in stream[i]):
        assert tuple(row["input_ids"][1:].tolist()) in trained or len(row["input_ids"]) == 1 + 3 * config.max_items
    assert all(len(a) + 2 == len(b) + 1 for a, b in zip(split.train.items, split.test.histories, strict=True))
    assert np.all(split.test.targets >= 0)


def test_cross_item_tables_start_anew_and_the_others_stay(tmp_path, monkeypatch):
    across = {"history": 2, "history_rows": 300, "history_dim": 8, "batch_size": 4, "weight_decay": 0.1}
    config = options(tmp_path, steps=8, eval_every=4, keep_best=False, **across)
    begin, seen = trainer._RestartRows.on_step_begin, {}

    def watched(self, args, state, control, model=None, optimizer=None, **others):
        memories = [module for module in model.modules() if isinstance(module, PrefixMemory)]
        before = [memory.weight.detach().clone() for memory in memories]
        begin(self, args, state, control, model=model, optimizer=optimizer, **others)
        for memory, weight in zip(memories, before, strict=True):
            kept = torch.equal(memory.weight, weight), memory.weight in optimizer.state
            seen[state.global_step, memory.config.spec.history] = kept

    monkeypatch.setattr(trainer._RestartRows, "on_step_begin", watched)
    filled = {}
    for name, every in (("kept", 0), ("restarted", 4)):
        report = train(config.replace(restart_rows=every), tmp_path / name, quiet=True)
        found = PrefixMem.from_pretrained(tmp_path / name / runs.MODEL)
        assert (found.config.cross_item.lags, found.cross_item.cross_item) == (2, None)
        assert report["parameters"]["encoder"] == sum(p.numel() for p in found.parameters())
        filled[name] = [int(one.memory.weight.any(1).sum()) for one in (found, found.cross_item)]
    assert filled["restarted"][0] == filled["kept"][0]  # of random numbers at the start, all of them
    assert 0 < filled["restarted"][1] < 0.8 * filled["kept"][1]  # half of the steps
    assert [seen[4, back] for back in (0, 1)] == [(True, True), (False, False)]
    assert all(kept == (True, True) for (step, _), kept in seen.items() if step not in (0, 4))


def test_the_rate_of_rows_stays_where_the_others_fall(tmp_path, monkeypatch):
    rates = []
    monkeypatch.setattr(
        trainer.StopAt,
        "on_step_end",
        lambda self, args, state, control, optimizer=None, **_: rates.append([g["lr"] for g in optimizer.param_groups]),
    )
    config = options(tmp_path, history=1, history_rows=60, history_dim=8, history_lr=0.3, warmup_steps=2)
    train(config, tmp_path / "run", quiet=True, stop_at=10**6)
    first, *_, last = rates
    assert first[1] == pytest.approx(0.15)
    assert last[1] == 0.3  # of the cross-item tables alone
    del first[1], last[1]
    assert max(last) < 0.1 * max(first + rates[2])
    with pytest.raises(ValueError, match=r"history_lr = 0\.3 with grad = 'dense'"):
        config.replace(grad="dense")
    with pytest.raises(ValueError, match=r"history_codes = \[0\]; give numbers of 1 or more"):
        config.replace(history_codes=[0])
    with pytest.raises(ValueError, match=r"history_codes = \[2, 4\], and a Semantic ID has 3 codes"):
        train(config.replace(history_codes=[2, 4]), tmp_path / "other", quiet=True)
    with pytest.raises(ValueError, match="eval_every = 4 is no multiple of restart_rows = 3"):
        config.replace(restart_rows=3)
