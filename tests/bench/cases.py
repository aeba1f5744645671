"""Small cases of the harness."""

from unittest import mock

from bench import clocks
from bench.registry import Benchmark, Case, Contender
from bench.run import run

SMALL_CACHE = mock.patch.dict(clocks.COLD_BYTES, cpu=1 << 16, cuda=1 << 16)  # emptying a real one takes most of a test


@SMALL_CACHE
def run_case(case, counted=0, seconds=0.01, until=None):
    """The rows of one case."""
    benchmark = Benchmark("small", "", lambda device, **workload: case, lambda device: [{}], {})
    return list(run(benchmark, {}, clocks.HostClock(), seconds, counted, until))


def contender(name, make=lambda: None, **options):
    return Contender(name, make, **options)


def case_of(contenders, check=lambda subject: None, step=lambda subject, turn, mark: mark("step"), **options):
    return Case(contenders, step, check, **options)
