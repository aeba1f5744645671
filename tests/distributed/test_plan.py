"""Bytes a rank and bytes sent of every layout, and which one is recommended."""

import ast
import math

import pytest
import torch

from prefixmem_fast._choices import ROW_OPTIMIZERS, SENT_DTYPES
from prefixmem_fast.distributed import plan
from prefixmem_fast.distributed.capacity import CatalogueSize
from prefixmem_fast.operation.rules import RULES

PAPER = CatalogueSize(1e9)  # N = 4, H = 4, w = 64, A = 2, L = 5


def cluster(gpus, **options):
    return plan.Cluster(gpus, **options)


@pytest.mark.parametrize(
    ("ranks", "number_bytes", "sent"),
    [(1, 4, 0), (2, 4, 2058), (4, 4, 6174), (8, 4, 14_406), (32, 4, 63_798), (8, 2, 7238)],
)
def test_bytes_of_replicate(ranks, number_bytes, sent):
    assert plan.replicate_sent(PAPER, ranks, number_bytes) == sent


@pytest.mark.parametrize(
    ("shards", "replicas", "sent"),
    [(1, 1, 0), (2, 1, 2058), (4, 1, 3102), (4, 2, 3102 + 2088), (4, 8, 3102 + 7 * 2088), (1, 8, 14_406)],
)
def test_bytes_of_shard(shards, replicas, sent):
    """A rank of a mesh holds codes and dS of 4 SIDs a local one, of a head each: 4 * (10 + 512) = 2,088 bytes."""
    assert plan.shard_sent(PAPER, shards, replicas, 4) == sent


@pytest.mark.parametrize(
    ("ranks", "number_bytes", "sent"), [(2, 4, 4176), (4, 4, 6288), (8, 4, 7392), (32, 4, 8556), (8, 2, 3808)]
)
def test_bytes_of_torchrec(ranks, number_bytes, sent):
    assert plan.torchrec_sent(PAPER, ranks, number_bytes) == sent


def test_bytes_of_a_dense_step():
    tables = PAPER.hashed_rows(2e6) * 64 * 4
    assert tables == pytest.approx(6.15e9, rel=1e-3)
    assert plan.dense_sent(tables, 8) == pytest.approx(10.8e9, rel=1e-2)
    assert plan.dense_sent(tables, 32) == pytest.approx(11.9e9, rel=1e-2)


def sent_by_a_rank(rank, shards, replicas, sids, catalogue, number_bytes):
    """The same by going through all messages of one rank; `held` are the heads of each of the ranks of a group."""
    held = [len(part) for part in torch.arange(catalogue.heads).tensor_split(shards)]
    head, codes = catalogue.active * catalogue.width * number_bytes, 2 * catalogue.levels
    place, total = rank % shards, 0
    for other in range(replicas * shards):
        same_group, same_place = other // shards == rank // shards, other % shards == place
        if other != rank and same_group:
            total += sids * (codes + head * held[place] + head * held[other % shards])
        if other != rank and same_place:
            total += shards * sids * (codes + head * held[place])
    return total


@pytest.mark.parametrize(("shards", "replicas"), [(2, 1), (3, 1), (4, 1), (2, 3), (3, 2), (4, 8)])
@pytest.mark.parametrize("heads", [4, 6])
def test_bytes_of_shard_are_those_of_its_busiest_rank(shards, replicas, heads):
    catalogue, sids = CatalogueSize(1e9, heads=heads, levels=3, active=1, width=8), 7
    sent = [sent_by_a_rank(rank, shards, replicas, sids, catalogue, 2) for rank in range(shards * replicas)]
    assert plan.shard_sent(catalogue, shards, replicas, 2) * sids == max(sent)


@pytest.mark.parametrize(
    ("heads", "ranks", "per_host", "shards"),
    [
        *((4, 1, None, 1), (4, 3, None, 3), (4, 4, None, 4), (4, 5, None, 1), (4, 6, None, 3), (4, 32, 8, 4)),
        *((16, 32, 8, 8), (16, 32, None, 16), (2, 8, 8, 2)),
    ],
)
def test_ranks_that_divide_the_heads(heads, ranks, per_host, shards):
    """A divisor of the ranks, and inside a host."""
    assert plan.shard_ranks(heads, ranks, per_host) == shards


@pytest.mark.parametrize("optimizer", ROW_OPTIMIZERS)
@pytest.mark.parametrize("width", [1, 64])
def test_state_is_that_of_the_rule(optimizer, width):
    state = RULES[optimizer.replace("-", "_")].state.values()
    assert plan.state_bytes(optimizer, width) == sum({"row": 4, "element": 4 * width}[kind] for kind in state)


def test_dtypes_have_the_sizes_of_torch():
    assert set(SENT_DTYPES) == set(plan.NUMBER_BYTES)
    assert all(getattr(torch, name).itemsize == size for name, size in plan.NUMBER_BYTES.items())


def laid_out(rows, gpus, catalogue=PAPER, **options):
    machines = cluster(gpus, **options)
    return {layout.name: layout for layout in plan.layouts(catalogue, rows, machines, 2, 1000)}, machines


def test_bytes_a_rank():
    found, _ = laid_out(2e6, 8)
    rows = PAPER.hashed_rows(2e6)
    assert {name: layout.rank_bytes for name, layout in found.items()} == {
        "dense DDP": 4 * 128 * rows,
        "replicate": 132 * rows,
        "shard": 132 * rows / 4,
        "to_torchrec": 132 * rows / 8,
        "host": 132 * rows,
        "to_torchrec, host": 132 * rows / 8,
    }
    assert found["dense DDP"].sent_bytes == 2 * 7 / 8 * 128 * rows / 1000
    assert found["shard"].text == "shard, 2 x 4 ranks"
    assert laid_out(2e6, 4)[0]["shard"].text == "shard, 4 ranks"


def test_heads_that_do_not_divide_evenly():
    found, _ = laid_out(2e6, 3)
    assert found["shard"].rank_bytes == found["replicate"].rank_bytes / 2
    assert "shard" not in laid_out(2e6, 5)[0]


CASES = [
    (2e6, 1, {}, "one GPU"),
    (2.5e8, 1, {}, "host"),
    (1e10, 1, {}, None),
    (2e6, 2, {}, "replicate"),
    (2e6, 32, {}, "replicate"),
    (5e7, 8, {}, "replicate"),
    (5e7, 8, {"room": 0.5}, "shard"),
    (2e8, 8, {}, "shard"),
    (2e8, 3, {}, "host"),  # 107 GB on the rank with two heads, 71 GB of rows; three copies in a host
    (2.5e8, 8, {}, "to_torchrec"),  # 66.6 GB by heads, in 2 x 4 ranks
    (2.5e8, 8, {"gpu_bytes": 141e9}, "shard"),
    (1e9, 8, {}, "to_torchrec, host"),
    (1e9, 2, {"gpus_per_host": 1}, "host"),  # a copy a host
    (1e9, 32, {}, "to_torchrec"),
    (2e9, 8, {}, None),
    (2e9, 16, {}, "to_torchrec, host"),
]


@pytest.mark.parametrize(("rows", "gpus", "options", "name"), CASES)
def test_the_layout_that_is_recommended(rows, gpus, options, name):
    found, machines = laid_out(rows, gpus, **options)
    choice = plan.recommend(list(found.values()), machines)
    assert (choice.layout and choice.layout.name) == name
    assert choice.layout is None or choice.layout.fits
    assert choice.why.endswith(".")


def test_an_encoder_alone():
    """It divides its heads where ranks allow that; whether it fits goes as beside a model."""

    def name(rows, gpus):
        found, machines = laid_out(rows, gpus)
        return plan.recommend(list(found.values()), machines, encoder_alone=True).layout.name

    assert [name(2e6, gpus) for gpus in (1, 2, 8, 32, 5)] == ["one GPU", "shard", "shard", "shard", "replicate"]
    assert name(2.5e8, 8) == "to_torchrec"


def test_a_choice_names_the_figures_that_decide():
    found, machines = laid_out(2.5e8, 8)
    why = plan.recommend(list(found.values()), machines).why
    assert all(figure in why for figure in ("266 GB", "56 GB", "66.6 GB", "33.3 GB"))


def test_microseconds_are_bytes_at_the_link():
    found, machines = laid_out(2e6, 8, link=1e9)
    assert plan.microseconds(found["replicate"], machines) == pytest.approx(7.238)


@pytest.mark.parametrize("gpus", [1, 4, 8])
@pytest.mark.parametrize("optimizer", ROW_OPTIMIZERS)
def test_the_lines_are_python(gpus, optimizer):
    found, machines = laid_out(2e6, gpus)
    for layout in found.values():
        if layout.name != "dense DDP":
            ast.parse("\n".join(plan.how_to(layout, PAPER, machines, optimizer, "bfloat16")))


def test_what_the_lines_say_of_a_layout():
    found, machines = laid_out(2e6, 8)
    lines = "\n".join(plan.how_to(found["shard"], PAPER, machines, "sgd", "bfloat16"))
    assert "distributed.shard(model, comm_dtype=torch.bfloat16)" in lines
    assert "in groups of 4 ranks" in lines
    lines = "\n".join(plan.how_to(found["to_torchrec"], PAPER, machines, "lazy-adam"))
    assert 'optimizer="row_adagrad", lr=1e-3)  # it has no lazy-adam here' in lines


def test_sums_forward_take_the_bytes_of_the_tables():
    assert plan.shard_sent(PAPER, 2, 1, 2, 4) == 10 + 1024 + 512


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 0}, "gpus = 0 is not a finite number above 0"),
        ({"gpus": 8, "link": math.nan}, "link = nan is not a finite number above 0"),
        ({"gpus": 8, "room": 1.5}, "room = 1.5 is above 1"),
        ({"gpus": 12}, "gpus = 12 is no multiple of gpus_per_host = 8"),
    ],
)
def test_machines_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan.Cluster(**options)


def test_orders_past_the_range_of_floats():
    catalogue = CatalogueSize(1e9, orders=200, levels=200)
    assert catalogue.prefixes()[2:] == pytest.approx([943_986_857, 999_971_579, *[1e9] * 196], rel=1e-4)
