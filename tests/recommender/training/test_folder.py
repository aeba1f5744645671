"""The folder of a run: who may work in it, and what is removed from it."""

import errno
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from prefixmem_fast.recommender.training import folder as folders
from prefixmem_fast.recommender.training.folder import MARKER, RunFolder, check_new


def write(folder, step, **files):
    """A whole checkpoint of a run."""
    folder.begin_checkpoint(step)
    checkpoint = folder.path / f"checkpoint-{step}"
    for name, content in (files or {"model": "weights", "optimizer": "state"}).items():
        (checkpoint / name).write_text(content)
    (checkpoint / "inner").mkdir()
    (checkpoint / "inner" / "file").write_text("deep")
    folder.end_checkpoint(step)
    return checkpoint


@pytest.fixture
def run(tmp_path):
    with RunFolder.start(tmp_path / "out", "train") as folder:
        yield folder


class TestStart:
    @pytest.mark.parametrize("name", ["checkpoint-500", "model", "thesis.docx", ".hidden", "config.yaml"])
    def test_what_holds_something_is_refused(self, tmp_path, name):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=rf"is not empty: {name} is in it; give an empty or a new folder"):
            RunFolder.start(tmp_path, "train")
        assert [file.name for file in tmp_path.iterdir()] == [name]

    def test_no_name_a_file_and_a_run(self, tmp_path, run):
        with pytest.raises(ValueError, match="out = '' names no folder"):
            RunFolder.start("", "train")
        (tmp_path / "file").write_text("x")
        with pytest.raises(NotADirectoryError, match=r"file is no folder; give an empty or a new one"):
            RunFolder.start(tmp_path / "file", "train")
        with pytest.raises(NotADirectoryError, match=r"so .* cannot be made"):
            check_new(tmp_path / "file" / "run")
        with pytest.raises(ValueError, match="holds a run already; --resume"):
            RunFolder.start(run.path, "train")

    def test_a_name_of_bytes_that_are_no_text(self, tmp_path):
        with pytest.raises(ValueError, match="has bytes that are no text in its name"):
            check_new(tmp_path / "run-\udcff")

    def test_an_empty_folder_and_a_link_to_one_will_do(self, tmp_path):
        (tmp_path / "empty").mkdir()
        (tmp_path / "link").symlink_to("empty")
        RunFolder.start(tmp_path / "link", "train").close()
        assert (tmp_path / "empty" / MARKER).is_file()

    def test_of_two_at_once_one_is_refused(self, tmp_path, monkeypatch):
        """Both have found the folder empty."""
        monkeypatch.setattr(folders, "check_new", lambda path: None)
        first = RunFolder.start(tmp_path / "out", "train")
        with pytest.raises(ValueError, match="another run has just started"):
            RunFolder.start(tmp_path / "out", "train")
        assert RunFolder.read(tmp_path / "out").run == first.run
        first.close()

    def test_what_cannot_be_written(self):
        with pytest.raises(OSError, match="nothing can be written to /proc"):
            check_new("/proc/run")


class TestResume:
    def test_one_process_at_a_time(self, run):
        with pytest.raises(ValueError, match="another process works in"):
            RunFolder.resume(run.path, "train")
        run.close()
        with RunFolder.resume(run.path, "train") as again:
            assert again.run == run.run
            child = multiprocessing.get_context("spawn").Pool(1)
            with child, pytest.raises(ValueError, match="another process works in"):
                child.apply(RunFolder.resume, (run.path, "train"))

    def test_by_the_command_that_started_it(self, tmp_path):
        RunFolder.start(tmp_path, "pretrain lm").close()
        with pytest.raises(ValueError, match="was started by prefixmem pretrain --method lm; go on with it by that"):
            RunFolder.resume(tmp_path, "train")

    @pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": "prefixmem run", "run": 3}', "[" * 100_000])
    def test_a_damaged_mark(self, tmp_path, content):
        (tmp_path / MARKER).write_text(content)
        with pytest.raises(ValueError, match=r"run\.json is (not of prefixmem|damaged|empty)"):
            RunFolder.resume(tmp_path, "train")

    def test_a_mark_that_is_a_pipe_is_not_waited_for(self, run):
        checkpoint = write(run, 2)
        (checkpoint / MARKER).unlink()
        os.mkfifo(checkpoint / MARKER)
        assert run.last_checkpoint() is None

    def test_a_file_system_without_locks_is_said(self, tmp_path, monkeypatch):
        def refuse(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr("fcntl.flock", refuse)
        with pytest.warns(UserWarning, match="cannot be locked .*; start no other process in it"):
            RunFolder.start(tmp_path / "out", "train").close()

    def test_no_run(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"holds no run: run\.json is not there"):
            RunFolder.read(tmp_path)


class TestCheckpoints:
    def test_rotation_keeps_the_newest_two_and_the_best(self, run):
        for step in (2, 4, 6, 8, 10):
            write(run, step)
        run.rotate(best="elsewhere/checkpoint-4")
        assert sorted(path.name for path in run.path.glob("checkpoint-*")) == [
            "checkpoint-10",
            "checkpoint-4",
            "checkpoint-8",
        ]

    def test_what_others_have_put_there_stays(self, run, tmp_path):
        others = [run.path / name for name in ("checkpoint-mine", "checkpoint-1", "checkpoint-3")]
        for other in others[:2]:
            other.mkdir()
            (other / "thesis").write_text("x")
        shutil.copytree(write(run, 2), others[2])  # of another run
        marks = json.loads((others[2] / MARKER).read_text())
        (others[2] / MARKER).write_text(json.dumps({**marks, "run": "0" * 32}))
        shutil.copytree(run.path / "checkpoint-2", run.path / "checkpoint-2-kept")  # by the user
        (run.path / "checkpoint-2" / "notes").write_text("of the user")
        outside = shutil.copytree(run.path / "checkpoint-2", tmp_path / "outside")
        (run.path / "checkpoint-0").symlink_to(outside)
        for step in (4, 6, 8):
            write(run, step)
        run.rotate(best=None)
        run.remove_unfinished()
        for other in others[:2]:
            assert (other / "thesis").read_text() == "x"
        assert (others[2] / "model").is_file()
        assert (run.path / "checkpoint-2-kept" / "model").is_file()
        assert (outside / "model").is_file()
        assert [file.name for file in (run.path / "checkpoint-2").iterdir()] == ["notes"]
        assert not (run.path / "checkpoint-4").exists()

    @pytest.mark.parametrize("place", ["../../victim", "{absolute}", "inner/../../../victim"])
    def test_a_mark_from_elsewhere_names_nothing_outside(self, run, tmp_path, place):
        """As the config.json of an encoder, a run may come from somebody else."""
        victim = tmp_path / "victim"
        victim.write_text("x")
        mark = write(run, 2) / MARKER
        marks = json.loads(mark.read_text())
        marks["files"][place.format(absolute=victim)] = {"bytes": 1, "sha256": ""}
        mark.write_text(json.dumps(marks))
        for step in (4, 6):
            write(run, step)
        run.rotate(best=None)
        run.remove_unfinished()
        assert victim.read_text() == "x"
        with pytest.raises(ValueError, match="is there, and this run has not written it"):
            run.begin_checkpoint(2)

    @pytest.mark.parametrize("name", ["x/precious", "*", "../out", ""])
    def test_the_name_of_a_run_is_no_path(self, run, name):
        (run.path / "precious").mkdir()
        (run.path / ".git-precious").mkdir()
        run.close()
        marks = json.loads((run.path / MARKER).read_text())
        (run.path / MARKER).write_text(json.dumps({**marks, "run": name}))
        with pytest.raises(ValueError, match=r"run\.json is damaged: it names no run"):
            RunFolder.resume(run.path, "train")

    def test_what_a_link_leads_to_stays(self, run, tmp_path):
        inner = write(run, 2) / "inner"
        shutil.move(inner, tmp_path / "moved")
        inner.symlink_to(tmp_path / "moved")
        shutil.rmtree(write(run, 4) / "inner")
        run.rotate(best=None, keep=0)
        assert (tmp_path / "moved" / "file").read_text() == "deep"
        assert sorted(path.name for path in run.path.iterdir()) == ["checkpoint-2", MARKER]
        assert [path.name for path in (run.path / "checkpoint-2").iterdir()] == ["inner"]

    @pytest.mark.parametrize(
        "files", [None, [], {"model": 3}, {"model": {"bytes": 7}}, {"": {"bytes": 7, "sha256": ""}}]
    )
    def test_a_mark_of_other_files_is_damage(self, run, files):
        checkpoint = write(run, 2)
        marks = json.loads((checkpoint / MARKER).read_text())
        (checkpoint / MARKER).write_text(json.dumps({**marks, "files": files}))
        assert "run.json is damaged: its files are not those of a checkpoint" in run.problem_of(checkpoint)

    def test_a_name_that_is_taken(self, run):
        (run.path / "checkpoint-2").mkdir()
        with pytest.raises(ValueError, match="checkpoint-2 is there, and this run has not written it; move it away"):
            run.begin_checkpoint(2)

    def test_one_cut_short_is_removed_and_one_of_the_same_step_replaced(self, run):
        write(run, 2, model="old")
        run.begin_checkpoint(4)
        (run.path / "checkpoint-4" / "optimizer").write_text("half")
        assert run.last_checkpoint().name == "checkpoint-2"
        run.remove_unfinished()
        assert not (run.path / "checkpoint-4").exists()
        write(run, 2, model="new")
        assert (run.path / "checkpoint-2" / "model").read_text() == "new"
        assert run.problem_of(run.path / "checkpoint-2") is None

    @pytest.mark.parametrize(
        ("damage", "problem"),
        [
            (lambda path: (path / "optimizer").unlink(), "checkpoint-4 lacks optimizer"),
            (lambda path: (path / "inner" / "file").unlink(), "checkpoint-4 lacks inner/file"),
            (lambda path: (path / "model").write_text("weigh"), "model has 5 bytes of 7"),
            (lambda path: (path / "model").write_text("weightz"), "model is damaged: its SHA-256 is another"),
        ],
        ids=["lacks", "lacks-inner", "cut", "changed"],
    )
    def test_a_damaged_one_is_named_and_the_one_before_it_taken(self, run, damage, problem):
        write(run, 2)
        damage(write(run, 4))
        with pytest.warns(UserWarning, match=rf"{problem}; going on from checkpoint-2"):
            assert run.last_checkpoint().name == "checkpoint-2"
        damage2 = run.path / "checkpoint-2" / "model"
        damage2.unlink()
        with pytest.raises(ValueError, match=rf"{problem}; .*checkpoint-2 lacks model; no sound checkpoint is left"):
            run.last_checkpoint()

    def test_a_kill_before_a_checkpoint_is_marked_is_no_obstacle(self, run, monkeypatch):
        def killed(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "_mark", killed)
            with pytest.raises(KeyboardInterrupt):
                run.begin_checkpoint(2)
        run.remove_unfinished()
        assert [file.name for file in run.path.iterdir()] == [MARKER]
        write(run, 2)

    @pytest.mark.parametrize("name", ["checkpoint-04", "checkpoint-1", "checkpoint-999", "checkpoint-4.old"])
    def test_a_copy_of_a_checkpoint_is_another_owners(self, run, name):
        shutil.copytree(write(run, 4), run.path / name)
        for step in (6, 8, 10):
            write(run, step)
        run.rotate(best=None)
        run.remove_unfinished()
        assert (run.path / name / "model").is_file()
        assert run.last_checkpoint().name == "checkpoint-10"
        assert not (run.path / "checkpoint-4").exists()
        assert (run.path / "checkpoint-8").exists()

    def test_leftovers_in_checkpoints_go(self, run):
        whole = write(run, 2)
        run.begin_checkpoint(4)
        temporary = []
        from prefixmem_fast._files import write_file

        def killed(path):
            temporary.append(Path(path).parent.name)
            raise KeyboardInterrupt

        for folder, file in ((run.path, "curves.json"), (whole, MARKER)):
            with pytest.raises(KeyboardInterrupt):
                write_file(folder / file, killed)
            (folder / temporary[-1]).mkdir()  # as a kill would have left it
            (folder / temporary[-1] / file).touch()
        run.remove_unfinished()
        assert sorted(file.name for file in run.path.iterdir()) == ["checkpoint-2", MARKER]
        assert run.problem_of(whole) is None
        assert temporary[-1] not in {file.name for file in whole.iterdir()}

    def test_none_yet(self, run):
        assert run.last_checkpoint() is None


def test_a_folder_gets_its_name_when_it_is_whole(run):
    def killed(folder):
        folder.mkdir()
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.place("model", killed)
    assert not (run.path / "model").exists()
    run.remove_unfinished()
    assert [file.name for file in run.path.iterdir()] == [MARKER]

    def save(folder):
        folder.mkdir()
        (folder / "weights").touch(mode=0o600)

    run.place("model", save)
    assert run.problem_of(run.path / "model") is None
    assert (run.path / "model" / "weights").stat().st_mode & 0o777 == (run.path / MARKER).stat().st_mode & 0o666
    (run.path / "model" / "notes").touch()
    with pytest.raises(ValueError, match="model is there already; move it away"):
        run.place("model", lambda folder: folder.mkdir())
    assert (run.path / "model" / "notes").exists()
