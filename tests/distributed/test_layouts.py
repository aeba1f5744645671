import pytest

from tests.distributed.processes import run_cases


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_tables_have_the_bits_of_one_process(tmp_path, world):
    names = run_cases(world, tmp_path, "tests.distributed.layout_cases")
    assert {"every_rule_and_gradient", "fifty_steps"} <= names
    assert ("two_dimensions" in names) == (world == 4)
