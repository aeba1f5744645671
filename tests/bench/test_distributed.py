"""The benchmark of layouts over processes: its bytes are those of the formulas, and a wrong layout gets no time."""

import importlib.util

import pytest

from bench.cli import main
from bench.distributed import cli, counting
from bench.distributed.layouts import LAYOUTS, LR, GatheredRows, Replicate, Task, TorchRec
from bench.rows import read_rows

SIDS, RANKS = 48, 2
HEADER = 64  # bytes a step and rank
OURS = {
    "prefixmem_fast, one process": 0,
    "prefixmem_fast, replicate": 2058,
    "prefixmem_fast, replicate, bfloat16": 1034,
    "prefixmem_fast, shard": 2058,
    "prefixmem_fast, shard, bfloat16": 1546,
}
DENSE = "DistributedDataParallel, dense gradient"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("distributed") / "rows.jsonl"
    sizes = ["--ranks", str(RANKS), "--sids", str(SIDS), "--table-rows", "300", "--turns", "3"]
    assert main(["distributed", *sizes, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def figures(tiny):
    return {(row["provider"], row["metric"]): row for row in read_rows(tiny) if "metric" in row}


@pytest.mark.slow
def test_every_layout_has_its_figures(figures, tiny):
    rows = read_rows(tiny)
    assert {row["provider"] for row in rows} == {layout.name for layout in LAYOUTS.values()}
    skipped = {row["provider"] for row in rows if "skipped" in row}
    assert skipped == ({TorchRec.name} if importlib.util.find_spec("torchrec") is None else set())
    for row in figures.values():
        assert 0 <= row["p20"] <= row["p50"] <= row["p80"]
        assert row["repeats"] == (1 if row["metric"] == "sent" else 3)
        assert row["workload"] == {
            "ranks": RANKS,
            "sids": SIDS,
            "codes": "uniform",
            "table_rows": 300,
            "dtype": "float32",
        }
    assert len({row["run"] for row in rows}) == 1


@pytest.mark.slow
def test_bytes_are_those_of_the_formulas(figures):
    for (name, metric), row in figures.items():
        if metric == "sent":
            over = SIDS * (row["p50"] - row["formula"])
            assert 0 <= round(over, 6) <= HEADER or (name == TorchRec.name and abs(over) < 0.01 * SIDS * row["p50"])
    assert {name: figures[name, "sent"]["formula"] for name in OURS} == OURS
    rows_bytes = 16 * 300 * 64 * 4
    assert figures[DENSE, "sent"]["formula"] == rows_bytes / SIDS  # 2 (W - 1) / W is 1
    assert 0 < figures[GatheredRows.name, "sent"]["formula"] <= 16 * 264


@pytest.mark.slow
@pytest.mark.skipif(counting.loopback_bytes() is None, reason="the system counts no bytes of its interfaces")
def test_the_loopback_interface_has_seen_them(figures):
    """Others use it too, so there is no upper limit."""
    for name in (*OURS, DENSE):
        assert figures[name, "loopback"]["p20"] >= 0.99 * figures[name, "sent"]["p50"]


@pytest.mark.slow
def test_the_report_is_a_table(tiny, capsys):
    assert main(["distributed", "--report", str(tiny)]) == 0
    text = capsys.readouterr().out
    assert "2 ranks, 48 SIDs, uniform, T = 300, float32" in text
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    figures = {cells[0]: cells[2:4] for cells in lines}
    assert figures["prefixmem_fast, replicate"] == ["2,058", "2,058"]
    assert figures["prefixmem_fast, shard, bfloat16"] == ["1,547", "1,546"]  # with the headers of 48 SIDs


class AllButOne(Replicate):
    """Leaves a Semantic ID of each rank's batch out."""

    name = "all but one"

    def step(self, codes, dS):
        super().step(codes[1:], dS[1:])


def test_a_wrong_layout_gets_no_time():
    rows = cli.measure(Task(2, 8, "uniform", 300), (AllButOne, Replicate), 3)
    (wrong,) = [row for row in rows if row["provider"] == AllButOne.name]
    assert wrong["skipped"].startswith("WRONG: after 2 steps its tables are off from those of one process by up to")
    assert {row["metric"] for row in rows if row["provider"] == Replicate.name} >= {"sent", "step"}
    assert "- all but one: WRONG" in cli.table(rows)


def test_names_of_layouts():
    assert tuple(LAYOUTS) == cli.KEYS


def test_tolerances_see_a_step_of_one_row():
    assert all((layout.tolerance or 0) < LR / 4 for layout in LAYOUTS.values())
    assert Replicate.tolerance_of(2) == Replicate.tolerance_of(4) == 0
    assert Replicate.tolerance_of(3) == 1e-6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "1"], "--ranks 1 is below 2"),
        (["--sids", "0"], "--sids 0 is below 1"),
        (["--table-rows", "0"], "--table-rows 0 is below 1"),
        (["--turns", "2"], "--turns 2 is below 3"),
        (["--layouts", "fsdp"], "--layouts fsdp: give some of one-process, replicate"),
        (["--table-rows", "900000000"], "give fewer --layouts, --table-rows or --ranks"),
        (["--codes", "zipf"], "codes = 'zipf'; allowed are uniform, zipf <exponent>"),
        (["--codes", "histories"], "--codes histories has codebooks of its own"),
        (["--report", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--out", "."], "is empty, or the folder"),
    ],
)
def test_bad_input_is_one_line(arguments, words, capsys):
    assert main(["distributed", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_file_without_its_rows_is_refused(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"run": "1", "machine": {}}\n{"run": "1", "benchmark": "a", "workload": {}, "provider": "b"}\n')
    assert main(["distributed", "--report", str(path)]) == 2
    assert "holds no rows of this benchmark" in capsys.readouterr().err
