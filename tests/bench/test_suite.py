"""How benchmarks are set up, checked, run and stored."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from bench import benchmarks, machine, measure, providers, suite, workloads
from bench.benchmarks import tables
from bench.cli import main
from bench.rows import read_rows
from bench.workloads import Workload
from prefixmem_fast.operation import reference

ROOT = Path(__file__).parents[2]
CEILINGS = {"copy_bytes_per_second": 1e9, "matrix_flops_per_second": 1e9}
SMALL = Workload(sids=300, table_rows=500)


def run_case(case, **options):
    one = suite.Benchmark("made-up", "", lambda device, **workload: case, lambda device: [{}], {})
    return list(suite.run(one, {}, measure.HostClock(), CEILINGS, seconds=0.01, **options))


def contender(name, make=lambda: None, **options):
    return suite.Contender(name, make, **options)


def case_of(contenders, check=lambda one: None, step=lambda one, turn, mark: mark("step"), **options):
    return suite.Case(contenders, step, check, **options)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One run of every benchmark on its tiny workload, from the command line."""
    out = tmp_path_factory.mktemp("bench") / "deep" / "rows.jsonl"
    command = [sys.executable, "-m", "bench", "run", "--quick", "--share", "0.02", "--out", str(out)]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}  # compiling takes longer than all the rest
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, out


def test_every_benchmark_writes_rows(quick):
    text, out = quick
    rows = read_rows(out)
    assert {row["benchmark"] for row in rows} == set(suite.BENCHMARKS)
    for name in suite.BENCHMARKS:
        timed = [row for row in rows if row["benchmark"] == name and row.get("unit") == "ms"]
        assert any(row["provider"].startswith("prefixmem_fast") for row in timed), name
        assert all(0 <= row["p20"] <= row["p50"] <= row["p80"] and row["repeats"] >= 3 for row in timed)
    assert all(row["machine"]["versions"] and row["commit"] and row["date"] and row["ceilings"] for row in rows)
    skipped = [row for row in rows if "skipped" in row]
    assert all(
        "GPU" in row["skipped"] or "not installed" in row["skipped"] or "on a CPU" in row["skipped"] for row in skipped
    )
    assert {row["provider"] for row in rows} >= {p.trains() for p in providers.TRAINERS}
    assert any(row.get("metric") == "peak memory" and row["p50"] >= 0 for row in rows)
    assert all(row["provider"] in text for row in rows)


def test_floors_are_set_beside_the_times(quick):
    for row in read_rows(quick[1]):
        if "floor" in row:
            floor, seconds = row["floor"], row["p50"] / 1e3
            expected = 100 * floor["distinct_bytes"] / row["ceilings"]["copy_bytes_per_second"] / seconds
            assert floor["percent_distinct"] == pytest.approx(expected, abs=0.006)
            assert floor["distinct_bytes"] <= floor["algorithmic_bytes"]


def test_report_draws_and_writes_tables(quick, tmp_path, capsys):
    from matplotlib.image import imread

    assert main(["report", str(quick[1]), "--out", str(tmp_path / "page")]) == 0
    written = [Path(line) for line in capsys.readouterr().out.split()]
    page = (tmp_path / "page" / "tables.md").read_text()
    assert all(f"## {name}: " in page for name in suite.BENCHMARKS)
    pictures = [path for path in written if path.suffix == ".png"]
    assert {path.name for path in pictures} >= {"speed_up.png", "floor.png", "memory.png"}
    for path in pictures:
        assert imread(path).std() > 0.05, f"{path} is blank"
        assert f"({path.name})" in page
    assert not list((tmp_path / "page").glob("*.part*"))


def test_the_table_says_who_was_left_out_and_what_to_think_of_times():
    from bench.report import table

    base = {"benchmark": "b", "workload": {}, "metric": "step", "unit": "ms", "p20": 1.0, "p80": 4.0, "repeats": 5}
    rows = [
        {**base, "provider": "first", "p50": 2.0, "remarks": ["times spread"]},
        {**base, "provider": "second", "p50": 3.0, "remarks": []},
        {"benchmark": "b", "workload": {}, "provider": "third", "skipped": "not installed"},
    ]
    lines = table(rows).splitlines()
    assert lines[2].split() == ["|", "first", "|", "2", "|", "1", "to", "4", "|", "1.00", "|"]
    assert lines[3].split()[-2] == "1.50"
    assert "- third: not installed" in lines
    assert "- first: times spread" in lines


def test_a_wrong_result_gets_no_time():
    case = case_of(
        [contender("wrong", lambda: 1), contender("right", lambda: 2)], lambda one: "3 is 4" if one == 1 else None
    )
    rows = run_case(case)
    assert [row.get("skipped") for row in rows] == ["WRONG: 3 is 4; not timed", None]


class ForwardOff(providers.FusedAdagrad):
    def forward(self, codes):
        return super().forward(codes) * 1.001


class RateOff(providers.FusedAdagrad):
    @staticmethod
    def make(params, lr):
        return providers.optim.RowWiseAdagrad(params, lr=1.1 * lr)


class SkipsATable(providers.FusedAdagrad):
    """Order 4, head 0, gets no update."""

    def update(self):
        start = self.spec.offsets[3][0]
        with torch.no_grad():
            self.weight[start : start + self.spec.rows_per_order[3]] = self.kept
        super().update()

    def forward(self, codes):
        start = self.spec.offsets[3][0]
        self.kept = self.weight.detach()[start : start + self.spec.rows_per_order[3]].clone()
        return super().forward(codes)


class TouchesAnotherRow(providers.FusedTable):
    def update(self):
        super().update()
        with torch.no_grad():
            self.weight.add_(1e-3)


class DropsAHead(providers.DenseTable):
    def backward(self, out, grad):
        grad = grad.clone()
        grad[:, :, :64] = 0
        super().backward(out, grad)


def names_and_skips(case):
    return {row["provider"]: row.get("skipped", "") for row in run_case(case)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("codes", ["uniform", "hot"])
@pytest.mark.parametrize("wrong", [ForwardOff, RateOff, SkipsATable, TouchesAnotherRow])
def test_a_wrong_training_step_is_caught(wrong, codes, dtype):
    if wrong is ForwardOff and dtype == "bfloat16":
        return  # a thousandth is less than its rounding
    wrong.gradient = wrong.__name__
    case = tables._training(Workload(300, codes, 500, dtype), "cpu", (providers.FusedAdagrad, wrong))
    found = names_and_skips(case)
    assert found[wrong.trains()].startswith("WRONG")
    assert not found[providers.FusedAdagrad.trains()]


@pytest.mark.parametrize("provider", providers.TRAINERS, ids=lambda p: p.__name__)
@pytest.mark.parametrize(("codes", "dtype"), [("hot", "float32"), ("zipf 1.2", "float32"), ("zipf 1.2", "bfloat16")])
def test_right_training_steps_pass(provider, codes, dtype):
    if provider is providers.CompiledTable:
        return  # compiles for seconds; the quick run has it
    case = tables._training(Workload(300, codes, 500, dtype), "cpu", (provider,))
    (reason,) = names_and_skips(case).values()
    assert not reason.startswith(("WRONG", "FAILED"))


def test_a_wrong_gradient_is_caught(monkeypatch):
    DropsAHead.gradient = "a head dropped"
    monkeypatch.setattr(tables, "GRADIENTS", (providers.DenseAdamW, DropsAHead, providers.AddedTable))
    found = names_and_skips(tables.gradient("cpu", sids=300, codes="uniform", table_rows=500, dtype="float32"))
    assert [name for name, reason in found.items() if reason] == [f"{DropsAHead.reads}, a head dropped"]
    assert found[f"{DropsAHead.reads}, a head dropped"].startswith("WRONG")


def test_a_wrong_token_stream_is_caught(monkeypatch):
    read = tables.EagerTokens.__call__
    monkeypatch.setattr(tables.EagerTokens, "__call__", lambda self, ids: read(self, ids).roll(1, 1))
    found = names_and_skips(tables.tokens("cpu", **suite.BENCHMARKS["tokens"].quick))
    assert {name: reason[:5] for name, reason in found.items()} == {
        "prefixmem_fast": "", providers.EagerTables.reads: "WRONG", providers.FusedTable.reads: "WRONG",
    }  # fmt: skip


@pytest.mark.parametrize("fault", ["forward", "update"])
def test_a_wrong_pretraining_step_is_caught(fault, monkeypatch):
    from bench.benchmarks import pretraining

    if fault == "forward":
        forward = providers.EagerTables.forward
        monkeypatch.setattr(providers.EagerTables, "forward", lambda self, codes: forward(self, codes.flip(0)))
    else:
        monkeypatch.setattr(providers.EagerTables, "update", lambda self: None)
    found = names_and_skips(pretraining.pretraining("cpu", **suite.BENCHMARKS["pretraining"].quick))
    assert [name for name, reason in found.items() if reason] == [providers.EagerTables.trains()]


def test_an_encoder_that_a_language_model_does_not_see_is_caught(monkeypatch):
    from bench.benchmarks import language_model

    monkeypatch.setattr(language_model, "attach", lambda model, encoder, vocabulary: model)
    found = names_and_skips(language_model.language_model("cpu", **suite.BENCHMARKS["language-model"].quick))
    assert not found["without the encoder"]
    assert all(found[name].startswith("WRONG") for name in found if name.startswith("prefixmem_fast"))


def test_a_wrong_decoding_step_is_caught(monkeypatch):
    from bench.benchmarks import decoding

    step = decoding.Recomputed.step
    monkeypatch.setattr(decoding.Recomputed, "step", lambda self, level, codes: step(self, level, codes) * 1.01)
    found = names_and_skips(decoding.decoding("cpu", **suite.BENCHMARKS["decoding"].quick))
    assert not found["prefixmem_fast, DecodingState"]
    assert found["eager PyTorch, the prefix read anew"].startswith("WRONG")


def test_a_wrong_allowed_set_is_caught(monkeypatch):
    from bench.benchmarks import constrained

    monkeypatch.setattr(constrained, "nested_dicts", lambda tokens: lambda batch, sentence: [constrained.EOS])
    found = names_and_skips(constrained.constrained("cpu", 2048, 50, 2, 2))
    assert [name for name, reason in found.items() if reason] == ["prefix_allowed_tokens_fn, nested dicts"]


def test_sampled_rows_are_the_reference():
    workload = Workload(300, "hot", 500)
    codes, grad = workload.batches("cpu")[1], workload.gradient("cpu")
    sample = tables.sampled_rows(workload, codes, grad)
    expected = torch.zeros(workload.spec.total_rows, 64, dtype=torch.float64)
    touched, values, _ = reference.row_sums(grad.double(), codes, workload.spec, torch.float64)
    expected[touched] = values
    torch.testing.assert_close(sample.sums, expected[sample.rows])
    assert (sample.terms == 0).any(), "untouched rows are among them"
    assert sample.terms.max() > 100, "and hot ones"
    assert set(sample.table.tolist()) == set(range(16))


def test_providers_agree_on_the_gradient():
    codes, grad = torch.randint(0, 2048, (64, 5)), torch.randn(64, 2, 256)
    weight = torch.randn(SMALL.spec.total_rows, 64)
    expected = reference.dense_gradient(grad, codes, SMALL.spec)
    for provider in (providers.FusedTable, providers.EagerTables, providers.AddedTable, providers.DenseAdamW):
        one = provider(SMALL.spec, weight.clone())
        one.backward(one.forward(codes), grad)
        found = torch.cat([table.grad.to_dense() for table in one.tables()])
        torch.testing.assert_close(found, expected)


def test_floors_count_bytes():
    """Two SIDs that share all rows but those of order 4: 12 + 2 x 4 distinct rows of 16 + 16 reads."""
    codes = torch.tensor([[1, 2, 3, 4, 0], [1, 2, 3, 5, 0]])
    workload = Workload(2, "uniform", 500, "bfloat16")
    distinct, reads = workloads.touched(codes, workload.spec)
    assert (distinct, reads) == (20, 32)
    vectors = 2 * 2 * 256 * 2
    assert workload.reading(codes) == (80 + vectors + 20 * 128, 80 + vectors + 32 * 128)
    fixed = 80 + vectors + 2 * workloads.SORT_BYTES
    assert workload.training(codes) == (fixed + 20 * 2 * 132, fixed + 32 * 2 * 132)
    ended = codes.clone()
    ended[:, 2] = -1
    assert workloads.touched(ended, workload.spec) == (8, 16)


def test_workloads_are_what_they_say():
    uniform, hot, steep = (Workload(4000, codes).batches("cpu") for codes in ("uniform", "hot", "zipf 1.2"))
    assert all(torch.equal(a, b) for a, b in zip(uniform, Workload(4000).batches("cpu"), strict=True))
    assert not torch.equal(uniform[0], uniform[1])
    assert (hot[0] == hot[0][0]).all(1).float().mean() == pytest.approx(0.5, abs=0.01)
    share = (steep[0][:, 0] == 0).float().mean()
    chance = torch.arange(1, 2049, dtype=torch.float64) ** -1.2
    assert share == pytest.approx(float(chance[0] / chance.sum()), abs=0.03)
    with pytest.raises(ValueError, match="codes = 'skewed'; allowed are"):
        Workload(4, "skewed").batches("cpu")


def test_real_histories_are_read_where_they_are(monkeypatch):
    reason = workloads.no_histories()
    monkeypatch.setattr(workloads, "REAL", ROOT / "nowhere")
    names = names_and_skips(tables.forward_sweep("cpu", codes="histories", sids=64, table_rows=500, dtype="float32"))
    assert all("no real histories" in reason for reason in names.values())
    if reason is None:
        monkeypatch.undo()
        found = Workload(5000, "histories")
        assert found.spec.active_levels == (2, 3)
        assert len(found.batches("cpu")[0].unique(dim=0)) < 5000, "users meet the same items"


@pytest.mark.parametrize("name", ["peer", "prefixmem_fast"])
@pytest.mark.parametrize("where", ["set-up", "step"])
def test_a_failure_is_named_and_the_others_go_on(name, where, capsys):
    def fail(*given):
        raise RuntimeError("no\nsuch kernel")

    def step(one, turn, mark):
        if one == "bad" and turn >= 0:
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
    def step(one, turn, mark):
        if one == "greedy" and turn >= 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")
        mark("step")

    case = case_of([contender("greedy", lambda: "greedy"), contender("modest", lambda: "modest")], step=step)
    rows = run_case(case)
    assert rows[0]["skipped"] == "left out: CUDA out of memory. Tried"
    assert rows[1]["metric"] == "step"


def test_turns_go_one_way_and_back():
    taken = []

    def step(one, turn, mark):
        taken.append((turn, one))
        mark("step")

    run_case(case_of([contender("a", lambda: "a"), contender("b", lambda: "b")], step=step))
    assert taken[2:6] == [(0, "a"), (0, "b"), (1, "b"), (1, "a")]


def test_totals_floors_and_steps():
    def step(one, turn, mark):
        mark("forward")
        mark("backward")

    case = case_of(
        [contender("a")], step=step, totals={"step": ("forward", "backward")}, steps=4,
        floors={"step": workloads.Floor(1e6, 2e6)}, alone=lambda one: {"sorts": lambda: None},
    )  # fmt: skip
    rows = {row["metric"]: row for row in run_case(case)}
    assert set(rows) == {"forward", "backward", "sorts alone", "step"}
    assert rows["step"]["p50"] == pytest.approx(rows["forward"]["p50"] + rows["backward"]["p50"], rel=1)
    assert rows["step"]["floor"]["percent_algorithmic"] == pytest.approx(
        2 * rows["step"]["floor"]["percent_distinct"], abs=0.02
    )


def test_a_wide_spread_and_slow_clocks_are_said():
    row = {"p20": 1.0, "p50": 2.0, "p80": 3.0}
    (spread,) = suite._remarks(row, {})
    assert spread == "times spread by 100% of the median, above 20%"
    even = {"p20": 1.99, "p50": 2.0, "p80": 2.01}
    assert suite._remarks(even, {"slowed_by": ["SwPowerCap"]}) == ["clocks were held down by its power limit"]
    assert suite._remarks(even, {"problem": "clocks are unknown"}) == ["clocks are unknown"]


def test_the_state_of_a_gpu_is_read(monkeypatch):
    reads = iter([(1980, 0), (1500, 0x4 | 0x1), (1980, 0)])

    def clock(handle, kind):
        return current[0] if kind == "sm" else 3201

    current = [0]

    def reasons(handle):
        current[0], bits = next(reads)
        return bits

    fake = types.SimpleNamespace(
        NVMLError=OSError, NVML_CLOCK_SM="sm", NVML_CLOCK_MEM="memory", NVML_TEMPERATURE_GPU=0, nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid, nvmlDeviceGetCurrentClocksEventReasons=reasons,
        nvmlDeviceGetClockInfo=clock, nvmlDeviceGetTemperature=lambda *_: 50, nvmlDeviceGetPowerUsage=lambda _: 612_345,
        nvmlClocksEventReasonSwPowerCap=0x4, nvmlClocksEventReasonHwSlowdown=0x8,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: types.SimpleNamespace(uuid="7"))
    monkeypatch.setattr(machine.DeviceState, "EVERY", 0.0)
    state = machine.DeviceState()
    state.sample()
    state.sample()
    expected = {"sm_mhz": [1500, 1980], "memory_mhz": [3201, 3201], "celsius": [50, 50], "watts": [612.3, 612.3]}
    assert state.take() == {**expected, "slowed_by": ["SwPowerCap"]}
    assert state.take() == {}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install nvidia-ml-py" in machine.DeviceState().take()["problem"]


class FakeEvent:
    """A device whose time is the number of events so far, in milliseconds."""

    count = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        FakeEvent.count += 1
        self.at = FakeEvent.count

    def elapsed_time(self, other):
        return other.at - self.at


def test_device_times_are_those_between_events(monkeypatch):
    monkeypatch.setattr(measure.DeviceClock, "device", "cpu")
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    samples = []
    clock = measure.DeviceClock(lambda: samples.append(1))

    def step(mark):
        mark("forward")
        torch.cuda.Event(enable_timing=True).record()  # a phase of two milliseconds
        mark("backward")

    found = clock.time(step, key="a")
    assert (found["forward"], found["backward"]) == (1e-3, 2e-3)
    assert found["host"] > 0
    assert samples == [1]
    assert clock._lead == {"a": found["host"]}


def test_what_training_needs_counts_float32_state_of_half_precision():
    full, half = Workload(64, table_rows=500), Workload(64, table_rows=500, dtype="bfloat16")
    assert half.table_bytes * 2 == full.table_bytes
    assert providers.FusedLazyAdam.needs(full) == 3 * full.table_bytes
    assert providers.FusedLazyAdam.needs(half) == half.table_bytes + 2 * full.table_bytes
    assert providers.EagerTables.needs(half) == 5 * half.table_bytes


def test_quantiles_stay_within_the_values():
    assert measure.quantiles([5.0]) == {"p50": 5.0, "p20": 5.0, "p80": 5.0}
    found = measure.quantiles([1.0, 2.0, 10.0])
    assert (found["p20"], found["p50"], found["p80"]) == (pytest.approx(1.4), 2.0, pytest.approx(6.8))


def test_the_plan_takes_the_first_workload_of_each_benchmark_first():
    for device in ("cpu", "cuda"):
        plan = suite.plan(list(suite.BENCHMARKS), device, quick=False)
        assert [one.name for one, _, _ in plan[: len(suite.BENCHMARKS)]] == list(suite.BENCHMARKS)
        assert len({(one.name, str(workload)) for one, workload, _ in plan}) == len(plan), "none twice"
        assert all((audit > 0) == (i < len(suite.BENCHMARKS)) for i, (_, _, audit) in enumerate(plan))
    codes = {workload.get("codes") for _, workload, _ in plan}
    assert codes >= {"uniform", "zipf 0.8", "zipf 1.05", "zipf 1.2", "histories", "hot"}
    assert {workload.get("sids") for _, workload, _ in plan} >= {1, 1 << 20}
    assert {workload.get("table_rows") for _, workload, _ in plan} >= {500_000, 2_000_000, 5_000_000}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nothing"], "no benchmark is named 'nothing'; there are forward"),
        (["run", "--where", "sids"], "--where sids: give name=value"),
        (["run", "--where", "sids=7"], "no workload has these values"),
        (["run", "--set", "rows=7"], "--set rows=7: give name=value, with a name of beams"),
        (["run", "--set", "sids=many"], "--set sids=many: give a whole number above 0"),
        (
            ["run", "forward", "--quick", "--set", "dtype=int8"],
            "dtype = 'int8'; allowed are float32, bfloat16, float16",
        ),
        (["run", "forward", "--quick", "--set", "codes=zipf"], "codes = 'zipf'; allowed are uniform, zipf <exponent>"),
        (["run", "--seconds", "0"], "--seconds 0.0 is not above 0"),
        (["report", "nowhere.jsonl"], "nowhere.jsonl"),
        (["compare", "nowhere.jsonl", "HEAD"], "'nowhere.jsonl' is neither a file of rows nor a revision"),
        (["scale", "--items", "0"], "--items 0.0 is below 1"),
    ],
)
def test_bad_input_is_one_line(arguments, words, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_file_that_holds_no_rows_is_refused(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"benchmark": "a", "workload": {}, "provider": "b"}\n{"benchmark"\n')
    assert main(["report", str(path)]) == 2
    assert f"{path}, line 2 is not a row" in capsys.readouterr().err
    path.write_text("")
    assert main(["report", str(path)]) == 2


def test_list_names_benchmarks_and_workloads(capsys):
    assert main(["list", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["benchmark"] for row in rows] == list(suite.BENCHMARKS)
    assert all(row["summary"] and row["workloads"] for row in rows)


def test_a_workload_of_ones_own(tmp_path):
    out = tmp_path / "rows.jsonl"
    arguments = [
        "run",
        "tokens",
        "forward-sweep",
        "--set",
        "sids=96",
        "table_rows=700",
        "codes=zipf 1.5",
        "--out",
        str(out),
    ]
    assert main([*arguments, "--share", "0.01"]) == 0
    rows = read_rows(out)
    assert {row["benchmark"] for row in rows} == {"tokens", "forward-sweep"}
    expected = {"codes": "zipf 1.5", "sids": 96, "table_rows": 700, "dtype": "float32"}
    assert all(row["workload"] == expected for row in rows)


def test_seconds_leave_later_workloads_out(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    arguments = ["run", "constrained", "decoding", "--quick", "--seconds", "0.000001", "--out", str(out)]
    assert main(arguments) == 0
    assert "2 workloads left out: the 1e-06 seconds of --seconds were over" in capsys.readouterr().err
    assert not out.exists()


def test_the_gpu_suite_says_that_there_is_no_gpu():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = subprocess.run([sys.executable, "bench/gpu.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines][-4:] == ["tests", "sanitizer", "benchmarks", "counters"]
    assert all(line.endswith("skipped: torch finds no GPU") for line in lines)


def test_the_gpu_suite_builds_the_package_and_keeps_its_time(tmp_path, capsys, monkeypatch):
    """With a device that is only said to be there: what would run, in which stages, from which packages."""
    from bench import gpu

    stages = []

    def stage(parts, out, seconds):
        stages.append((parts, seconds))
        return ["tests"] if len(stages) == 2 else []

    monkeypatch.setattr(gpu, "BUILD", tmp_path / "build")
    monkeypatch.setattr(gpu, "_no_gpu", lambda: None)
    monkeypatch.setattr(gpu, "_gpu_name", lambda: "a-gpu")
    monkeypatch.setattr(gpu, "_stage", stage)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out"), "--seconds", "400"])
    assert gpu.main() == 1
    assert capsys.readouterr().out.endswith("failed: tests\n")
    assert [len(parts) for parts, _ in stages] == [1, gpu.PARITY_PROCESSES + 2, 1, 1]
    (benchmarks,), seconds = stages[2]
    assert benchmarks.command[-1] == str(tmp_path / "out" / "a-gpu.jsonl")
    assert float(benchmarks.command[benchmarks.command.index("--seconds") + 1]) < seconds < 400
    environment = {**os.environ, "PYTHONPATH": f"{gpu.BUILD}{os.pathsep}{ROOT}"}
    code = "import prefixmem_fast.kernels, prefixmem_fast.bench.cli, bench; print(prefixmem_fast.__file__)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=gpu.BUILD, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith(str(gpu.BUILD)), done.stderr


def test_stages_of_the_gpu_suite_run_side_by_side_and_are_cut_off(tmp_path, capsys, monkeypatch):
    from bench import gpu

    monkeypatch.setattr(gpu, "BUILD", tmp_path)
    code = "import sys, time; print('begun', flush=True); time.sleep(float(sys.argv[1])); sys.exit(int(sys.argv[2]))"
    part = lambda name, *values: gpu.Part(name, [sys.executable, "-c", code, *map(str, values)])  # noqa: E731
    parts = [part("good", 0, 0), part("bad", 0, 3), part("late", 60, 0), gpu.Part("none", [], "not on the PATH")]
    assert sorted(gpu._stage(parts, tmp_path, 4)) == ["bad", "late"]
    text = capsys.readouterr().out
    assert "== none: skipped: not on the PATH" in text
    assert "== bad: exit code 3" in text
    assert "== late: cut off" in text
    assert (tmp_path / "logs" / "late.log").read_text() == "begun\n", "what it wrote is kept"


def test_benchmarks_register_once():
    assert benchmarks.tables is tables
    with pytest.raises(KeyError):
        suite.BENCHMARKS["nothing"]
