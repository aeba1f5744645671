import pytest

from tests.distributed.hosts import problem, torchrun, two_hosts

CASES = {
    "every_rule_and_gradient",
    "fifty_steps",
    "means_of_ranks",
    "tables_that_nobody_holds_whole",
    "two_dimensions",
}


@pytest.mark.slow
def test_two_hosts_of_two_processes_have_the_bits_of_one():
    if (reason := problem()) is not None:
        pytest.skip(reason)
    with two_hosts() as hosts:
        nodes = [
            torchrun(host, node, "tests.distributed.hosts", "tests.distributed.layout_cases")
            for node, host in enumerate(hosts)
        ]
        try:
            said = [node.communicate(timeout=300) for node in nodes]
        finally:
            for node in nodes:
                node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said[0][1][-2000:] + said[1][1][-2000:]
    passed = {tuple(line.split()[1:]) for out, _ in said for line in out.splitlines() if line.startswith("passed: ")}
    assert passed == {(str(rank), name) for rank in range(4) for name in CASES}
