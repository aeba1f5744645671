"""Encoders, batches and one process that sees them all, for cases in several processes."""

import torch

from prefixmem_fast import AddressSpec, PrefixMem, PrefixMemConfig, optim
from prefixmem_fast.distributed.replicated import ReplicatedTable
from prefixmem_fast.operation.table_state import table_state

HIDDEN = 6
RULES = {"sgd": optim.SGD, "adagrad": optim.RowWiseAdagrad, "adam": optim.RowWiseAdam, "lazy": optim.LazyAdam}


def encoder(grad="fused", *, mode="prefix", active=(3, 4), heads=4, dtype=None, cross_item=None, seed=0, **options):
    """Small tables in which prefixes share rows, the same on every rank unless the seed differs."""
    torch.manual_seed(seed)
    spec = AddressSpec((16,) * 5, heads=heads, table_rows=97, mode=mode, active_levels=active)
    config = PrefixMemConfig(
        spec, memory_dim=8 * heads, hidden_size=HIDDEN, output_init_std=0.5, memory_init_std=0.5, cross_item=cross_item
    )
    return PrefixMem(config, grad=grad, dtype=dtype, **options)


def batches(counts, steps, levels=5, codes=16):
    """For each step codes ``[M, L]`` for each rank, some of them invalid."""
    generator = torch.Generator().manual_seed(1)
    drawn = [
        [torch.randint(-1, codes + 1, (count, levels), generator=generator) for count in counts] for _ in range(steps)
    ]
    for step in drawn:
        for batch in step:  # crowded: many prefixes occur often
            batch[: len(batch) // 2] = batch[: len(batch) // 2].clamp(0, 2)
    return drawn


def alone(model):
    """A model that one process trains, within one of several."""
    for module in model.modules():
        if hasattr(module, "read_own"):
            table_state(module.weight).exchange = ReplicatedTable("alone", module, None, False)
    return model


def loss_of(model, codes, scale):
    """A sum over SIDs, whose gradient of each SID does not depend on how many there are."""
    m = model(codes)
    target = torch.linspace(-1, 1, m[0].numel()).view(m.shape[1:]) if len(m) else 0.0
    return ((m - target) ** 2).sum() * scale


def tables_of(model):
    return {name: m.weight.detach() for name, m in model.named_modules() if hasattr(m, "read_own")}


def same_tables(model, other):
    for (name, mine), (_, theirs) in zip(tables_of(model).items(), tables_of(other).items(), strict=True):
        assert torch.equal(mine, theirs), (name, (mine - theirs).abs().max())


def state_of(optimizer, weight):
    state = optimizer.state[weight] if weight in optimizer.state else optimizer.apart.state[weight]
    return {name: value for name, value in state.items() if name != "step"}, int(state["step"])
