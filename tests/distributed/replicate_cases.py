"""Replicated tables against one process that sees the whole batch: bits."""

import itertools

import torch

from prefixmem_fast import optim
from prefixmem_fast.distributed import replicate
from tests.distributed.examples import RULES, alone, batches, encoder, loss_of, same_tables, state_of
from tests.distributed.processes import case

LAYOUTS = {2: [(24, 24), (17, 7), (0, 24)], 3: [(9, 9, 9), (5, 0, 12)], 4: [(6, 6, 6, 6)]}


def train(model, rule, drawn, rank, scale, clip=None, every=1):
    """Tables by their rule; W_out stays, so that nothing but the tables depends on the processes."""
    model.out_proj.requires_grad_(False)
    optimizer = RULES[rule]([model.memory.weight], lr=0.05)
    for i, step in enumerate(drawn, start=1):
        loss_of(model, step[rank] if rank is not None else torch.cat(step), scale).backward()
        if clip is not None:
            optim.clip_grad_norm_([model.memory.weight], clip)
        if i % every == 0:
            optimizer.step()
            optimizer.zero_grad()
    return optimizer


def compare(rank, counts, rule, steps, grad="fused", reduce="sum", backend="auto", clip=None, every=1, **options):
    world, drawn = len(counts), batches(counts, steps)
    one, mine = (encoder(grad, backend=backend, **options) for _ in range(2))
    with torch.no_grad():
        mine.memory.weight.add_(rank)  # the first rank's tables count
    replicate(mine, reduce=reduce)
    first = train(alone(one), rule, drawn, None, 1 / 8, clip, every)
    mean = 1 / 8 * world if reduce == "mean" else 1 / 8
    second = train(mine, rule, drawn, rank, mean, clip, every)
    same_tables(one, mine)
    for (name, a), b in zip(
        *(state_of(o, m.memory.weight)[0].items() for o, m in ((first, one), (second, mine))), strict=False
    ):
        assert torch.equal(a, b[1]), name
    assert state_of(first, one.memory.weight)[1] == state_of(second, mine.memory.weight)[1] == steps // every


@case(2, 3)
def every_rule_and_gradient(rank, world):
    for rule, grad in itertools.product(RULES, ("fused", "sparse")):
        compare(rank, LAYOUTS[world][0], rule, 3, grad)


@case(2, 3, 4)
def fifty_steps(rank, world):
    for counts in LAYOUTS[world]:
        compare(rank, counts, "adagrad", 50)
        compare(rank, counts, "lazy", 50, "sparse")


@case(2, 3)
def every_mode_and_backend(rank, world):
    for mode, backend in itertools.product(("prefix", "suffix", "full"), ("cpu", "reference", "native")):
        compare(rank, LAYOUTS[world][1], "adagrad", 3, mode=mode, backend=backend)
    compare(rank, (3,) * world, "adagrad", 1, backend="triton")
    compare(rank, (3,) * world, "adam", 1, "sparse", backend="triton")


@case(2, 4)
def means_of_ranks(rank, world):
    """Dividing by a power of two loses no bit."""
    compare(rank, LAYOUTS[world][0], "adagrad", 5, reduce="mean")
    compare(rank, LAYOUTS[world][0], "adam", 5, "sparse", reduce="mean")


@case(2, 3)
def accumulation_and_clipping(rank, world):
    compare(rank, LAYOUTS[world][1], "adagrad", 6, "sparse", clip=0.3, every=2)


@case(2)
def bfloat16_tables_round_alike(rank, world):
    compare(rank, (17, 7), "adagrad", 5, dtype=torch.bfloat16)
    compare(rank, (17, 7), "lazy", 5, "sparse", dtype=torch.bfloat16)


@case(2)
def tables_in_the_hosts_memory(rank, world):
    compare(rank, (17, 7), "adagrad", 5, tables="host")
    compare(rank, (17, 7), "adagrad", 5, tables="host", overlap=True)
    compare(rank, (0, 7), "adagrad", 5, "sparse", tables="host")
