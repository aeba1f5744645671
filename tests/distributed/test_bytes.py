import pytest

from tests.distributed.processes import run_cases


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_bytes_that_leave_a_rank(tmp_path, world):
    names = run_cases(world, tmp_path, "tests.distributed.bytes_cases")
    assert {"bytes_of_replicate", "bytes_of_shard", "limits_are_the_formulas", "every_collective_is_counted"} <= names
