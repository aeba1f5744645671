"""pretrain, train, evaluate and demo as a user calls them."""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch

from prefixmem_fast import PrefixMem
from prefixmem_fast.cli import main
from prefixmem_fast.cli.train import check_libraries
from prefixmem_fast.recommender.data import synthetic
from tests.helpers.runs import TINY, TINY_T5, write_files


@pytest.fixture
def flags(tmp_path):
    """Flags of a small run, without --out."""
    files = write_files(tmp_path)
    return [
        "--items",
        files["items"],
        "--interactions",
        *files["interactions"],
        "--steps",
        "8",
        "--batch-size",
        "8",
        "--log-every",
        "1",
        "--eval-every",
        "4",
        "--warmup-steps",
        "2",
        "--table-rows",
        "50",
        "--memory-dim",
        "8",
        "--heads",
        "2",
        "--max-items",
        "5",
        "--learning-rate",
        "1e-2",
    ]


TINY_FLAGS = ["--model-options", json.dumps(TINY)]


def run(capsys, *arguments):
    torch.set_num_threads(1)
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("method", "more"),
    [("classification", []), ("tiger", ["--model-options", json.dumps(TINY_T5)]), ("lm", TINY_FLAGS)],
    ids=["classification", "tiger", "lm"],
)
def test_pretrain_then_train_then_evaluate(tmp_path, flags, capsys, method, more):
    first, second = tmp_path / "first", tmp_path / "second"
    code, out, _ = run(capsys, "pretrain", "--method", method, *flags, *more, "--out", first)
    assert code == 0
    assert f"--encoder {first / 'encoder'}" in out
    tables = PrefixMem.from_pretrained(first / "encoder").memory.weight

    code, out, _ = run(
        capsys,
        "train",
        *flags,
        *TINY_FLAGS,
        "--encoder",
        first / "encoder",
        "--encoder-lr-multiple",
        0,
        "--keep-best",
        "--out",
        second,
    )
    assert code == 0
    assert "level 3" in out
    trained = PrefixMem.from_pretrained(second / "model")
    assert torch.equal(trained.memory.weight, tables)  # a rate of 0 leaves what pre-training gave

    code, out, _ = run(capsys, "evaluate", "--run", second, "--beams", "10")
    assert code == 0
    for line in (
        "teacher-forced accuracy",
        "count table",
        "constrained",
        "unconstrained",
        "markov",
        "popularity",
        "rare",
    ):
        assert line in out
    report = json.loads((second / "test.beams-10.json").read_text())
    assert report["examples"] == 80
    assert report["searches"]["constrained"]["hit_rate"] == [1.0, 1.0, 1.0]


def test_resume_needs_nothing_but_the_folder(tmp_path, flags, capsys):
    arguments = [*flags, *TINY_FLAGS, "--out", tmp_path / "run"]
    assert run(capsys, "train", *arguments)[0] == 0
    code, _, error = run(capsys, "train", *arguments)
    assert code == 2
    assert "holds a run already; --resume" in error
    code, out, _ = run(capsys, "train", "--out", tmp_path / "run", "--resume", "--json")
    assert code == 0
    assert json.loads(out)["steps"] == 8


def torchrun(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + ["-m", "prefixmem_fast.cli", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def same_curves(two, one):
    for curve, name in (("validation", "loss"), ("training", "loss"), ("validation", "accuracy_3")):
        assert [row[name] for row in two[curve]] == pytest.approx([row[name] for row in one[curve]], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("grad", ["dense", "sparse", "fused"])
def test_two_processes_of_torchrun_are_two_batches_a_step(tmp_path, flags, capsys, grad):
    """Every process takes the next batch of the stream, so two of them are an accumulation of two."""
    still = json.dumps({**TINY, "embd_pdrop": 0.0, "resid_pdrop": 0.0})
    arguments = [*flags, "--model-options", still, "--max-grad-norm", "0"]
    alone = [*arguments, "--accumulation", "2", "--grad", "sparse" if grad == "fused" else grad]
    one = run(capsys, "train", *alone, "--out", tmp_path / "alone", "--json")
    assert one[0] == 0
    done = torchrun("train", *arguments, "--grad", grad, "--out", tmp_path / "two", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "missing keys" not in done.stderr  # replicas are quiet
    same_curves(json.loads(done.stdout), json.loads(one[1]))  # printed once
    assert (tmp_path / "two" / "model").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("grad", ["dense", "sparse"])
def test_two_processes_pretrain_an_encoder(tmp_path, flags, capsys, grad):
    arguments = ["pretrain", "--method", "classification", *flags, "--grad", grad, "--max-grad-norm", "0"]
    one = run(capsys, *arguments, "--accumulation", "2", "--out", tmp_path / "alone", "--json")
    assert one[0] == 0
    done = torchrun(*arguments, "--out", tmp_path / "two", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    same_curves(json.loads(done.stdout), json.loads(one[1]))
    assert (tmp_path / "two" / "encoder").is_dir()


@pytest.mark.parametrize("command", [["train"], ["pretrain", "--method", "lm"]])
def test_the_other_processes_print_and_save_nothing(tmp_path, flags, capsys, monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("prefixmem_fast.recommender.training.run.train", lambda *_, **__: {})
    assert run(capsys, *command, *flags, "--out", tmp_path / "run", "--json") == (0, "", "")
    assert not (tmp_path / "run").exists()


def test_a_file_and_flags(tmp_path, flags, capsys):
    (tmp_path / "run.yaml").write_text("learning_rate: 1e-3\narm: plain\nsteps: 4\n")
    code, _, _ = run(capsys, "train", "--config", tmp_path / "run.yaml", *flags, *TINY_FLAGS, "--out", tmp_path / "run")
    assert code == 0
    saved = (tmp_path / "run" / "config.yaml").read_text()
    assert "arm: plain" in saved
    assert "steps: 8" in saved  # the flag
    assert "learning_rate: 0.01" in saved


def test_groups_of_a_baseline(tmp_path, flags, capsys):
    for name, arm in (("plain", "plain"), ("with", "prefixmem")):
        run(capsys, "train", *flags, *TINY_FLAGS, "--arm", arm, "--out", tmp_path / name)
    missing = run(capsys, "evaluate", "--run", tmp_path / "with", "--baseline", tmp_path / "plain", "--beams", 4)
    assert missing[0] == 2
    assert "evaluate the baseline run first" in missing[2]
    assert run(capsys, "evaluate", "--run", tmp_path / "plain", "--beams", 4, "--search", "constrained")[0] == 0
    code, out, _ = run(capsys, "evaluate", "--run", tmp_path / "with", "--baseline", tmp_path / "plain", "--beams", 4)
    assert code == 0
    text = (tmp_path / "with" / "test.beams-4.baseline-plain.json").read_text()
    assert "NaN" not in text
    groups = json.loads(text)["reachable"]
    assert groups["reachable"]["examples"] + groups["unreachable"]["examples"] == 80
    assert "unreachable, " in out


def test_a_result_replaces_none_of_another_question(tmp_path, flags, capsys):
    run(capsys, "train", *flags, *TINY_FLAGS, "--out", tmp_path / "run")
    evaluate = functools.partial(run, capsys, "evaluate", "--run", tmp_path / "run")
    assert evaluate()[0] == 0
    full = (tmp_path / "run" / "test.json").read_text()
    for more, name in (
        (["--examples", 20], "test.examples-20"),
        (["--search", "constrained"], "test.search-constrained"),
        (["--beams", 4, "--examples", 20], "test.examples-20.beams-4"),
        (["--part", "validation"], "validation"),
        (["--examples", 80], "test"),  # all there are
    ):
        code, out, _ = evaluate(*more)
        assert code == 0
        assert out.splitlines()[-1] == f"written to {tmp_path / 'run' / name}.json"
        assert (tmp_path / "run" / f"{name}.json").is_file()
        assert (tmp_path / "run" / f"{name}.npz").is_file()
        if name != "test":
            assert (tmp_path / "run" / "test.json").read_text() == full
    for more in ([], ["--examples", 20]):  # a baseline has results of both
        assert evaluate("--baseline", tmp_path / "run", *more, "--search", "constrained")[0] == 0
    assert "is of other examples" in evaluate("--baseline", tmp_path / "run", "--examples", 7)[2]


def test_where_a_result_goes_is_checked_first(tmp_path, flags, capsys, monkeypatch):
    run(capsys, "train", *flags, *TINY_FLAGS, "--out", tmp_path / "run")
    assert run(capsys, "evaluate", "--run", tmp_path / "run", "--beams", 4, "--out", tmp_path / "results")[0] == 0
    assert {file.name for file in (tmp_path / "results").iterdir()} == {"test.beams-4.json", "test.beams-4.npz"}
    monkeypatch.setattr("prefixmem_fast.recommender.training.run.load_run", lambda _: pytest.fail("it was loaded"))
    code, _, error = run(capsys, "evaluate", "--run", tmp_path / "run", "--out", "/proc/results")
    assert code == 2
    assert "nothing can be written to /proc" in error


def test_files_of_others_are_no_results(tmp_path, flags, capsys):
    run(capsys, "train", *flags, *TINY_FLAGS, "--out", tmp_path / "run")
    for name in ("test.beams-4.json", "test.beams-4.npz"):
        mine = tmp_path / name.partition(".")[2] / name
        mine.parent.mkdir()
        mine.write_text('{"my": "data"}')
        code, _, error = run(capsys, "evaluate", "--run", tmp_path / "run", "--beams", 4, "--out", mine.parent)
        assert code == 2
        assert f"{mine} is there, and is no result of prefixmem evaluate; move it" in error
        assert mine.read_text() == '{"my": "data"}'


def test_a_model_that_is_not_what_was_trained(tmp_path, flags, capsys):
    for name in ("run", "other"):
        seed = ["--seed", "1"] if name == "other" else []
        run(capsys, "train", *flags, *TINY_FLAGS, *seed, "--arm", "plain", "--out", tmp_path / name)
    weights = tmp_path / "run" / "model" / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes((tmp_path / "other" / "model" / "model.safetensors").read_bytes())
    code, _, error = run(capsys, "evaluate", "--run", tmp_path / "run")
    assert code == 2
    assert "model.safetensors is damaged: its SHA-256 is another; bring the old files back" in error
    weights.write_bytes(before)
    options = tmp_path / "run" / "config.yaml"
    options.write_text(options.read_text().replace("max_items: 5", "max_items: 4"))
    assert "the options in" in run(capsys, "evaluate", "--run", tmp_path / "run")[2]


def test_a_misspelt_entry_of_model_options_is_said(tmp_path, flags, capsys):
    misspelt = json.dumps({**TINY, "n_emb": 8})
    code, _, error = run(capsys, "train", *flags, "--model-options", misspelt, "--out", tmp_path / "run", "--json")
    assert code == 0
    assert (
        error == "prefixmem train: warning: model_options: n_emb is no entry of a gpt2 configuration; n_embd is near\n"
    )


def test_runs_that_cannot_be_evaluated(tmp_path, flags, capsys):
    run(capsys, "pretrain", *flags, "--out", tmp_path / "first")
    code, _, error = run(capsys, "evaluate", "--run", tmp_path / "first")
    assert code == 2
    assert (
        f"pre-trained an encoder alone, so there is no model to evaluate; prefixmem train --encoder {tmp_path}" in error
    )
    code, _, error = run(capsys, "train", "--resume", "--out", tmp_path / "first")
    assert code == 2
    assert "was started by prefixmem pretrain --method classification" in error


def test_progress_off_a_terminal_is_lines(tmp_path, flags, capsys):
    code, _, error = run(capsys, "train", *flags, *TINY_FLAGS, "--out", tmp_path / "run")
    assert code == 0
    assert [line.split(":")[0] for line in error.splitlines()] == ["step 4 of 8", "step 8 of 8"]
    assert "\r" not in error
    assert run(capsys, "train", *flags, *TINY_FLAGS, "--out", tmp_path / "quiet", "--json")[2] == ""


def test_progress_on_a_terminal_is_a_bar(tmp_path, flags, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    error = run(capsys, "train", *flags, *TINY_FLAGS, "--out", tmp_path / "run")[2]
    assert "8/8" in error
    assert "step 4 of 8" not in error


def test_a_diverged_run(tmp_path, flags, capsys):
    rates = ["--learning-rate", "1e9", "--max-grad-norm", "0"]
    code, out, error = run(capsys, "train", *flags, *TINY_FLAGS, *rates, "--out", tmp_path / "run", "--json")
    assert (code, out) == (1, "")
    assert error.count("\n") == 1
    assert "the run diverged: at step" in error


def test_bleu_of_a_run_with_text(tmp_path, flags, capsys):
    text = write_files(tmp_path)["text"]
    assert run(capsys, "train", *flags, *TINY_FLAGS, "--text", text, "--pairs", 1, "--out", tmp_path / "run")[0] == 0
    code, out, _ = run(capsys, "evaluate", "--run", tmp_path / "run", "--beams", 4, "--bleu", 10)
    assert code == 0
    assert "BLEU, SID to text" in out
    assert 0 <= json.loads((tmp_path / "run" / "test.beams-4.bleu-10.json").read_text())["bleu"] <= 100


def test_checking_libraries_changes_nothing_and_a_command_is_quiet_for_itself(tmp_path, flags, capsys, monkeypatch):
    from transformers.utils import logging

    state = lambda: (logging.get_verbosity(), logging.is_progress_bar_enabled())  # noqa: E731
    logging.set_verbosity_warning()
    logging.enable_progress_bar()
    before, during = state(), []
    check_libraries()
    assert state() == before
    monkeypatch.setattr("prefixmem_fast.recommender.training.run.prepare", lambda *_: during.append(state()) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(capsys, "train", *flags, "--out", tmp_path / "run")
    assert during == [(logging.ERROR, False)]
    assert state() == before
    logging.set_verbosity_error()  # as tests.helpers.models does


def test_wrong_input_is_one_line(tmp_path, flags, capsys):
    index, histories = tmp_path / "items.index.json", tmp_path / "interactions.json"
    index.write_text(index.read_text().replace("<b_", "<c_", 1))
    code, _, error = run(capsys, "train", *flags, "--out", tmp_path / "run")
    assert code == 2
    assert len(error.splitlines()) == 1
    assert "items.index.json" in error
    assert "level 2" in error
    write_files(tmp_path)
    histories.write_text('{"user 0": ["item 0", "item 99"]}')
    code, _, error = run(capsys, "train", *flags, "--out", tmp_path / "run")
    assert code == 2
    assert "interactions.json: key 'user 0': item 'item 99' is not in the index" in error
    assert not (tmp_path / "run").exists()
    for arguments, message in (
        (["train", "--synthetic", "--steps", "many", "--out", "x"], "steps = 'many'; a whole number was expected"),
        (["train", "--out", "x"], "items and interactions are needed, or synthetic"),
        (["evaluate", "--run", str(tmp_path)], "holds no run: run.json is not there"),
        (["pretrain", "--synthetic", "--arm", "plain", "--out", "x"], "has no tables to pre-train"),
        (["demo", "--steps", "3"], "--steps = 3; give 20 or more"),
    ):
        code, _, error = run(capsys, *arguments)
        assert code == 2
        assert message in error


@pytest.mark.slow
def test_demo(tmp_path, capsys, monkeypatch):
    """The demo on a smaller catalogue; nothing of another owner is replaced."""
    monkeypatch.setattr("prefixmem_fast.recommender.training.run.synthetic", functools.partial(synthetic, 200, 150))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "notes").touch()
    code, out, _ = run(capsys, "demo", "--steps", "24")
    assert code == 0
    for line in ("synthetic catalogue", "a third of the steps", "R@10", "training step, T = 200,000", "curves.png"):
        assert line in out
    assert [file.name for file in (tmp_path / "runs" / "demo").iterdir()] == ["notes"]
    assert (tmp_path / "runs" / "demo-2" / "curves.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "runs" / "demo-2" / "demo.json").read_text())
    assert found["data"] == "synthetic"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    (tmp_path / "mine" / "pretraining").mkdir()
    code, _, error = run(capsys, "demo", "--out", "mine")
    assert code == 2
    assert "is not empty" in error
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"
