import shutil

from tests.distributed.processes import run_cases

MODULE = "tests.distributed.checkpoint_cases"


def test_tables_of_two_ranks_go_on_on_three_on_one_and_in_another_layout(tmp_path):
    environment = {"PREFIXMEM_TEST_FOLDER": str(tmp_path / "tables")}
    theirs = tmp_path / "tables" / "theirs"
    theirs.mkdir(parents=True)
    (theirs / "config.json").write_text("{}")
    assert run_cases(2, tmp_path, MODULE, environment=environment) == {
        "save",
        "go_on",
        "refuse",
        "save_whole_encoders",
        "save_that_fails_late",
        "save_a_model_with_an_encoder",
        "save_what_fsdp2_has_divided",
    }
    assert sorted(path.name for path in (tmp_path / "tables").iterdir() if path.name[0] == ".") == []
    damaged = shutil.copytree(tmp_path / "tables" / "shard-adagrad", tmp_path / "tables" / "damaged")
    file = max(damaged.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert run_cases(3, tmp_path, MODULE, environment=environment) == {"go_on", "damage", "save_whole_encoders"}
    assert run_cases(1, tmp_path, MODULE, environment=environment) == {
        "go_on",
        "refuse",
        "saves_that_were_cut",
        "states_that_are_not_both_there",
        "files_that_were_not_verified",
    }
