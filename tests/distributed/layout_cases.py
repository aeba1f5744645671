"""Replicated and divided tables against one process that sees the whole batch: bits, forward and after steps."""

import itertools

import torch
from torch.distributed.device_mesh import init_device_mesh

from prefixmem_fast import optim
from prefixmem_fast.distributed import replicate, shard
from prefixmem_fast.distributed.ranks import gathered
from tests.distributed.examples import RULES, alone, batches, encoder, loss_of, state_of
from tests.distributed.processes import case
from tests.helpers.models import lagged_encoder

LAYOUTS = (replicate, shard)
COUNTS = {  # SIDs of each rank: equal, ragged, none
    2: [(24, 24), (17, 7), (0, 24)],
    3: [(9, 9, 9), (5, 0, 12)],
    4: [(6, 6, 6, 6), (9, 0, 2, 7)],
}


def compare(layout, rank, counts, rule, steps, grad="fused", reduce="sum", mesh=None, clip=None, every=1, **options):
    """Train a model of one process and this rank's; W_out stays, so that the tables alone depend on the processes."""
    drawn = batches(counts, steps)
    one, mine = (encoder(grad, **options) for _ in range(2))
    with torch.no_grad():
        mine.memory.weight.add_(rank)  # the first rank's tables count
    alone(one)
    layout(mine, *([] if mesh is None else [mesh]), reduce=reduce)
    scales = 1 / 8, len(counts) / 8 if reduce == "mean" else 1 / 8
    optimizers = []
    for model in (one, mine):
        model.out_proj.requires_grad_(False)
        optimizers.append(RULES[rule]([model.memory.weight], lr=0.05))
    for i, step in enumerate(drawn, start=1):
        whole = torch.cat(step)
        assert torch.equal(mine.memory(step[rank]), one.memory(whole).split(counts)[rank])
        for model, codes, scale in ((one, whole, scales[0]), (mine, step[rank], scales[1])):
            loss_of(model, codes, scale).backward()
            if clip is not None:
                optim.clip_grad_norm_(model, clip)
        if i % every == 0:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    division = mine.memory.division
    part = (lambda table: table) if division is None else division.part_of
    assert torch.equal(mine.memory.weight, part(one.memory.weight.detach()))
    state, count = state_of(optimizers[0], one.memory.weight)
    own, own_count = state_of(optimizers[1], mine.memory.weight)
    assert count == own_count == steps // every
    assert state.keys() == own.keys()
    assert all(torch.equal(part(state[name]), own[name]) for name in state)
    return len(mine.memory.weight) / len(one.memory.weight)


@case(2, 3, 4)
def every_rule_and_gradient(rank, world):
    for layout, rule, grad in itertools.product(LAYOUTS, RULES, ("fused", "sparse")):
        compare(layout, rank, COUNTS[world][0], rule, 3, grad)


@case(2, 3, 4)
def fifty_steps(rank, world):
    for layout, counts in itertools.product(LAYOUTS, COUNTS[world]):
        compare(layout, rank, counts, "adagrad", 50)
        compare(layout, rank, counts, "lazy", 50, "sparse")


@case(2, 3)
def every_mode_and_backend(rank, world):
    for layout in LAYOUTS:
        for mode, backend in itertools.product(("prefix", "suffix", "full"), ("cpu", "reference", "native")):
            compare(layout, rank, COUNTS[world][1], "adagrad", 3, mode=mode, backend=backend)
        compare(layout, rank, (3,) * world, "adagrad", 1, backend="triton")
        compare(layout, rank, (3,) * world, "adam", 1, "sparse", backend="triton")


@case(2, 4)
def means_of_ranks(rank, world):
    """Dividing by a power of two loses no bit."""
    for layout in LAYOUTS:
        compare(layout, rank, COUNTS[world][1], "adagrad", 5, reduce="mean")
        compare(layout, rank, COUNTS[world][0], "adam", 5, "sparse", reduce="mean")


@case(2, 3)
def accumulation_and_clipping(rank, world):
    """By the norm over the whole batch; that of divided tables is summed in another order."""
    compare(replicate, rank, COUNTS[world][1], "adagrad", 6, "sparse", clip=0.3, every=2)
    compare(shard, rank, COUNTS[world][1], "adagrad", 6, "sparse", every=2)


@case(2)
def bfloat16_tables_round_alike(rank, world):
    """Divided ones draw other random bits than one process."""
    compare(replicate, rank, (17, 7), "adagrad", 5, dtype=torch.bfloat16)
    compare(replicate, rank, (17, 7), "lazy", 5, "sparse", dtype=torch.bfloat16)


@case(2)
def tables_in_the_hosts_memory(rank, world):
    for layout in LAYOUTS:
        compare(layout, rank, (17, 7), "adagrad", 5, tables="host")
        compare(layout, rank, (17, 7), "adagrad", 5, tables="host", overlap=True)
        compare(layout, rank, (0, 7), "adagrad", 5, "sparse", tables="host")


@case(2)
def parts_are_parts(rank, world):
    assert compare(shard, rank, COUNTS[world][0], "sgd", 1) == 1 / world
    assert compare(replicate, rank, COUNTS[world][0], "sgd", 1) == 1


@case(2, 4)
def tables_that_nobody_holds_whole(rank, world):
    """From the meta device: parts of other numbers, the same where ranks hold the same heads."""
    mesh = None if world == 2 else init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = shard(encoder("fused", device="meta"), mesh)
    weight, heads = model.memory.weight.detach().clone(), 2
    assert weight.shape == (encoder().config.spec.total_rows // 2, 8)
    assert abs(float(weight.std()) - 0.5) < 0.03
    parts = gathered((model.memory.division.start, weight, model.out_proj.weight.detach()))
    for start, other, out in parts:
        assert torch.equal(other, weight) == (start == model.memory.division.start)
        assert torch.equal(out, model.out_proj.weight)
    assert {start for start, *_ in parts} == {0, heads}
    optimizer = RULES["adagrad"]([model.memory.weight], lr=0.05)
    loss_of(model, batches((8,) * world, 1)[0][rank], 1.0).backward()
    optimizer.step()
    assert not torch.equal(model.memory.weight, weight)
    lagged = shard(lagged_encoder(grad="fused", device="meta")).cross_item
    assert torch.equal(lagged.lag_weights, torch.tensor([1.0, 0.5, 0.25]))
    heads = gathered(lagged.head_proj.weight.detach())
    assert all(torch.equal(other, heads[0]) for other in heads)
    assert heads[0].any()


@case(4)
def two_dimensions(rank, world):
    """Given, and chosen where there are more ranks than heads."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    assert compare(shard, rank, COUNTS[4][0], "adagrad", 5, mesh=mesh) == 1 / 2
    compare(shard, rank, COUNTS[4][1], "lazy", 5, "sparse", mesh=mesh)
    compare(shard, rank, COUNTS[4][1], "adagrad", 5, heads=2, reduce="mean")
    compare(shard, rank, COUNTS[4][1], "adagrad", 5, mesh=mesh, tables="host")


@case(3)
def more_ranks_than_heads(rank, world):
    """A prime number of ranks leaves replication alone."""
    assert compare(shard, rank, COUNTS[3][1], "adagrad", 5, heads=2) == 1
