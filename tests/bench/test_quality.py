"""The study: its arms, its control, one run from start to row, and the report."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import real_data
from bench.cli import main as bench
from bench.quality import arms, pace, picture, report
from bench.quality.control import PermutedCrossItem, PermutedPrefixMem, add_permuted
from bench.quality.hits import bootstrap_interval, packed, unpacked
from bench.quality.run import widened
from bench.rows import append_rows, read_rows
from prefixmem_fast import AddressSpec, PrefixMem, PrefixMemConfig, SIDVocabulary, prefix_rows
from prefixmem_fast.recommender.data import Histories
from prefixmem_fast.recommender.training.config import RunConfig
from prefixmem_fast.recommender.training.run import load_data
from tests.helpers.models import tiny_model, vocabulary
from tests.helpers.runs import TINY, write_real_files

SMALL = {
    "model_options": TINY,
    "table_rows": 40,
    "heads": 2,
    "max_order": 2,
    "memory_dim": 8,
    "history_codes": [2, 3],
    "history_rows": 60,
    "history_dim": 8,
    "batch_size": 40,
    "warmup_steps": 1,
    "max_items": 5,
}


@pytest.fixture
def small_study(tmp_path, monkeypatch):
    """One small set and a recipe of seconds; returns the arguments that every command needs."""
    files = write_real_files(tmp_path, monkeypatch)
    monkeypatch.setattr(arms, "SETS", {"small": arms.DataSet(*files, 2, 60, {"Theirs": (0.5, 0.25)})})
    for module in ("bench.quality.cli", "bench.quality.picture", "bench.quality.report"):
        monkeypatch.setattr(f"{module}.SETS", arms.SETS)
    monkeypatch.setattr(arms, "EPOCHS", 3)
    monkeypatch.setattr(arms, "EPOCHS_A_VALIDATION", 1)
    recipe = {**arms.RECIPE, **SMALL, "codebook_sizes": [6, 6, 6]}
    monkeypatch.setattr(arms, "RECIPE", recipe)
    short = {"steps": 4, "eval_every": 2, "log_every": 2, "batch_size": 16}
    for name, options in arms.PRETRAINING.items():
        monkeypatch.setitem(arms.PRETRAINING, name, {**options, **short})
    torch.set_num_threads(1)
    places = {"data": tmp_path, "runs": tmp_path / "runs", "out": tmp_path / "out"}
    return ["--sets", "small", *(word for name, path in places.items() for word in (f"--{name}", str(path)))]


def main(arguments):
    return bench(["quality", *arguments])


def test_every_arm_has_options_that_are_allowed():
    for arm in arms.ARMS:
        config = arms.config_of(arm, "beauty-mql4grec", Path("data"), 1)
        assert config.seed == 1
        assert config.steps == (60 if arm.startswith("tiger") else arms.EPOCHS) * 280
        assert config.steps == json.loads(arms.recipe(arm, "beauty-mql4grec"))[0] * 280
        assert config.steps // config.eval_every == 5
        assert bool(config.model_options) == (config.model == "decoder")  # the recipe's are GPT-2's
        assert (config.arm == "plain") == (arm in ("plain", "wide", "tiger"))
        assert bool(config.history) == arm.startswith(("cross-item", "pretrained"))


def test_runs_are_done_once_and_reported(tmp_path, small_study, capsys):
    for arm in ("plain", "permuted", "pretrained-prefixes", "cross-item-permuted"):
        assert main(["run-here", *small_study, "--arms", arm, "--seeds", "0", "--beams", "10", "--examples", "30"]) == 0
    file = tmp_path / "out" / "small.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [line for line in lines if "arm" in line]
    assert [row["arm"] for row in rows] == ["plain", "permuted", "pretrained-prefixes", "cross-item-permuted"]
    assert "reachable" not in rows[0]["test"]
    for row in rows[1:]:
        groups = row["test"]["reachable"]
        assert groups["reachable"]["examples"] + groups["unreachable"]["examples"] == row["test"]["examples"] == 30
    assert rows[2]["pretraining"]["steps"] == 4
    assert set(rows[2]["pretraining"]["validation"][-1]) >= {"accuracy_3"}
    assert "accuracy_1" not in rows[2]["pretraining"]["validation"][-1]  # which cross-item orders would predict
    assert str(tmp_path) not in file.read_text()  # rows name no place on a machine

    capsys.readouterr()
    tested = ["--beams", "10", "--examples", "30"]
    assert main(["list", *small_study, "--arms", "plain,permuted,prefixmem", "--seeds", "0,1", *tested]) == 0
    listed = capsys.readouterr().out
    assert listed.endswith("4 runs to do of 6\n")
    assert "plain             0" not in listed
    before = file.read_text()
    assert main(["run-here", *small_study, "--arms", "plain", "--seeds", "0", *tested]) == 0
    assert file.read_text() == before
    for others in ([], ["--beams", "10"], ["--beams", "9", "--examples", "30"]):
        assert main(["list", *small_study, "--arms", "plain", "--seeds", "0", *others]) == 0
        assert "1 runs to do of 1" in capsys.readouterr().out

    for row in rows:  # beams of 10 give no figure at 100
        for floor in row["test"]["floors"].values():
            floor["recall@50"] = floor["recall@100"] = 1.0
        for search in row["test"]["searches"].values():
            search["recall@50"] = search["recall@100"] = 1.0
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", *small_study]) == 0
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "equal time" not in text  # before the steps were timed
    accuracy = rows[0]["test"]["teacher_forcing"]["accuracy"][0]
    line = next(line for line in text.splitlines() if line.startswith("| token embeddings alone | 1 |"))
    assert float(line.split("|")[3]) == pytest.approx(accuracy, abs=1e-3)
    assert "count table" in text
    assert "on all test users: Theirs 0.5000 / 0.2500." in text
    assert "markov" in text
    timed = {"set": "small", "arm": "plain", "seconds_per_step": 0.25}
    append_rows(tmp_path / "out" / arms.PACE, {"run": "1", "machine": {}}, [timed])
    assert main(["report", *small_study]) == 0
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "after the 2 s that the plain model's steps take" in text  # 6 steps
    validation = [line for line in text.splitlines() if line.startswith("| token embeddings alone")][1]
    assert validation.split("|")[8].strip() == "250"  # ms a step
    for name in ("small.png", "recall.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_the_parts_of_a_recall_add_up_to_it():
    found = {"seen": {"recall@10": 0.5}, "new": {"recall@10": 0.1}}
    counted = {
        "seen": {"examples": 20, "markov_recall@10": 0.75},
        "new": {"examples": 80, "markov_recall@10": 0.0},
    }
    test = {
        "examples": 100,
        "searches": {"constrained": {"by_transition": found, "recall@10": 0.18}},
        "transitions": counted,
        "floors": {"markov": {"recall@10": 0.15}},
    }
    row = {"test": test}
    assert picture.parts_of(row) == pytest.approx([0.1, 0.08])
    assert sum(picture.parts_of(row)) == pytest.approx(test["searches"]["constrained"]["recall@10"])
    assert picture.parts_of(row, "markov") == pytest.approx([0.15, 0.0])


def test_equal_time_is_counted_with_the_pace_of_steps(tmp_path, small_study, monkeypatch, capsys):
    assert main(["pace-here", *small_study, "--arms", "plain,permuted,pretrained", "--turns", "2"]) == 0
    timed = read_rows(tmp_path / "out" / arms.PACE, ("arm", "of_first"))
    assert [row["arm"] for row in timed] == ["plain", "permuted"]  # the steps of "pretrained" are those of "cross-item"
    assert [row["of_first"] == 1.0 for row in timed] == [True, False]
    assert all(row["steps"] == 2 for row in timed)
    assert "ms a step" in capsys.readouterr().out
    assert set(report.read_pace(tmp_path / "out", "small")) == {"plain", "permuted"}

    row = {"arm": "pretrained", "validation": [{"step": 200, "loss": 9.0}, {"step": 400, "loss": 7.0}]}
    times = {"plain": 0.1, "cross-item": 0.125}
    assert report._at_time(row, 37.5, times, "loss") == 8.0  # 300 steps
    assert report._at_time({**row, "pretraining": {"seconds": 6.25}}, 37.5, times, "loss") == 8.5
    assert report._at_time({**row, "arm": "plain"}, 99.0, times, "loss") == 7.0
    with pytest.raises(KeyError):
        report._at_time({**row, "arm": "permuted"}, 1.0, times, "loss")
    longer = arms.Arm("other steps", {"steps": 9})
    monkeypatch.setitem(report.ARMS, "longer", longer)
    with pytest.raises(KeyError):
        report._at_time({**row, "arm": "longer"}, 1.0, times, "loss")  # its schedule is another


def test_a_pace_is_a_median_and_so_is_its_ratio(tmp_path, small_study, monkeypatch):
    times = {"plain": [0.2, 0.7, 0.3], "permuted": [0.1, 0.1, 0.9]}
    monkeypatch.setattr(pace, "seconds_of_steps", lambda runs, steps, turn: {name: times[name] for name in runs})
    rows = pace.measure("small", ["plain", "permuted"], tmp_path, 3)
    assert [row["seconds_per_step"] for row in rows] == [0.3, 0.1]
    assert [row["of_first"] for row in rows] == [1.0, 0.5]


@pytest.mark.parametrize(("codes", "expected"), [([0], 0), ([-9], 1), ([2], 1)])
def test_pace_fails_where_a_process_failed(small_study, monkeypatch, codes, expected):
    left = iter(codes)
    monkeypatch.setattr("subprocess.run", lambda command, **_: SimpleNamespace(returncode=next(left)))
    assert main(["pace", *small_study]) == expected


def test_rows_of_another_recipe_do_not_count(tmp_path, small_study, monkeypatch):
    assert main(["run-here", *small_study, "--arms", "plain", "--seeds", "0", "--beams", "4", "--examples", "9"]) == 0
    assert report.read_runs(tmp_path / "out", "small")["plain"]
    monkeypatch.setitem(arms.RECIPE, "learning_rate", 0.5)
    assert not report.read_runs(tmp_path / "out", "small")


def test_rows_of_fewer_test_users_or_beams_are_not_joined_with_others(tmp_path, small_study):
    file = tmp_path / "out" / "small.jsonl"
    record = {"run": "1", "machine": {}}
    row = {"arm": "plain", "recipe": arms.recipe("plain", "small")}
    for seed, examples, beams in ((0, 60, 100), (1, 60, 50), (2, 30, 100), (3, 60, 100)):
        append_rows(file, record, [{**row, "seed": seed, "test": {"examples": examples, "beams": beams}}])
    assert [row["seed"] for row in report.read_runs(tmp_path / "out", "small")["plain"]] == [0, 3]


def test_missing_and_other_data_are_refused(tmp_path, small_study, monkeypatch, capsys):
    monkeypatch.delenv(real_data.VARIABLE, raising=False)
    assert main(["run", "--sets", "small"]) == 2
    assert "no folder of real data: set PREFIXMEM_DATA or give --data" in capsys.readouterr().err
    monkeypatch.setenv(real_data.VARIABLE, str(tmp_path / "none"))
    assert main(["run", "--sets", "small"]) == 2
    error = capsys.readouterr().err
    assert "items.index.json is not there; get it: curl" in error
    assert error.count("\n") == 1
    (tmp_path / "interactions.json").write_text("{}")
    assert main(["run", *small_study]) == 2
    assert f"{tmp_path / 'interactions.json'} has the SHA-256 44136fa3" in capsys.readouterr().err


def test_unknown_names_are_refused(tmp_path, capsys):
    assert main(["report", "--out", str(tmp_path)]) == 2
    assert "no rows in" in capsys.readouterr().err
    assert main(["list", "--arms", "nothing"]) == 2
    assert "'nothing' is unknown; known are plain" in capsys.readouterr().err


def test_every_set_has_digests_of_its_files():
    for data_set in arms.SETS.values():
        assert {data_set.items, data_set.interactions} <= real_data.FILES.keys()
    assert all(len(digest) == 64 for _, digest in real_data.FILES.values())


def test_the_real_files_are_those_that_are_known(monkeypatch):
    try:
        assert real_data.checked_folder(real_data.FILES)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_the_widened_model_has_as_many_parameters(tmp_path, small_study, monkeypatch):
    config = arms.config_of("wide", "small", tmp_path, 0)
    data = load_data(config)
    options = widened(config, "small", tmp_path, data)
    assert options["n_inner"] == 8 * options["n_embd"]
    assert options["n_embd"] >= TINY["n_embd"]


def test_the_control_reads_real_prefixes_that_end_in_the_same_code():
    torch.manual_seed(0)
    sizes = (4, 5, 6)
    catalogue = torch.stack([torch.randint(0, size, (40,)) for size in sizes], 1).unique(dim=0)
    spec = AddressSpec(sizes, table_rows=500, heads=2, max_order=2, active_levels=(1, 2))
    encoder = PrefixMem(PrefixMemConfig(spec, memory_dim=8, hidden_size=16, output_init_std=1.0), grad="dense")
    control = PermutedPrefixMem(encoder, catalogue)
    tokens = {1 + 10 * l + c: (l + 1, c) for l, size in enumerate(sizes) for c in range(size)}
    vocabulary = SIDVocabulary.from_table(tokens, sizes)
    stream = vocabulary.encode(catalogue).flatten()[None].repeat(60, 1)

    control.encode_tokens(stream, vocabulary).square().sum().backward()
    touched = encoder.memory.weight.grad.abs().sum(1).nonzero().squeeze(1)
    real = prefix_rows(catalogue, spec)[:, :2]
    assert torch.equal(touched, real[real >= 0].unique())  # no row but those of the catalogue's prefixes, and all

    # At level 1 the prefix is the code itself, so nothing can be exchanged; at level 2 it is.
    level = vocabulary.table[stream[0], 0]
    for l, same in ((1, True), (2, False)):
        m = control.encode_tokens(stream, vocabulary)[:, level == l]
        assert (m == m[:1]).all() == same
    assert not control.encode_tokens(stream, vocabulary)[:, level == 3].any()
    drawn = control.exchange(catalogue, 2)
    assert torch.equal(drawn[:, 1], catalogue[:, 1])
    known = {tuple(prefix) for prefix in catalogue[:, :2].tolist()}
    assert {tuple(prefix) for prefix in drawn[:, :2].tolist()} <= known


@pytest.mark.parametrize(("lags", "earlier_codes"), [(1, None), (2, None), (2, 2)])
def test_the_control_of_cross_item_orders_reads_rows_of_real_transitions_to_the_same_prefix(lags, earlier_codes):
    torch.manual_seed(0)
    sizes = (4, 5, 6)
    catalogue = torch.stack([torch.randint(0, size, (40,)) for size in sizes], 1).unique(dim=0)
    rng = np.random.default_rng(0)
    items = [rng.integers(len(catalogue), size=9) for _ in range(30)]
    train = Histories([str(user) for user in range(30)], items)
    spec = AddressSpec.cross_item(sizes, table_rows=5000, heads=2)
    shared = {"lags": lags, "earlier_codes": earlier_codes}
    config = PrefixMemConfig(spec, memory_dim=8, hidden_size=16, output_init_std=1.0, **shared)
    encoder = PrefixMem(config, grad="dense")
    control = PermutedCrossItem(encoder, catalogue, train)
    pairs = torch.cat([torch.cat([catalogue[i[:-1]], catalogue[i[1:]]], 1) for i in items])
    for level in (3, 4, 5):
        drawn = control.exchange(pairs, level)
        assert torch.equal(drawn[:, 3:], pairs[:, 3:])  # the prefix stays
        known = {tuple(pair[:level]) for pair in pairs.tolist()}
        assert {tuple(pair[:level]) for pair in drawn.tolist()} <= known
        assert (drawn[:, :3] != pairs[:, :3]).any(1).float().mean() > 0.2
    tokens = {1 + 10 * l + c: (l + 1, c) for l, size in enumerate(sizes) for c in range(size)}
    vocabulary = SIDVocabulary.from_table(tokens, sizes)
    read = []
    control.memory.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    m = control.encode_tokens(vocabulary.encode(catalogue[items[0]]).flatten()[None].repeat(20, 1), vocabulary)
    assert m[:, 2:].any(-1).all()
    assert not m[:, :2].any()  # nothing stands before the first item
    assert (m[:, 2:] != m[:1, 2:]).any()
    (windows,) = read  # one reading of the table, as fused updates need
    assert len(windows) == 20 * (9 if lags == 1 else 9 + 8)  # of nine items, and of the eight before the last
    assert windows[..., :2].any()
    assert windows[..., 2].any() == (earlier_codes is None)


def test_the_control_exchanges_the_items_of_every_table():
    known, codes = vocabulary(), torch.tensor([[1, 3, 4], [0, 1, 5], [3, 0, 1]])
    train = Histories(["one"], [np.array([0, 1, 2, 0])])
    config = RunConfig(synthetic=True, history=2, history_codes=[2, 3], history_rows=50)
    model = tiny_model()
    add_permuted(model, config, known, codes, train)
    across = model.prefixmem.cross_item
    assert isinstance(across, PermutedCrossItem)
    assert isinstance(across.cross_item, PermutedCrossItem)
    assert across.cross_item.cross_item is None


def test_hits_are_kept_a_bit_each_and_compared_user_by_user():
    hits = np.random.default_rng(0).random(1003) < 0.07
    assert (unpacked(packed(hits), 1003) == hits).all()
    for examples in (30, 900, 1010):
        with pytest.raises(ValueError, match="126 bytes of hits, and"):
            unpacked(packed(hits), examples)
    other = hits.copy()
    other[:200] = True
    low, high = bootstrap_interval(other.astype(float) - hits)
    assert 0 < low < (other.mean() - hits.mean()) < high < 0.3
    assert bootstrap_interval(np.zeros(50)) == (0.0, 0.0)
