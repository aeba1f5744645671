import pytest

from tests.distributed.failure_cases import LAYOUTS, SCENARIOS
from tests.distributed.processes import start

ALWAYS = (("shard", "skips"),)
ALL = [
    pytest.param(layout, what, marks=() if (layout, what) in ALWAYS else pytest.mark.slow)
    for layout in LAYOUTS
    for what in SCENARIOS
]


@pytest.mark.parametrize(("layout", "what"), ALL)
def test_the_others_stop_with_one_line_and_whole_tables(tmp_path, layout, what):
    first, second = start(2, tmp_path, "tests.distributed.failure_cases", f"{layout} {what}")
    try:
        out, errors = first.communicate(timeout=60)
    finally:
        second.kill()
    assert first.returncode == 0, errors[-3000:]
    works = (layout, what) == ("replicate", "evaluates alone")  # nothing is exchanged in its forward pass
    assert out.split("\n")[0] == ("went on" if works else "stopped")
