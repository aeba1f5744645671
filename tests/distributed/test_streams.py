import pytest

from tests.distributed.processes import run_cases


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_tables_read_over_tokens_have_the_bits_of_one_process(tmp_path, world):
    names = run_cases(world, tmp_path, "tests.distributed.stream_cases")
    assert "tables_of_tokens" in names
    assert ("packed_sequences" in names) == (world == 2)
