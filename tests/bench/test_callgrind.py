"""What the CPU kernels read and write, and their instructions, held to limits; counted in valgrind."""

import pytest

from bench import callgrind

# Instructions a SID and lines over the floor: at most these, a few percent above what is callgrind.
LIMITS = {
    ("forward", 1024, "float32"): (2900, 1.06),
    ("forward", 1024, "bfloat16"): (3700, 1.06),
    ("step", 1024, "float32"): (8000, 1.12),
    ("step", 1024, "bfloat16"): (15_000, 1.17),
    ("window", 1024, "float32"): (2900, 1.06),
    ("step", 1, "float32"): (45_000, 2.4),
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if reason := callgrind.problem():
        pytest.skip(reason)
    return callgrind.build(tmp_path_factory.mktemp("counted"))


@pytest.mark.slow
@pytest.mark.parametrize("case", LIMITS)
def test_each_row_and_gradient_is_touched_once(case, program):
    call, sids, dtype = case
    instructions, lines = LIMITS[case]
    counts = callgrind.count(program, call, sids, dtype, 2048)
    assert counts.instructions / sids <= instructions
    assert counts.floor <= counts.lines <= lines * counts.floor


@pytest.mark.slow
def test_counts_repeat(program):
    first, second = (callgrind.count(program, "step", 64, "float32", 2048) for _ in range(2))
    assert first == second


def test_without_valgrind(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert callgrind.problem().startswith("valgrind is not there; install it")
