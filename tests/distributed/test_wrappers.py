import pytest

from tests.distributed.processes import run_cases


def test_wrapped_models_train_to_the_tables_of_one_process(tmp_path):
    environment = {"PREFIXMEM_TEST_FOLDER": str(tmp_path)}
    names = run_cases(2, tmp_path, "tests.distributed.wrapper_cases", environment=environment)
    assert {"ddp", "fsdp2", "clipping_by_the_global_norm", "accumulation_without_synchronisation"} <= names


@pytest.mark.slow
def test_transformers_trainer(tmp_path):
    environment = {"PREFIXMEM_TEST_FOLDER": str(tmp_path)}
    module = "tests.distributed.trainer_cases"
    assert run_cases(1, tmp_path, module, environment=environment) == {"trainer_alone", "resume_alone"}
    assert run_cases(2, tmp_path, module, environment=environment) == {
        "trainer",
        "resume",
        "resume_otherwise",
        "best_checkpoint",
        "adapters",
        "fsdp2",
    }
    assert (tmp_path / "resumed-shard" / "checkpoint-2" / "prefixmem_tables").is_dir()
    assert run_cases(1, tmp_path, module, environment=environment) == {"trainer_alone", "resume_alone"}


@pytest.mark.slow
def test_fsdp2_of_accelerate(tmp_path):
    assert run_cases(2, tmp_path, "tests.distributed.accelerate_cases") == {"fsdp2"}


@pytest.mark.slow
def test_deepspeed(tmp_path):
    pytest.importorskip("deepspeed")
    environment = {"PREFIXMEM_TEST_FOLDER": str(tmp_path)}
    names = {"hidden_tables", "save", "tables_that_would_not_train"}
    assert run_cases(2, tmp_path, "tests.distributed.deepspeed_cases", environment=environment) == names
