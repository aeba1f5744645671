"""Token streams, cross-item orders and rows that several lags share: bits of one process, in both layouts."""

import torch

from prefixmem_fast.distributed import replicate, shard
from tests.distributed.examples import RULES, alone
from tests.distributed.processes import case
from tests.distributed.token_examples import stream
from tests.helpers import models


def encoder_with_a_gap(**options):
    """A Semantic ID that is cut after its second code reads the rows of its first alone."""
    return models.encoder(spec={"active_levels": (1, 3)}, **options)


MAKES = (models.encoder, encoder_with_a_gap, models.cross_item_encoder, models.lagged_encoder)
VOCABULARY = models.vocabulary()


def memories(encoder):
    return [module for module in encoder.modules() if hasattr(module, "read_own")]


def train(encoder, drawn, rule):
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name.endswith("memory.weight"))  # what is left depends on sums over all tokens
    optimizer = RULES[rule]([memory.weight for memory in memories(encoder)], lr=0.05)
    for tokens in drawn:
        encoded = encoder.encode_stream(tokens, VOCABULARY)
        sums = encoded.m if encoded.head is None else encoded.m + encoded.head
        ((sums - 1) ** 2).sum().div(8).backward()
        optimizer.step()
        optimizer.zero_grad()


def compare(make, layout, rank, world, steps, rule="adagrad", **options):
    drawn = stream(world, steps, length=14)
    one, mine = alone(make(**options)), layout(make(**options), reduce="sum")
    before = [memory.weight.detach().clone() for memory in memories(one)]
    train(one, drawn, rule)
    train(mine, [tokens.chunk(world)[rank] for tokens in drawn], rule)
    for own, whole, start in zip(memories(mine), memories(one), before, strict=True):
        assert not torch.equal(whole.weight, start)
        part = own.division.part_of if own.division else lambda table: table
        assert torch.equal(own.weight, part(whole.weight.detach()))


@case(2, 3)
def tables_of_tokens(rank, world):
    """The last rank has text alone."""
    for layout in (replicate, shard):
        for make in MAKES:
            compare(make, layout, rank, world, 4, grad="fused")
            compare(make, layout, rank, world, 4, "lazy", grad="sparse")
        for backend in ("cpu", "reference"):
            compare(models.cross_item_encoder, layout, rank, world, 2, grad="fused", backend=backend)


@case(2)
def fifty_steps(rank, world):
    for layout in (replicate, shard):
        compare(models.lagged_encoder, layout, rank, world, 50, grad="fused")


@case(2)
def tokens_of_tables_in_the_hosts_memory(rank, world):
    for layout in (replicate, shard):
        for make in MAKES:
            compare(make, layout, rank, world, 3, grad="fused", tables="host", overlap=True)


@case(2)
@torch.no_grad()
def packed_sequences(rank, world):
    """Segments end a SID, and are exchanged as ends of SIDs."""
    tokens = stream(world, 1)[0]
    segments = (torch.arange(tokens.shape[1]) // 5).expand(len(tokens), -1).contiguous()
    whole = alone(models.cross_item_encoder(grad="fused"))
    expected = whole.encode_tokens(tokens, VOCABULARY, segments).chunk(world)[rank]
    mine = shard(models.cross_item_encoder(grad="fused"))
    assert torch.equal(mine.encode_tokens(tokens.chunk(world)[rank], VOCABULARY, segments.chunk(world)[rank]), expected)
