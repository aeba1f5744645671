"""How much the host does for a call, in numbers that no clock takes; `python -m bench host` gives the time."""

import pytest

from bench import host

# Launches, functions of torch that reach its dispatcher, and Python calls of and from this package: at most these. The
# last may be SLACK times as many, since releases of torch and Python differ by a few.
SLACK = 1.05
MOST = {
    "forward, of it the backend": (1, 1, 17),
    "forward, of it the operator": (1, 1, 19),
    "forward, no gradient": (1, 1, 42),
    "forward, gradient": (1, 1, 47),
    "step, of it the backend": (6, 13, 94),
    "step, fused SGD": (7, 17, 175),
    "step, fused row-wise Adagrad": (7, 17, 177),
    "step, fused row-wise Adam": (7, 17, 181),
    "step, sparse row-wise Adagrad": (10, 48, 217),
}


@pytest.fixture(scope="module")
def calls():
    with host.kernels_that_return_at_once():
        yield host.calls()


@pytest.mark.parametrize("name", MOST)
def test_a_call_does_no_more_than_before(name, calls):
    assert set(calls) == set(MOST)
    calls[name]()  # what only a first call does
    parts = host.parts_of(calls[name])
    found = len(parts.launches), len(parts.operators), parts.python_calls / SLACK
    assert all(count <= most for count, most in zip(found, MOST[name], strict=True)), (found, MOST[name])
