"""How contenders take turns, are checked, timed and left out."""

import re
import time

import pytest
import torch

import bench.run
from bench.clocks import HostClock
from bench.registry import BENCHMARKS, Benchmark, Floor
from bench.run import OVER, plan, quantiles
from tests.bench.cases import SMALL_CACHE, case_of, contender, run_case


def test_a_wrong_result_gets_no_time():
    case = case_of(
        [contender("wrong", lambda: 1), contender("right", lambda: 2)],
        lambda subject: "3 is 4" if subject == 1 else None,
    )
    rows = run_case(case)
    assert [row.get("skipped") for row in rows] == ["WRONG: 3 is 4; not timed", None]


def test_ours_alone():
    case = case_of([contender("peer"), contender("prefixmem_fast, fused")])
    benchmark = Benchmark("small", "", lambda device: case, lambda device: [{}], {})
    with SMALL_CACHE:
        rows = list(bench.run.run(benchmark, {}, HostClock(), 0.01, ours=True))
    assert {row["provider"] for row in rows} == {"prefixmem_fast, fused"}


@pytest.mark.parametrize("name", ["peer", "prefixmem_fast"])
@pytest.mark.parametrize("where", ["set-up", "step"])
def test_a_failure_is_named_and_the_others_go_on(name, where, capsys):
    def fail(*given):
        raise RuntimeError("no\nsuch kernel")

    def step(subject, turn, mark):
        if subject == "bad" and turn >= 0:
            fail()
        mark("step")

    bad = contender(name, fail if where == "set-up" else lambda: "bad")
    rows = {row["provider"]: row for row in run_case(case_of([bad, contender("good")], step=step))}
    assert rows[name]["skipped"] == "FAILED: RuntimeError: no such kernel"
    assert rows["good"]["metric"] == "step"
    assert "Traceback" in capsys.readouterr().err


def test_what_a_library_has_no_kernel_for_is_no_failure():
    def fail():
        raise NotImplementedError("no bfloat16")

    assert run_case(case_of([contender("peer", fail)]))[0]["skipped"] == "not implemented there: no bfloat16"


def test_what_does_not_fit_is_left_out():
    rows = run_case(case_of([contender("large", needs=1 << 60), contender("none", None, missing="not here")]))
    assert rows[0]["skipped"].startswith("left out: it takes 1073741824.0 GiB")
    assert rows[1]["skipped"] == "not here"


def test_memory_that_runs_out_leaves_one_contender_out():
    def step(subject, turn, mark):
        if subject == "greedy" and turn >= 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")
        mark("step")

    case = case_of([contender("greedy", lambda: "greedy"), contender("modest", lambda: "modest")], step=step)
    rows = run_case(case)
    assert rows[0]["skipped"] == "left out: CUDA out of memory. Tried"
    assert rows[1]["metric"] == "step"


class TestSeconds:
    def test_what_compiles_for_longer_than_there_is_time_is_left_out(self):
        case = case_of([contender("compiled", warm_up=90.0), contender("plain")])
        rows = run_case(case, until=time.monotonic() + 20)
        assert re.fullmatch(
            "left out: it compiles for about 90 seconds, and --seconds leaves (1[0-9]|20)", rows[0]["skipped"]
        )
        assert rows[1]["metric"] == "step"
        assert [row["metric"] for row in run_case(case, until=time.monotonic() + 100)] == ["step", "step"]
        assert [row["metric"] for row in run_case(case)] == ["step", "step"]

    def test_turns_end_with_the_seconds(self):
        def step(subject, turn, mark):
            time.sleep(0.1)
            mark("step")

        case, began = case_of([contender("a"), contender("b")], step=step), time.monotonic()
        rows = run_case(case, seconds=60, until=began + 1)
        assert time.monotonic() - began < 30
        assert [row["provider"] for row in rows] == ["a", "b"]
        assert all(1 <= row["repeats"] < 10 for row in rows)

    def test_nothing_new_begins_when_they_are_over(self):
        def slow():
            time.sleep(0.3)

        case = case_of([contender("a", slow), contender("b", slow), contender("c", slow)])
        rows = run_case(case, until=time.monotonic() + 0.2)
        assert [row["skipped"] for row in rows if "skipped" in row] == [f"left out: {OVER}"] * 3

    def test_memory_is_not_measured_for_longer(self, monkeypatch):
        monkeypatch.setattr(bench.run, "_memory_apart", lambda *given: {"metric": "peak memory", "unit": "MiB"})
        case = case_of([contender("a")], state_bytes=lambda subject: 0)
        assert [row["metric"] for row in run_case(case, counted=9)] == ["step", "peak memory"]
        late = run_case(case_of([contender("a")], state_bytes=lambda subject: 0), counted=9, until=time.monotonic() + 2)
        assert late[1]["skipped"] == f"memory not measured: {OVER}"

    def test_who_compiles_says_so(self):
        case = BENCHMARKS["forward"].set_up("cpu", **BENCHMARKS["forward"].quick)
        assert [c.name for c in case.contenders if c.warm_up] == ["torch.compile of one fused table"]


def test_turns_go_one_way_and_back():
    taken = []

    def step(subject, turn, mark):
        taken.append((turn, subject))
        mark("step")

    run_case(case_of([contender("a", lambda: "a"), contender("b", lambda: "b")], step=step))
    assert taken[2:6] == [(0, "a"), (0, "b"), (1, "b"), (1, "a")]


def test_totals_floors_and_steps():
    def step(subject, turn, mark):
        mark("forward")
        mark("backward")

    case = case_of(
        [contender("a")],
        step=step,
        totals={"step": ("forward", "backward")},
        steps=4,
        floors={"step": Floor(1e6, 2e6)},
        alone=lambda subject: {"sorts": lambda: None},
    )
    rows = {row["metric"]: row for row in run_case(case)}
    assert set(rows) == {"forward", "backward", "sorts alone", "step"}
    assert rows["step"]["p50"] == pytest.approx(rows["forward"]["p50"] + rows["backward"]["p50"], rel=1)
    assert rows["step"]["floor"] == {"distinct": 1e6, "every_read": 2e6}


def test_quantiles_stay_within_the_values():
    assert quantiles([5.0]) == {"p50": 5.0, "p20": 5.0, "p80": 5.0}
    of_three = quantiles([1.0, 2.0, 10.0])
    assert (of_three["p20"], of_three["p50"], of_three["p80"]) == (pytest.approx(1.4), 2.0, pytest.approx(6.8))


def test_the_plan_takes_the_first_workload_of_each_benchmark_first():
    for device in ("cpu", "cuda"):
        planned = plan(list(BENCHMARKS), device, quick=False)
        names = [name for name, benchmark in BENCHMARKS.items() if benchmark.workloads(device)]
        assert len(names) == len(BENCHMARKS) - 2 * (device == "cuda")
        assert [benchmark.name for benchmark, _, _ in planned[: len(names)]] == names
        assert len({(benchmark.name, str(workload)) for benchmark, workload, _ in planned}) == len(planned), (
            "none twice"
        )
        assert all((counted > 0) == (i < len(names)) for i, (_, _, counted) in enumerate(planned))
    codes = {workload.get("codes") for _, workload, _ in planned}
    assert codes >= {"uniform", "zipf 0.8", "zipf 1.05", "zipf 1.2", "histories", "hot"}
    assert {workload.get("sids") for _, workload, _ in planned} >= {1, 1 << 20}
    assert {workload.get("table_rows") for _, workload, _ in planned} >= {500_000, 2_000_000, 5_000_000}
