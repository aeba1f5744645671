"""The files of a run: found from any directory, and refused with other contents."""

import os
import shutil

import pytest

from prefixmem_fast.recommender.training.config import CONFIG, RunConfig, read_run, write_options
from prefixmem_fast.recommender.training.inputs import (
    check_options,
    check_outside,
    check_revision,
    inputs_of,
    located,
)
from tests.helpers.runs import write_files


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with data, a model's folder and a run's, from within which the run was started by relative names."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    write_files(folder / "data")
    (folder / "data" / "more.csv").write_text("user_id,item_id\nu,item 1\n")
    (folder / "llm").mkdir()
    (folder / "llm" / "config.json").write_text("{}")
    (folder / "llm" / "model.safetensors").write_bytes(b"weights")
    (folder / "run").mkdir()
    monkeypatch.chdir(folder)
    return folder


def config():
    return RunConfig(
        items="data/items.index.json",
        interactions=["data/interactions.json", "data/more.csv"],
        text="data/items.json",
        model="llm",
    )


def test_places_and_digests_go_through_the_file(project):
    inputs = inputs_of(config(), project / "run")
    write_options(config(), project / "run" / CONFIG, inputs)
    options, read = read_run(project / "run" / CONFIG)
    assert RunConfig(**options) == config()
    assert read == inputs
    assert set(inputs) == {"items", "interactions", "text", "model"}
    assert [entry["from_run"] for entry in inputs["interactions"]] == [
        "../data/interactions.json",
        "../data/more.csv",
    ]
    assert all(len(entry["sha256"]) == 64 for entries in inputs.values() for entry in entries)


def test_found_from_another_directory_and_after_a_move(project, tmp_path, monkeypatch):
    inputs = inputs_of(config(), project / "run")
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    others = tmp_path / "away" / "data"
    others.mkdir()
    (others / "items.index.json").write_text("{}")  # of the same name, and never read
    found = located(config(), inputs, project / "run")
    assert found.items == str(project / "data" / "items.index.json")
    assert found.interactions[1] == str(project / "data" / "more.csv")
    moved = project.rename(tmp_path / "moved")
    found = located(config(), inputs, moved / "run")
    for place in (found.items, *found.interactions, found.text, found.model):
        assert str(moved) in place
    shutil.rmtree(moved / "llm")
    with pytest.raises(FileNotFoundError, match=r"model is at none of .*project/llm.*moved/run/\.\./llm.*bring it"):
        located(config(), inputs, moved / "run")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("data/items.index.json", "items"),
        ("data/interactions.json", "interactions"),
        ("data/more.csv", "interactions"),
        ("data/items.json", "text"),
        ("llm/model.safetensors", "model"),
        ("llm/tokenizer.json", "model"),
    ],
)
def test_other_contents_are_refused_with_both_digests(project, file, name):
    inputs = inputs_of(config(), project / "run")
    with open(project / file, "a") as opened:
        opened.write(" ")
    now = inputs_of(config(), project / "run")
    before, after = (
        next(a["sha256"] for a, b in zip(these[name], those[name], strict=True) if a["sha256"] != b["sha256"])
        for these, those in ((inputs, now), (now, inputs))
    )
    with pytest.raises(ValueError, match=rf"{name} .* its SHA-256 is {after}, that of the run's is {before}"):
        located(config(), inputs, project / "run")


def test_a_resumed_run_keeps_its_options_and_contents_wherever_they_are(project):
    inputs = inputs_of(config(), project / "run")
    shutil.copy("data/items.index.json", "copy.json")
    check_options(config().replace(items="copy.json"), config(), inputs, project / "run")
    (project / "copy.json").write_text("{}")
    with pytest.raises(ValueError, match=r"items = 'copy\.json', and the run in .* was started with 'data/items"):
        check_options(config().replace(items="copy.json"), config(), inputs, project / "run")
    with pytest.raises(ValueError, match="steps = 5, and the run"):
        check_options(config().replace(steps=5), config(), inputs, project / "run")


def test_a_preset_is_no_folder_of_that_name(project):
    (project / "decoder").mkdir()
    assert "model" not in inputs_of(config().replace(model="decoder"), project / "run")


def test_hidden_files_are_not_of_a_model(project):
    inputs = inputs_of(config(), project / "run")
    (project / "llm" / ".cache").mkdir()
    (project / "llm" / ".cache" / "lock").touch()
    assert inputs_of(config(), project / "run") == inputs


def test_names_of_files_are_of_a_model(project):
    inputs = inputs_of(config(), project / "run")
    (project / "llm" / "model.safetensors").rename(project / "llm" / "pytorch_model.bin")
    assert inputs_of(config(), project / "run") != inputs


def test_a_link_to_what_a_run_reads_is_no_way_around(project):
    (project / "link").symlink_to("llm")
    with pytest.raises(ValueError, match=r"model = llm lies in out = .*link"):
        check_outside(config(), project / "link")


@pytest.mark.parametrize("out", [".", "llm", "data"])
def test_what_a_run_reads_lies_outside_of_its_folder(project, out):
    with pytest.raises(ValueError, match=r" lies in out = "):
        check_outside(config(), project / out)


def test_a_run_lies_outside_of_the_folders_that_it_reads(project):
    with pytest.raises(ValueError, match=r"out = .*llm.run lies in model = llm; give another folder"):
        check_outside(config(), project / "llm" / "run")


def test_the_revision_of_a_model_from_a_hub():
    inputs = {}
    check_revision(inputs, None, "decoder")
    assert inputs == {}
    check_revision(inputs, "abc", "gpt2")
    assert inputs == {"model": [{"path": "gpt2", "revision": "abc"}]}
    check_revision(inputs, "abc", "gpt2")
    with pytest.raises(ValueError, match=r"model = 'gpt2' has the revision def now, .* started with abc"):
        check_revision(inputs, "def", "gpt2")


@pytest.mark.parametrize("inputs", [3, {"items": 3}, {"items": [{"path": "x"}]}, {"items": [{"sha256": 3}]}])
def test_inputs_of_another_form(tmp_path, inputs):
    write_options(RunConfig(synthetic=True), tmp_path / CONFIG, inputs)
    with pytest.raises(ValueError, match="inputs is not what a run has written there"):
        read_run(tmp_path / CONFIG)


def test_a_pipe_or_a_device_is_not_read(project):
    inputs = inputs_of(config(), project / "run")
    os.mkfifo(project / "pipe")
    for place in ("/dev/zero", str(project / "pipe")):
        hostile = {"items": [{**inputs["items"][0], "path": place, "absolute": place, "from_run": place}]}
        with pytest.raises(FileNotFoundError, match=f"items is at none of {place}"):
            located(config().replace(items=place), hostile, project / "run", ("items",))


def test_a_name_with_a_line_break_of_unicode_goes_through_the_file(tmp_path):
    options = RunConfig(items="a\x85b.json", interactions=["c\u2028d.csv"])
    write_options(options, tmp_path / CONFIG)
    assert RunConfig(**read_run(tmp_path / CONFIG)[0]) == options
