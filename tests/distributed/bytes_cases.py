"""Bytes that leave a rank in a step, counted: limits of replicate and shard, at the paper's sizes of a Semantic ID."""

import pytest
import torch
import torch.distributed as dist

from bench.distributed.counting import SentBytes
from prefixmem_fast import AddressSpec, PrefixMem, PrefixMemConfig, optim
from prefixmem_fast.distributed import plan, replicate, shard
from prefixmem_fast.distributed.capacity import CatalogueSize
from tests.distributed.processes import case

SIDS = 96
HEADER = 16  # bytes to each other rank, before an exchange: how many SIDs, and a digest
PAPER = CatalogueSize(1)  # L = 5, N = 4, H = 4, w = 64, A = 2
LIMITS = {  # bytes a SID, by ranks: float32, and with dS in bfloat16
    ("replicate", 2): (2058, 1034),
    ("replicate", 4): (6174, 3102),
    ("shard", 2): (2058, 1546),
    ("shard", 4): (3102, 2334),
}
DTYPES = (None, torch.bfloat16)


def sent(distribute, comm_dtype, grad="fused", steps=2):
    """Bytes by kind of the last of some steps."""
    torch.manual_seed(0)
    spec = AddressSpec((2048,) * 5, heads=4, table_rows=500, active_levels=(3, 4))
    encoder = PrefixMem(PrefixMemConfig(spec, memory_dim=256, hidden_size=8), grad=grad)
    memory = distribute(encoder, comm_dtype=comm_dtype).memory
    optimizer = optim.RowWiseAdagrad([memory.weight], lr=0.05)
    for _ in range(steps):
        with SentBytes() as counted:
            memory(torch.randint(2048, (SIDS, 5))).sum().backward()
            optimizer.step()
        optimizer.zero_grad()
    return counted


@case(2, 4)
def bytes_of_replicate(rank, world):
    for comm_dtype, limit in zip(DTYPES, LIMITS["replicate", world], strict=True):
        for grad in ("fused", "sparse"):
            counted = sent(replicate, comm_dtype, grad)
            assert counted.calls == {"all_gather": SIDS * limit + HEADER * (world - 1)}, (comm_dtype, grad)


@case(2, 4)
def bytes_of_shard(rank, world):
    for comm_dtype, limit in zip(DTYPES, LIMITS["shard", world], strict=True):
        codes = 2 * PAPER.levels * (world - 1)
        counted = sent(shard, comm_dtype)
        assert counted.calls == {
            "all_gather": SIDS * codes + 2 * HEADER * (world - 1),  # forward and backward
            "all_to_all": SIDS * (limit - codes),
        }, comm_dtype


@case(2, 4)
def limits_are_the_formulas(rank, world):
    assert LIMITS["replicate", world] == tuple(plan.replicate_sent(PAPER, world, size) for size in (4, 2))
    assert LIMITS["shard", world] == tuple(plan.shard_sent(PAPER, world, 1, size, 4) for size in (4, 2))


@case(2, 4)
def every_collective_is_counted(rank, world):
    own, parts = torch.zeros(3, dtype=torch.int32), torch.zeros(world, 5)
    with SentBytes() as counted:
        dist.all_gather([torch.empty_like(own) for _ in range(world)], own)
        dist.all_to_all_single(torch.empty_like(parts), parts)
        dist.broadcast(own, 1)
        dist.all_reduce(parts)
        dist.barrier()
    assert counted.calls == {
        "all_gather": 12 * (world - 1),
        "all_to_all": 20 * (world - 1),
        "broadcast": 12 * (world - 1) * (rank == 1),
        "all_reduce": 2 * (world - 1) / world * 20 * world,
    }
    splits = [1] * world
    splits[0] += 2
    whole = torch.zeros(sum(splits), 5)
    with SentBytes() as counted:
        received = torch.empty(world * splits[rank], 5)
        dist.all_to_all_single(received, whole, [splits[rank]] * world, splits)
    assert counted.calls == {"all_to_all": 20 * (sum(splits) - splits[rank])}


@case(2)
def functional_collectives_and_those_of_ddp_are_counted(rank, world):
    from torch.distributed import _functional_collectives as functional

    tensor = torch.zeros(world * 3)
    with SentBytes() as counted:
        functional.all_reduce(tensor, "sum", dist.group.WORLD).wait()
        functional.all_to_all_single(tensor, None, None, dist.group.WORLD).wait()
    assert counted.calls == {"all_reduce": 24, "all_to_all": 12}
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 8, bias=False))
    for _ in range(3):  # the second one arranges its buckets
        with SentBytes() as counted:
            model(torch.ones(1, 4)).sum().backward()
    assert counted.calls == {"all_reduce": 4 * 32}


@case(2)
def what_has_no_rule_is_refused(rank, world):
    with pytest.raises(NotImplementedError, match="the bytes of reduce_ are not counted"), SentBytes():
        dist.reduce(torch.zeros(3), 0)
