"""One process at work on a run: what it takes over, leaves alone and lets go of."""

import json

import pytest

from prefixmem_fast.recommender.training.config import CONFIG, RunConfig, read_run
from prefixmem_fast.recommender.training.folder import MARKER, RunFolder
from prefixmem_fast.recommender.training.session import CURVES, Session, is_first_process, options_digest
from tests.helpers.runs import write_files


@pytest.fixture
def config(tmp_path):
    files = write_files(tmp_path)
    return RunConfig(items=files["items"], interactions=files["interactions"])


@pytest.fixture
def sit(config, tmp_path):
    def begin(resume=True, config=config):
        return Session(config, tmp_path / "run", "train", "model", resume)

    return begin


@pytest.fixture
def started(sit):
    with sit(resume=False) as session:
        return session.begin()


def test_a_refused_process_lets_go_of_the_folder(config, sit, started):
    with pytest.raises(ValueError, match=r"steps = 5, and the run in .* was started with 1000"):
        sit(config=config.replace(steps=5))
    with sit() as session:
        assert session.config == config
        with pytest.raises(ValueError, match="another process works in"):
            sit()
    RunFolder.resume(started.path, "train").close()


def test_what_a_kill_has_left_is_removed(sit, started):
    (started.path / f".model-{started.run}").mkdir()
    with RunFolder.resume(started.path, "train") as folder:
        folder.begin_checkpoint(2)
    with sit() as session:
        session.begin()
        assert sorted(file.name for file in started.path.iterdir()) == [CONFIG, MARKER]


def test_a_kill_before_the_options_were_written(config, sit, started):
    (started.path / CONFIG).unlink()
    with sit() as session:
        session.begin("abc")
    options, inputs = read_run(started.path / CONFIG)
    assert RunConfig(**options) == config
    assert set(inputs) == {"items", "interactions", "model"}


def test_a_report_and_a_product_say_that_a_run_has_finished(sit, started):
    with sit() as session:
        session.begin()
        assert session.report is None
        session.finish({"steps": 3}, _save)
    with sit() as session:
        assert session.report == {"steps": 3}
    for name, message in ((CURVES, "is not the report of this run"), ("model/weights", "has 1 bytes of 7")):
        before = (started.path / name).read_text()
        (started.path / name).write_text("{")
        with pytest.raises(ValueError, match=rf"the run has finished, and .*{message}; bring the old files back"):
            sit()
        (started.path / name).write_text(before)
    (started.path / CURVES).unlink()
    with pytest.raises(ValueError, match=r"has finished, and its .*curves\.json cannot be read"):
        sit()


def _save(folder):
    folder.mkdir()
    (folder / "weights").write_text("weights")


def test_options_that_were_changed_by_hand(sit, started):
    with RunFolder.resume(started.path, "train") as folder:
        folder.options = options_digest(read_run(started.path / CONFIG)[0])
        folder.begin_checkpoint(2)
        folder.end_checkpoint(2)
    text = (started.path / CONFIG).read_text()
    (started.path / CONFIG).write_text(text.replace("seed: 0", "seed: 1"))
    changed = RunConfig(**read_run(started.path / CONFIG)[0])
    message = r"the options in .* have changed since .*checkpoint-2 was saved"
    with sit(config=changed) as session, pytest.raises(ValueError, match=message):
        session.begin().last_checkpoint()
    (started.path / CONFIG).write_text(text)
    with sit() as session:
        assert session.begin().last_checkpoint().name == "checkpoint-2"


@pytest.mark.parametrize(
    ("variable", "value"),
    [("WORLD_SIZE", "0"), ("WORLD_SIZE", "two"), ("WORLD_SIZE", ""), ("RANK", "-1"), ("RANK", "a")],
)
def test_variables_of_torchrun_that_are_no_numbers(monkeypatch, variable, value):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=rf"{variable} = '{value}' in the environment is no whole number .*; unset it"):
        is_first_process()


def test_a_rank_that_is_left_over_is_that_of_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")
    assert is_first_process()


def test_a_figure_that_is_not_finite_is_no_report(sit, started):
    with sit() as session:
        session.begin()
        with pytest.raises(ValueError, match="JSON"):
            session.finish({"loss": float("nan")}, lambda folder: folder.mkdir())
    assert not (started.path / "model").exists()


def test_other_processes_of_torchrun_write_and_lock_nothing(sit, started, monkeypatch):
    with sit() as first:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        with sit() as second:
            assert second.begin().run == started.run
        monkeypatch.delenv("RANK")
        monkeypatch.delenv("WORLD_SIZE")
        first.begin()
    marks = json.loads((started.path / MARKER).read_text())
    assert marks["run"] == started.run
