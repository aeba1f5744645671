"""`prefixmem plan`, and its output on the scale page."""

import json
import re
import shlex
from pathlib import Path

import pytest

from prefixmem_fast.cli import main

SCALE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()


def run_json(capsys, *arguments):
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_plan(capsys):
    found = run_json(capsys, "--gpus", "8", "--items", "1e9", "--rows", "2e6", "--gradients", "float32")
    layouts = {layout["name"]: layout for layout in found["layouts"]}
    assert (found["items"], found["table_rows"], found["rows"]) == (10**9, 2_000_000, 24_008_192)
    assert found["bytes"] == 132 * found["rows"]
    assert found["prefixes_a_row"] == pytest.approx(500, rel=1e-3)
    assert layouts["replicate"]["bytes_sent_a_sid"] == 14_406
    assert layouts["replicate"]["microseconds_a_sid"] == pytest.approx(14_406 / 50e3)
    assert layouts["shard"]["bytes_sent_a_sid"] == 4422  # S in bfloat16, as the tables are
    assert found["recommended"] == "replicate"
    assert found["code"][1].startswith("model = distributed.replicate(model, comm_dtype=torch.float32)")


@pytest.mark.parametrize(
    ("flags", "bytes_a_row"),
    [
        (["--optimizer", "sgd"], 128),
        (["--optimizer", "row-adam"], 388),
        (["--optimizer", "lazy-adam"], 640),
        (["--table-dtype", "float32"], 260),
        (["--memory-dim", "512"], 260),
        (["--memory-dim", "512", "--heads", "8"], 132),
    ],
)
def test_bytes_of_a_row(capsys, flags, bytes_a_row):
    found = run_json(capsys, "--gpus", "2", *flags)
    assert found["bytes"] == bytes_a_row * found["rows"]


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ([], "replicate"),
        (["--encoder-alone"], "shard"),
        (["--gpu-gb", "4"], "shard"),
        (["--gpu-gb", "1"], "to_torchrec"),
        (["--gpu-gb", "0.1"], "host"),
        (["--gpu-gb", "0.1", "--host-gb", "5"], "to_torchrec, host"),
        (["--gpu-gb", "0.1", "--host-gb", "0.1"], None),
        (["--rows", "5e7", "--room", "0.5"], "shard"),
        (["--optimizer", "lazy-adam", "--rows", "5e7"], "to_torchrec"),
    ],
)
def test_the_layout_that_is_recommended(capsys, flags, name):
    assert run_json(capsys, "--gpus", "8", *flags)["recommended"] == name


def test_what_is_sent_follows_the_shape(capsys):
    shape = ["--levels", "3", "--orders", "2", "--heads", "2", "--memory-dim", "32", "--active", "1"]
    found = run_json(capsys, "--gpus", "4", "--link-gb", "1", "--batch", "10", *shape)
    sent = {layout["name"]: layout["bytes_sent_a_sid"] for layout in found["layouts"]}
    tables = found["rows"] * 32
    assert sent["replicate"] == (6 + 64) * 3
    assert sent["shard"] == 6 + 64 + 2 * (6 + 32)  # 2 x 2 ranks
    assert sent["to_torchrec"] == 4 * (8 + 64) * 3 / 4 + 8 * 3
    assert sent["dense DDP"] == 2 * 3 / 4 * tables / 10
    assert found["layouts"][1]["microseconds_a_sid"] == pytest.approx(0.21)


def test_of_nothing_that_fits(capsys):
    assert main(["plan", "--gpus", "1", "--rows", "1e10"]) == 0
    assert "\nnothing fits: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the following arguments are required: --gpus"),
        (["--gpus", "0"], "argument --gpus: '0' is no whole number of 1 or more"),
        (["--gpus", "2.5"], "argument --gpus: '2.5' is no whole number of 1 or more"),
        (["--gpus", "8", "--items", "inf"], "argument --items: 'inf' is no whole number of 1 or more"),
        (["--gpus", "8", "--items", "many"], "argument --items: 'many' is no whole number of 1 or more"),
        (["--gpus", "8", "--link-gb", "0"], "argument --link-gb: '0' is no finite number above 0"),
        (["--gpus", "8", "--room", "1.2"], "--room = 1.2 is above 1; give a share of a GPU's memory"),
        (["--gpus", "12"], "--gpus = 12 is no multiple of --gpus-per-host = 8; give the GPUs that each host has"),
        (["--gpus", "8", "--heads", "3"], "--memory-dim = 256 is no multiple of --heads = 3"),
        (["--gpus", "8", "--heads", "512"], "--heads = 512 is above --memory-dim = 256"),
        (["--gpus", "8", "--active", "6"], "--active = 6 is above --levels = 5"),
        (["--gpus", "8", "--levels", "1e9"], "--levels = 1000000000 is above 1024"),
        (["--gpus", "8", "--optimizer", "adam"], "argument --optimizer: invalid choice: 'adam'"),
        (["--gpus", "8", "--codes", "9e18"], "use smaller codebooks"),
        (["--gpus", "8", "--gpu", "8"], "--gpu is unknown, --gpus is near"),
    ],
)
def test_bad_input_is_one_line(capsys, flags, message):
    try:
        code = main(["plan", *flags])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert (code, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert captured.err.startswith("prefixmem plan: ")
    assert message in captured.err


SHOWN = re.findall(r"^    prefixmem (plan .*)\n\n```\n((?:(?!```).*\n)*)```", SCALE, flags=re.MULTILINE)


@pytest.mark.parametrize(("command", "output"), SHOWN, ids=[command for command, _ in SHOWN])
def test_the_page_shows_what_is_printed(capsys, command, output):
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out == output


def test_the_page_shows_both_sizes():
    assert [command for command, _ in SHOWN] == [
        f"plan --gpus 8 --items 1e9 --rows {rows}" for rows in ("2e6", "2.5e8")
    ]
