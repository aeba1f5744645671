"""The command: rows, reports, and bad input."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from bench.benchmarks import providers
from bench.cli import main
from bench.registry import BENCHMARKS
from bench.report import table
from bench.rows import append_rows, floor_percent, read_rows
from tests.bench.cases import SMALL_CACHE


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One run of every benchmark on its tiny workload; what it printed, and its file of rows."""
    out, printed = tmp_path_factory.mktemp("bench") / "deep" / "rows.jsonl", io.StringIO()
    uncompiled = mock.patch.object(torch._dynamo.config, "disable", True)  # compiling takes longer than all the rest
    with uncompiled, SMALL_CACHE, contextlib.redirect_stdout(printed):
        assert main(["run", "--quick", "--share", "0.02", "--out", str(out)]) == 0
    return printed.getvalue(), out


def test_every_benchmark_writes_rows(quick):
    text, out = quick
    rows = read_rows(out)
    assert {row["benchmark"] for row in rows} == set(BENCHMARKS)
    for name in BENCHMARKS:
        timed = [row for row in rows if row["benchmark"] == name and row.get("unit") == "ms"]
        assert any(row["provider"].startswith("prefixmem_fast") for row in timed), name
        assert all(0 <= row["p20"] <= row["p50"] <= row["p80"] and row["repeats"] >= 3 for row in timed)
    skipped = [row for row in rows if "skipped" in row]
    assert all(
        "GPU" in row["skipped"] or "not installed" in row["skipped"] or "on a CPU" in row["skipped"] for row in skipped
    )
    assert {row["provider"] for row in rows} >= {p.trains() for p in providers.TRAINERS}
    assert any(row.get("metric") == "peak memory" and row["p50"] >= 0 for row in rows)
    assert all(row["provider"] in text for row in rows)


def test_floors_are_set_beside_the_times(quick):
    rows = [row for row in read_rows(quick[1]) if "floor" in row]
    assert {row["metric"] for row in rows} >= {"forward", "backward", "step", "backward + update"}
    for row in rows:
        seconds, bandwidth = row["p50"] / 1e3, row["ceilings"]["copy_bytes_per_second"]
        assert floor_percent(row)[0] == pytest.approx(100 * row["floor"]["distinct"] / bandwidth / seconds, abs=0.006)
        assert row["floor"]["distinct"] <= row["floor"]["every_read"]


def test_a_run_says_once_where_it_was_measured(quick):
    lines = [json.loads(line) for line in quick[1].read_text().splitlines()]
    assert [("machine" in line) for line in lines] == [True] + [False] * (len(lines) - 1)
    assert all(line["run"] == lines[0]["run"] for line in lines)
    for row in read_rows(quick[1]):
        assert all(row[name] == lines[0][name] for name in ("machine", "versions", "commit", "date", "ceilings"))


def test_report_draws_and_writes_tables(quick, tmp_path, capsys):
    from matplotlib.image import imread

    assert main(["report", str(quick[1]), "--out", str(tmp_path / "page")]) == 0
    written = [Path(line) for line in capsys.readouterr().out.split()]
    page = (tmp_path / "page" / "tables.md").read_text()
    assert all(f"## {name}: " in page for name in BENCHMARKS)
    pictures = [path for path in written if path.suffix == ".png"]
    assert {path.name for path in pictures} >= {"speed_up.png", "floor.png"}
    for path in pictures:
        assert imread(path).std() > 0.05, f"{path} is blank"
        assert f"({path.name})" in page
    assert not list((tmp_path / "page").glob("*.part*"))


def test_the_table_says_who_was_left_out_and_what_to_think_of_times():
    base = {"benchmark": "b", "workload": {}, "metric": "step", "unit": "ms", "p20": 1.0, "repeats": 5}
    rows = [
        {**base, "provider": "first", "p50": 2.0, "p80": 4.0},
        {**base, "provider": "second", "p50": 3.0, "p80": 1.1, "state": {"slowed_by": ["SwPowerCap"]}},
        {"benchmark": "b", "workload": {}, "provider": "third", "skipped": "not installed"},
        {**base, "provider": "fourth", "p50": 9.0, "p80": 1.1, "state": {"problem": "clocks are unknown"}},
    ]
    lines = table(rows).splitlines()
    assert lines[2].split() == ["|", "first", "|", "2", "|", "1", "to", "4", "|", "1.00", "|"]
    assert lines[3].split()[-2] == "1.50"
    assert lines[-4:] == [
        "- third: not installed",
        "- first: times spread by 150% of the median, above 20%",
        "- second: clocks were held down by its power limit",
        "- fourth: clocks are unknown",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nothing"], "no benchmark is named 'nothing'; there are forward"),
        (["run", "--set", "sids"], "--set sids: give name=value"),
        (["run", "--quick", "--set", "rows=7"], "--set rows=7: give name=value, with a name of beams"),
        (["run", "tokens", "--quick", "--set", "sids=many"], "--set sids=many: give a whole number above 0"),
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
def test_bad_input_is_one_line(arguments, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # rows of a run that should not have begun do not go to the stored ones
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_file_that_holds_no_rows_is_refused(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    append_rows(path, {"run": "1", "machine": {}}, [{"benchmark": "a", "workload": {}, "provider": "b"}])
    good = path.read_text()
    for bad in ('{"benchmark"', '{"run": "1"}', '{"run": "2", "benchmark": "a", "workload": {}, "provider": "b"}'):
        path.write_text(f"{good}{bad}\n")
        assert main(["report", str(path)]) == 2
        assert f"{path}, line 3 is neither the record of a run nor a row" in capsys.readouterr().err
    path.write_text("")
    assert main(["report", str(path)]) == 2
    assert "holds no rows" in capsys.readouterr().err


def test_list_names_benchmarks_and_workloads(capsys):
    assert main(["list", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["benchmark"] for row in rows] == list(BENCHMARKS)
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


def test_rows_do_not_go_to_those_that_are_committed(tmp_path, monkeypatch, capsys):
    """The folder that is written without --out is one that git ignores; and where nobody watches, lines say how far."""
    committed = tmp_path / "bench" / "results"
    committed.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert main(["run", "constrained", "tokens", "--quick", "--share", "0.01"]) == 0
    (written,) = (tmp_path / "runs" / "bench").iterdir()
    assert read_rows(written)
    assert not list(committed.iterdir())
    root = Path(__file__).parents[2]
    assert "runs/" in (root / ".gitignore").read_text().split()
    lines = re.findall(r"^([12]) of 2, after \d+ s: (constrained|tokens), .+$", capsys.readouterr().err, re.MULTILINE)
    assert lines == [("1", "constrained"), ("2", "tokens")]


def test_what_had_no_time_is_said_and_not_stored(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(providers.CompiledTable, "warm_up", 1e6)
    out = tmp_path / "rows.jsonl"
    assert main(["run", "forward", "--quick", "--seconds", "600", "--share", "0.01", "--out", str(out)]) == 0
    assert "it compiles for about 1000000 seconds, and --seconds leaves" in capsys.readouterr().out
    names = {row["provider"] for row in read_rows(out)}
    assert "prefixmem_fast" in names
    assert "torch.compile of one fused table" not in names


@pytest.mark.slow
@pytest.mark.parametrize("module", ["bench", "prefixmem_fast.cli bench"])
@pytest.mark.parametrize("action", ["list", "scale --items 1e6"])
def test_a_reader_that_goes_away_ends_it_quietly(module, action):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", *module.split(), *action.split()]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        error = process.stderr.read().decode()
        assert process.wait() == 141
    assert "roken" not in error
    assert "Traceback" not in error


def test_traffic_is_counted_by_a_process_that_interprets(monkeypatch, capsys):
    """Triton reads TRITON_INTERPRET when it is imported, and this package imports it first."""
    code = (
        "import prefixmem_fast, sys\n"
        "from prefixmem_fast.checks import traffic\n"
        "traffic.COUNTS = traffic.COUNTS[:1]\n"
        "from prefixmem_fast.cli import main\n"
        "sys.exit(main(['bench', 'traffic', '--json']))\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["kernel"] == "forward, prefix, uniform, bfloat16"

    def run(command, env):
        assert command[1:] == ["-m", "prefixmem_fast.cli", "verify", "--traffic", "--json"]
        assert env["TRITON_INTERPRET"] == "1"
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr("prefixmem_fast.checks.counting.interpreting", lambda: False)
    monkeypatch.setattr("prefixmem_fast.checks.counting.subprocess.run", run)
    assert main(["traffic", "--json"]) == 7
