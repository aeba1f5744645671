"""Tables divided by heads against one process that sees the whole batch: bits, forward and after steps."""

import itertools

import torch
from torch.distributed.device_mesh import init_device_mesh

from prefixmem_fast.distributed import shard
from tests.distributed.examples import RULES, alone, batches, encoder, loss_of, state_of
from tests.distributed.processes import case

LAYOUTS = {2: [(24, 24), (17, 7), (0, 24)], 3: [(9, 9, 9), (5, 0, 12)], 4: [(6, 6, 6, 6), (9, 0, 2, 7)]}


def compare(rank, counts, rule, steps, grad="fused", reduce="sum", mesh=None, **options):
    world, drawn = len(counts), batches(counts, steps)
    one, mine = (encoder(grad, **options) for _ in range(2))
    with torch.no_grad():
        mine.memory.weight.add_(rank)  # the first rank's tables count
    alone(one)
    shard(mine, mesh, reduce=reduce)
    heads = one.config.spec.heads
    assert len(mine.memory.weight) < len(one.memory.weight) or world > heads
    optimizers = []
    for model in (one, mine):
        model.out_proj.requires_grad_(False)
        optimizers.append(RULES[rule]([model.memory.weight], lr=0.05))
    scales = 1 / 8, 1 / 8 * (world if reduce == "mean" else 1)
    for step in drawn:
        S = one.memory(torch.cat(step)).split(counts)[rank]
        assert torch.equal(mine.memory(step[rank]), S)  # ends without a backward pass
        loss_of(one, torch.cat(step), scales[0]).backward()
        loss_of(mine, step[rank], scales[1]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    part_of = mine.memory.division.part_of
    assert torch.equal(mine.memory.weight, part_of(one.memory.weight.detach()))
    (state, count), (own, own_count) = (
        state_of(o, m.memory.weight) for o, m in zip(optimizers, (one, mine), strict=True)
    )
    assert count == own_count == steps
    assert state.keys() == own.keys()
    assert all(torch.equal(part_of(state[name]), own[name]) for name in state)


@case(2, 3, 4)
def every_rule_and_gradient(rank, world):
    for rule, grad in itertools.product(RULES, ("fused", "sparse")):
        compare(rank, LAYOUTS[world][0], rule, 3, grad)


@case(2, 3, 4)
def fifty_steps(rank, world):
    for counts in LAYOUTS[world]:
        compare(rank, counts, "adagrad", 50)
        compare(rank, counts, "adam", 50, "sparse")


@case(2, 3)
def every_mode_and_backend(rank, world):
    for mode, backend in itertools.product(("prefix", "suffix", "full"), ("cpu", "reference", "native")):
        compare(rank, LAYOUTS[world][1], "adagrad", 3, mode=mode, backend=backend)
    compare(rank, (3,) * world, "adagrad", 1, backend="triton")
    compare(rank, (3,) * world, "lazy", 1, "sparse", backend="triton")


@case(2, 4)
def means_of_ranks(rank, world):
    compare(rank, LAYOUTS[world][1], "adagrad", 5, reduce="mean")


@case(4)
def two_dimensions(rank, world):
    """Given, and chosen where there are more ranks than heads."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    compare(rank, LAYOUTS[4][0], "adagrad", 5, mesh=mesh)
    compare(rank, LAYOUTS[4][1], "lazy", 5, "sparse", mesh=mesh)
    compare(rank, LAYOUTS[4][1], "adagrad", 5, heads=2, reduce="mean")
    compare(rank, LAYOUTS[4][1], "adagrad", 5, mesh=mesh, tables="host")


@case(3)
def more_ranks_than_heads(rank, world):
    """A prime number of ranks leaves replication alone."""
    compare(rank, LAYOUTS[3][1], "adagrad", 5, heads=2)


@case(2)
def tables_in_the_hosts_memory(rank, world):
    compare(rank, (17, 7), "adagrad", 5, tables="host")
    compare(rank, (17, 7), "adagrad", 5, tables="host", overlap=True)
    compare(rank, (0, 7), "adagrad", 5, "sparse", tables="host")
