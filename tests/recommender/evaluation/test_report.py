import json
import math
import re
from functools import cache

import numpy as np
import pytest
import torch

from prefixmem_fast import SIDTrie
from prefixmem_fast.recommender.data import Histories, leave_two_out
from prefixmem_fast.recommender.evaluation.baselines import (
    COUNTS,
    count_table_accuracy,
    item_counts,
    popularity_ranks,
    seen_transitions,
    transition_ranks,
)
from prefixmem_fast.recommender.evaluation.report import THIRDS, evaluate, reachable_by, table
from prefixmem_fast.recommender.evaluation.retrieval import ranking_metrics, retrieve
from prefixmem_fast.recommender.evaluation.teacher_forcing import TeacherForced, teacher_forced
from tests.helpers.examples import CODES, catalogue, made_model, tokens
from tests.helpers.models import vocabulary

BEAMS = 6

FLOORS = [*COUNTS, "popularity"]


def split(users=30, only=None):
    random = np.random.default_rng(3)
    chances = np.arange(1, 9) / 36 if only is None else np.eye(8)[only]
    items = [random.choice(8, size=random.integers(2, 9), p=chances) for _ in range(users)]
    return leave_two_out(Histories([f"user {i}" for i in range(users)], items))


@cache
def learnt():
    """A model that has learnt a little, so that some of its predictions are right."""
    model, data = made_model("qwen3", "prefixmem"), split()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(6):
        for history in data.train.items:
            ids = torch.tensor([[1, *tokens().history(history)]])
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def evaluated(data, model=None, **options):
    given = {"num_beams": BEAMS, "cutoffs": (1, 5, 6, 10), "max_items": 4, **options}
    return evaluate(model or learnt(), catalogue(), vocabulary(), tokens(), data, **given)


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    data = split()
    reachable = np.arange(len(data.test)) % 3 == 0
    return data, reachable, *evaluated(data, reachable=reachable)


METRICS = [f"{name}@{k}" for k in (1, 5, 6) for name in ("recall", "ndcg")]


def test_what_is_promised_is_there(made):
    data, _, report, arrays = made
    assert list(report) == [
        "part",
        "examples",
        "teacher_forcing",
        "count_table_accuracy",
        "beams",
        "searches",
        "reachable",
        "floors",
        "transitions",
    ]
    assert (report["part"], report["examples"], report["beams"]) == ("test", len(data.test), BEAMS)
    assert list(report["teacher_forcing"]) == ["accuracy", "loss", "accuracy_by_popularity"]
    assert list(report["teacher_forcing"]["accuracy_by_popularity"]) == list(THIRDS)
    assert list(report["searches"]) == ["constrained", "unconstrained"]
    for found in report["searches"].values():
        of_sids = [f"sid_recall@{k}" for k in (1, 5, 6)]
        others = ["hit_rate", "first_codes", f"recall@{BEAMS}_by_popularity", "by_transition", *of_sids]
        assert list(found) == [*METRICS, *others]
        assert all(found[f"sid_{metric}"] >= found[metric] for metric in METRICS if metric.startswith("recall"))
    assert {name: list(found) for name, found in report["floors"].items()} == dict.fromkeys(FLOORS, METRICS)
    for group in report["reachable"].values():
        assert list(group) == ["examples", "accuracy", f"constrained_recall@{BEAMS}", f"unconstrained_recall@{BEAMS}"]
    assert list(arrays) == ["target", "level_rank", "level_loss", "constrained_rank", "unconstrained_rank"]
    assert {len(array) for array in arrays.values()} == {len(data.test)}
    assert json.loads(json.dumps(report)) == report
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_it_is_what_its_parts_say(made):
    data, _, report, arrays = made
    model, seen = learnt(), data.test.last(4)
    scored = teacher_forced(model, seen, tokens())
    assert 0 < scored.accuracy[0] < scored.accuracy[1] < 1
    np.testing.assert_array_equal(arrays["target"], data.test.targets)
    np.testing.assert_array_equal(arrays["level_rank"], scored.rank)
    np.testing.assert_array_equal(arrays["level_loss"], scored.loss)
    assert report["teacher_forcing"]["accuracy"] == scored.accuracy
    np.testing.assert_allclose(report["teacher_forcing"]["loss"], scored.loss.mean(0))
    popularity = item_counts(data.train, 8)
    for name in ("constrained", "unconstrained"):
        found = retrieve(
            model,
            seen,
            tokens(),
            SIDTrie(catalogue(), vocabulary()),
            num_beams=BEAMS,
            constrained=name == "constrained",
            popularity=popularity,
        )
        np.testing.assert_array_equal(arrays[f"{name}_rank"], found.rank)
        of_report = report["searches"][name]
        assert {metric: of_report[metric] for metric in METRICS} == ranking_metrics(found.rank, (1, 5, 6))
        np.testing.assert_allclose(of_report["hit_rate"], found.hits.mean(0))
        assert of_report["first_codes"] == pytest.approx(found.first_codes.mean())
    codes = CODES.numpy()
    assert report["count_table_accuracy"] == count_table_accuracy(data.train, data.test, codes)
    floors = {name: transition_ranks(data.train, seen, 8, counts) for name, counts in COUNTS.items()}
    floors["popularity"] = popularity_ranks(data.train, data.test, 8)
    before = seen_transitions(data.train, data.test)
    for name, ranks in floors.items():
        assert report["floors"][name] == ranking_metrics(ranks, (1, 5, 6))
        assert report["transitions"]["seen"][f"{name}_recall@5"] == pytest.approx((ranks[before] < 5).mean())
    assert set(report["floors"]) == set(floors)
    for name, group in (("seen", before), ("new", ~before)):
        assert 0 < report["transitions"][name]["examples"] == group.sum()
        for search, of_report in report["searches"].items():
            found = arrays[f"{search}_rank"][group]
            assert of_report["by_transition"][name] == ranking_metrics(found, (1, 5, 6))
    assert report["floors"]["markov"] != report["floors"]["popularity"]
    assert report["searches"]["constrained"]["hit_rate"] == [1.0] * 3
    assert report["searches"]["unconstrained"]["hit_rate"] != [1.0] * 3


def prefix_counts(data):
    """Interactions of each target's prefix of two codes."""
    met = [tuple(CODES[item, :2].tolist()) for history in data.train.items for item in history]
    return np.array([met.count(tuple(CODES[target, :2].tolist())) for target in data.test.targets])


def test_groups_make_up_the_whole(made):
    data, reachable, report, arrays = made
    correct = arrays["level_rank"] == 0
    counts = prefix_counts(data)
    limits = np.quantile(counts, (1 / 3, 2 / 3))
    third = (counts > limits[0]).astype(int) + (counts > limits[1])
    assert set(third) == {0, 1, 2}
    for i, name in enumerate(THIRDS):
        expected = correct[third == i].mean(0)
        np.testing.assert_allclose(report["teacher_forcing"]["accuracy_by_popularity"][name], expected)
        for search in ("constrained", "unconstrained"):
            hits = arrays[f"{search}_rank"][third == i] < BEAMS
            assert report["searches"][search][f"recall@{BEAMS}_by_popularity"][name] == pytest.approx(hits.mean())
    shares = np.array([(third == i).mean() for i in range(3)])
    of_groups = np.array([report["teacher_forcing"]["accuracy_by_popularity"][name] for name in THIRDS])
    np.testing.assert_allclose(shares @ of_groups, report["teacher_forcing"]["accuracy"])
    for search, found in report["searches"].items():
        parts = np.array([found[f"recall@{BEAMS}_by_popularity"][name] for name in THIRDS])
        assert shares @ parts == pytest.approx(found[f"recall@{BEAMS}"])
        groups = report["reachable"]
        total = sum(group["examples"] * group[f"{search}_recall@{BEAMS}"] for group in groups.values())
        assert total / report["examples"] == pytest.approx(found[f"recall@{BEAMS}"])
    assert groups["reachable"]["examples"] == reachable.sum()
    assert groups["unreachable"]["examples"] == (~reachable).sum()
    np.testing.assert_allclose(groups["reachable"]["accuracy"], correct[reachable].mean(0))
    np.testing.assert_allclose(groups["unreachable"]["accuracy"], correct[~reachable].mean(0))


def test_a_part_some_examples_and_one_search():
    data, calls = split(), []

    def progress(search, examples):
        calls.append([search, examples, 0])
        return lambda done: calls[-1].__setitem__(2, calls[-1][2] + done)

    report, arrays = evaluated(
        data, part="validation", examples=7, searches=("unconstrained",), num_beams=12, progress=progress
    )
    assert (report["part"], report["examples"]) == ("validation", 7)
    np.testing.assert_array_equal(arrays["target"], data.validation.sample(7).targets)
    assert list(report["searches"]) == ["unconstrained"]
    assert "recall@10_by_popularity" in report["searches"]["unconstrained"], "ten of twelve beams"
    assert "reachable" not in report
    assert list(arrays) == ["target", "level_rank", "level_loss", "unconstrained_rank"]
    assert calls == [["unconstrained", 7, 7]]
    assert "recall@10" in report["floors"]["markov"]
    again, other = evaluated(data, examples=7, searches=())
    assert again["searches"] == {}
    np.testing.assert_array_equal(other["target"], data.test.sample(7).targets)


def test_histories_are_cut():
    data = split()
    whole, cut = (evaluated(data, max_items=most, searches=())[1]["level_loss"] for most in (20, 1))
    assert (abs(whole - cut) > 1e-3).any()
    short = np.array([len(history) == 1 for history in data.test.histories])
    data.test.histories = [history[-1:] for history in data.test.histories]
    np.testing.assert_array_equal(evaluated(data, max_items=20, searches=())[1]["level_loss"], cut)
    assert not short.all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"part": "Test"}, "part = 'Test'"), ({"searches": ("constrianed",)}, "constrianed")],
)
def test_names_that_mean_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        evaluated(split(), **options)


def test_an_encoder_decoder():
    report, _ = evaluated(split(8), made_model("t5", "prefixmem"))
    assert report["searches"]["constrained"]["hit_rate"] == [1.0] * 3
    json.dumps(report)


def save(path, arrays):
    np.savez_compressed(path, **arrays)
    return path


def test_reachable_by(made, tmp_path):
    _, _, _, arrays = made
    file = save(tmp_path / "test.npz", arrays)
    scored = TeacherForced(arrays["level_rank"], arrays["level_loss"])
    for top in (1, 2, 4):
        np.testing.assert_array_equal(reachable_by(file, arrays["target"], top), scored.reachable(top))
    assert len({scored.reachable(top).sum() for top in (1, 2, 4)}) == 3
    np.testing.assert_array_equal(reachable_by(str(file), arrays["target"]), scored.reachable(10))
    for other in (arrays["target"][::-1], arrays["target"][:-1], arrays["target"][:1]):
        with pytest.raises(ValueError, match=rf"baseline {re.escape(str(file))} is of other examples; evaluate it on"):
            reachable_by(file, other)
    with pytest.raises(FileNotFoundError, match=r"nothing\.npz is not there; evaluate the baseline run first"):
        reachable_by(tmp_path / "nothing.npz", arrays["target"])


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_a_baseline_that_is_none(content, made, tmp_path):
    file = tmp_path / "test.npz"
    if content is None:
        save(file, {"target": made[3]["target"]})
    else:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"baseline {re.escape(str(file))}"):
        reachable_by(file, made[3]["target"])


def rows_of(text):
    """{name: cells} of a table."""
    return {line[:34].rstrip(): line[34:].split() for line in text.splitlines() if line[34:].strip()}


def formatted(values, digits=3):
    return [f"{value:.{digits}f}" for value in values]


def test_table(made):
    report = {"data": "Games", "name": "prefixmem", "bleu": 12.345, **made[2]}
    text = table(report)
    assert text.splitlines()[0] == f"Games, test, {report['examples']} examples, beams of {BEAMS}"
    rows = rows_of(text)
    scored = report["teacher_forcing"]
    levels = [part for l in (1, 2, 3) for part in ("level", str(l))]
    assert rows["teacher-forced accuracy"] == levels
    assert rows["prefixmem"] == formatted(scored["accuracy"])
    assert rows["count table"] == formatted(report["count_table_accuracy"])
    for name in THIRDS:
        assert rows[f"  {name} prefixes"] == formatted(scored["accuracy_by_popularity"][name])
    for name, group in report["reachable"].items():
        assert rows[f"  {name}, {group['examples']} examples"] == formatted(group["accuracy"])
    assert rows["cross-entropy, nats"] == formatted(scored["loss"])
    assert rows["next item"] == METRICS
    for name in FLOORS:
        assert rows[name] == formatted(report["floors"][name].values(), 4)
    assert rows["BLEU, SID to text"] == ["12.345"]
    for group in report["transitions"]:
        found = report["searches"]["unconstrained"]["by_transition"][group]
        assert rows[f"  unconstrained, {group} transitions"] == formatted(found.values(), 4)
    # A search has two rows: its metrics, then what is in its beams.
    lines = [line for line in text.splitlines() if line.startswith(("constrained", "unconstrained"))]
    assert [line[:34].rstrip() for line in lines] == ["constrained", "unconstrained"] * 2
    for line, found in zip(lines, [*report["searches"].values()] * 2, strict=True):
        cells = line[34:].split()
        first = formatted([found[metric] for metric in METRICS], 4)
        assert cells in (first, formatted([*found["hit_rate"], found["first_codes"]]))
    assert lines[0] != lines[2]
    assert all(len(line) <= 34 + 11 * len(METRICS) for line in text.splitlines())


def test_a_table_of_what_evaluate_returns(made):
    text = table(made[2])
    assert f"test, {made[2]['examples']} examples" in text
    assert "BLEU" not in text
    assert "model" in rows_of(text)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_groups_without_examples():
    """One prefix alone, so all examples are in one third; and a baseline that reaches all of them."""
    data = split(10, only=3)
    report, arrays = evaluated(data, reachable=np.ones(len(data.test), dtype=bool))
    by_popularity = report["teacher_forcing"]["accuracy_by_popularity"]
    assert by_popularity["rare"] == report["teacher_forcing"]["accuracy"]
    assert all(math.isnan(value) for name in THIRDS[1:] for value in by_popularity[name])
    assert [len(by_popularity[name]) for name in THIRDS] == [3] * 3
    nobody = report["reachable"]["unreachable"]
    assert nobody["examples"] == 0
    assert all(math.isnan(value) for value in (*nobody["accuracy"], nobody[f"constrained_recall@{BEAMS}"]))
    assert math.isnan(report["searches"]["constrained"][f"recall@{BEAMS}_by_popularity"]["popular"])
    assert report["reachable"]["reachable"]["accuracy"] == (arrays["level_rank"] == 0).mean(0).tolist()
    assert json.loads(json.dumps(report))["examples"] == len(data.test)
    rows = rows_of(table({"data": "x", **report}))
    assert rows["  medium prefixes"] == rows["  unreachable, 0 examples"] == ["nan"] * 3


def test_no_beam_reaches_a_cutoff():
    report, _ = evaluated(split(8), num_beams=3, cutoffs=(5, 10))
    assert report["floors"] == {name: {} for name in FLOORS}
    assert "recall@3_by_popularity" in report["searches"]["constrained"]
    assert "constrained" in table({"data": "x", **report})
