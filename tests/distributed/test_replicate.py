import pytest

from tests.distributed.processes import run_cases


@pytest.mark.parametrize("world", [2, 3])
def test_replicated_tables_have_the_bits_of_one_process(tmp_path, world):
    names = run_cases(world, tmp_path, "tests.distributed.replicate_cases")
    assert {"every_rule_and_gradient", "fifty_steps", "every_mode_and_backend"} <= names
