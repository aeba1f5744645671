from tests.distributed.processes import run_cases


def test_what_ranks_may_not_do(tmp_path):
    names = run_cases(2, tmp_path, "tests.distributed.refusal_cases")
    assert {"ranks_that_differ", "calls_out_of_step", "one_rank_refuses_and_all_do"} <= names
